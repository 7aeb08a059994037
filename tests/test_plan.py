"""The planner: its numbers against real arrays and a real compiled step, what it proposes, bad input."""

import dataclasses

import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import mesh, plan
from mixln_jax.exits import UsageError
from mixln_jax.program import Program

CONFIG = configs.Config(
    batch_size=64,
    seq_length=64,
    model=configs.Model(vocab_size=1000, hidden_size=64, intermediate_size=176, num_layers=4, num_heads=4),
    mesh=configs.Mesh(2, 4, 1),
)


def abstract(config=CONFIG, count=8):
    return Program(config, plan.abstract_mesh(config.mesh, count))


def test_exact_parts_are_what_devices_hold():
    built = Program(CONFIG, mesh.make_mesh(CONFIG.mesh, jax.devices('cpu')))
    state = built.init(jax.random.key(0))
    device = jax.devices('cpu')[3]

    def held(tree):
        return sum(s.data.nbytes for a in jax.tree.leaves(tree) for s in a.addressable_shards if s.device == device)

    parts = plan.memory(abstract())
    assert (parts['weights'], parts['optimiser']) == (held(state.params), held(state.opt_state))


def test_estimates_go_the_right_way():
    def of(**model):
        return plan.memory(abstract(dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **model))))

    activations = [of(remat=remat)['activations'] for remat in ('full', 'dots', 'none')]
    assert activations == sorted(set(activations))
    halved = plan.memory(abstract(dataclasses.replace(CONFIG, accumulate=2)))
    assert halved['activations'] == plan.memory(abstract())['activations'] / 2
    assert halved['weights'] == plan.memory(abstract())['weights']


class TestProposal:
    def test_the_first_that_fits(self):
        need = sum(plan.memory(abstract()).values())
        words = plan.proposal(CONFIG, 8, 0.8 * need / plan.SPARE, lambda other: True)
        assert words == ['--config.accumulate=2']
        words = plan.proposal(CONFIG, 8, 0.8 * need / plan.SPARE, lambda other: other.mesh.fsdp == 8)
        assert words is not None and '--config.mesh.fsdp=8' in words and '--config.mesh.data=1' in words

    def test_nothing_fits(self):
        assert plan.proposal(CONFIG, 8, 1000, lambda other: True) is None
        asked = []
        assert plan.proposal(CONFIG, 8, 1e12, asked.append) is None
        assert len(asked) == 12  # two for each mesh and policy


def recipe(tmp_path):
    path = tmp_path / 'recipe.py'
    path.write_text(
        'from mixln_jax import config\n\n\ndef get_config():\n    made = config.default()\n    made.batch_size = 64\n'
        '    made.model.update(vocab_size=1000, hidden_size=64, intermediate_size=176, num_layers=4, num_heads=4)\n'
        '    return made\n'
    )
    return str(path)


def test_command(tmp_path, capsys):
    words = ['--config', recipe(tmp_path), '--topology', 'v5e:2x4', '--config.num_steps=3600', '--mfu', '0.5']
    assert plan.main(words) == 0
    shown = capsys.readouterr().out
    assert '8 x TPU v5 lite (16 GiB each); mesh data 8, fsdp 1, tensor 1' in shown
    # Embedding and head, four layers of four square and three MLP matrices, nine norms.
    count = 2 * 1000 * 64 + 4 * (4 * 64**2 + 3 * 64 * 176) + 9 * 64
    assert f'parameters        {count:,}' in shown
    flops = (6 * (count - 64_000) + 6 * 4 * 256 * 64) * 64 * 256
    assert f'FLOPs a step      {flops:.3g}' in shown
    assert f'{flops / (0.5 * 197e12 * 8):.3g} h for 3,600 steps' in shown
    assert 'fits' in shown and 'does not fit' not in shown


def test_what_the_compiler_expects(capsys):
    """1.5e9 cycles of a v5e are a second, in which its 197e12 FLOP/s could do twice the work."""
    plan.say_expected({'mlp': 1_125_000_000, 'attention': 375_000_000}, 'TPU v5 lite', 98.5e12)
    shown = capsys.readouterr().out.splitlines()
    assert 'expects 1 s a step (50% MFU)' in shown[0]
    assert shown[1].split() == ['mlp', '0.75', 's', '75%'] and shown[2].split() == ['attention', '0.25', 's', '25%']
    plan.say_expected({}, 'TPU v5 lite', 1)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    'words, message',
    [
        ('--topology v9:2x2', 'KIND:SHAPE such as v5e:8x8'),
        ('--topology v5e', 'KIND:SHAPE such as v5e:8x8'),
        ('--topology v5e:0x4', 'KIND:SHAPE such as v5e:8x8'),
        ('', '--topology'),
        ('--topology v5e:2x4 --mfu 2', '--mfu must be above 0'),
        ('--topology v5e:2x4 --config.mesh.fsdp=3', 'config.mesh.fsdp=3.* does not fit the 8 devices'),
        ('--topology v5e:2x4 --config.mesh.tensor=8', '4 key/value heads'),
        ('--topology v5e:2x4 --config.batch_sise=3', 'did you mean batch_size'),
    ],
)
def test_bad_input(tmp_path, capsys, words, message):
    assert plan.main(['--config', recipe(tmp_path), *words.split()]) == 2
    error = capsys.readouterr().err
    assert np.any([part in error for part in message.split('.*')]) and error.count('\n') == 1


def test_topologies():
    assert plan.topology_size('v5p:4x4x4') == ('v5p', 64) and plan.topology_size('h100:8') == ('h100', 8)
    with pytest.raises(UsageError, match='does not fit the 8 devices'):
        plan.abstract_mesh(configs.Mesh(2, 2, 1), 8)


def test_more_devices_where_nothing_else_helps(tmp_path, capsys, monkeypatch):
    config = configs.build(configs.load(recipe(tmp_path), []))
    least = dataclasses.replace(
        config, mesh=configs.Mesh(1, 16, 1), accumulate=4, model=dataclasses.replace(config.model, remat='full')
    )
    need = sum(plan.memory(abstract(least, 16)).values())
    monkeypatch.setitem(plan.HARDWARE, 'v5e', ('TPU v5 lite', need / plan.SPARE + 1))
    assert plan.main(['--config', recipe(tmp_path), '--topology', 'v5e:2x4']) == 0
    shown = capsys.readouterr().out
    assert 'does not fit' in shown
    assert 'it fits on 16 devices, by formula with --config.accumulate=4 --config.model.remat=full' in shown

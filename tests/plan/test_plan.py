"""The planner: its numbers against real arrays and a real compiled step, what it proposes, bad input."""

import dataclasses
import re
import types

import jax
import pytest

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.distributed import mesh as meshes
from mixln_jax.plan import command as plan
from mixln_jax.plan import memory
from mixln_jax.program.program import Program
from mixln_jax.system import hardware
from mixln_jax.system.errors import UsageError

CONFIG = configs.Config(
    batch_size=64,
    seq_length=64,
    model=configs.Model(vocab_size=1000, hidden_size=64, intermediate_size=176, num_layers=4, num_heads=4),
    mesh=configs.Mesh(2, 4, 1),
)


def abstract(config=CONFIG, count=8):
    return Program(config, memory.abstract_mesh(config.mesh, count))


def test_exact_parts_are_what_devices_hold():
    built = Program(CONFIG, meshes.make_mesh(CONFIG.mesh, jax.devices('cpu')))
    state = built.init(jax.random.key(0))
    device = jax.devices('cpu')[3]

    def held(tree):
        return sum(s.data.nbytes for a in jax.tree.leaves(tree) for s in a.addressable_shards if s.device == device)

    parts = memory.memory(abstract())
    assert (parts['weights'], parts['optimiser']) == (held(state.params), held(state.opt_state))


# Vocabulary 1024 with its padding, width 64, MLP 176, 4 layers of 2 norms, and one more norm. The devices of fsdp and
# tensor, four in all, share every matrix; each of data and fsdp has eight rows of a micro-batch.
BY_HAND = {
    'bfloat16, no remat': (
        {},
        {},
        {
            'weights': 4 * ((2 * 1024 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 176)) // 4 + 9 * 64),
            'optimiser': 2 * 4 * ((2 * 1024 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 176)) // 4 + 9 * 64) + 5 * 4,
            'gradients': 4 * ((2 * 1024 * 64 + 4 * (4 * 64 * 64 + 3 * 64 * 176)) // 4 + 9 * 64),
            # Of a position 2 bytes for the stream, what enters products, norms and gates (7 D, 3 F), in each layer, and
            # 4 streams; float32 scores of one layer, 64 keys and their copy.
            'activations': 8 * 64 * (4 * 2 * (64 + 7 * 64 + 3 * 176) + 2 * 4 * 4 * 64 + 4 * 2 * 64),
            'logits': 8 * 64 * 1024 * (4 + 4 + 2) + 64 * 1024 * (4 + 2),
        },
    ),
    'full remat': (
        {},
        {'remat': 'full'},  # streams, and all of one layer
        {'activations': 8 * 64 * (4 * 2 * 64 + 2 * (7 * 64 + 3 * 176) + 2 * 4 * 4 * 64 + 4 * 2 * 64)},
    ),
    'float32, two micro-batches, tensor, half as many keys': (
        {'accumulate': 2, 'seq_length': 512, 'compute_dtype': 'float32', 'mesh': configs.Mesh(2, 2, 2)},
        {'remat': 'dots', 'num_kv_heads': 2},
        {
            'weights': 4 * ((2 * 1024 * 64 + 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)) // 4 + 9 * 64),
            'optimiser': 8 * ((2 * 1024 * 64 + 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)) // 4 + 9 * 64) + 5 * 4,
            'gradients': 8 * ((2 * 1024 * 64 + 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)) // 4 + 9 * 64),
            # Results of products: o and down (2 D) whole; q, k, v, gate, up by half; all of one layer (3 D whole, 2 D,
            # 2 K, 3 F by half); scores of two heads, 128 queries at a time.
            'activations': 8
            * 512
            * (
                4 * 4 * (64 + 2 * 64 + (64 + 2 * 32 + 2 * 176) // 2)
                + 4 * (3 * 64 + (2 * 64 + 2 * 32 + 3 * 176) // 2)
                + 2 * 4 * 2 * 128
                + 4 * 4 * 64
            ),
            'logits': 2048 * 512 * (4 + 4 + 4) + 64 * 512 * (4 + 4),
        },
    ),
}


@pytest.mark.parametrize('changes, model, expected', BY_HAND.values(), ids=BY_HAND)
def test_memory_by_hand(changes, model, expected):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **model), **changes)
    found = memory.memory(abstract(config))
    assert {name: found[name] for name in expected} == expected
    assert found.keys() == {'weights', 'optimiser', 'gradients', 'activations', 'logits'}


def test_logits_of_other_heads():
    """One number for each position of a text of a reward model; the classes of an image once."""
    reward = dataclasses.replace(CONFIG, task=configs.Task(name='reward'))
    assert memory.memory(abstract(reward))['logits'] == 8 * 64 * (4 + 4 + 2) + 64 * (4 + 2)
    vit = configs.Model(family='vit', hidden_size=64, intermediate_size=176, num_layers=4, num_heads=4, image_size=64)
    images = configs.Config(batch_size=64, model=vit, mesh=CONFIG.mesh, task=configs.Task(name='classification'))
    assert memory.memory(abstract(images))['logits'] == 8 * 1000 * (4 + 4 + 2) + 64 * 1000 * (4 + 2)


def test_estimates_go_the_right_way():
    def of(**model):
        return memory.memory(abstract(dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **model))))

    activations = [of(remat=remat)['activations'] for remat in ('full', 'dots', 'none')]
    assert activations == sorted(set(activations))
    halved = memory.memory(abstract(dataclasses.replace(CONFIG, accumulate=2)))
    assert halved['activations'] == memory.memory(abstract())['activations'] / 2
    assert halved['weights'] == memory.memory(abstract())['weights']


class TestProposal:
    def test_the_first_that_fits(self):
        need = sum(memory.memory(abstract()).values())
        words = memory.proposal(CONFIG, 8, 0.8 * need / memory.SPARE, lambda other: True)
        assert words == ['--config.accumulate=2']
        words = memory.proposal(CONFIG, 8, 0.8 * need / memory.SPARE, lambda other: other.mesh.fsdp == 8)
        assert words is not None and '--config.mesh.fsdp=8' in words and '--config.mesh.data=1' in words

    def test_nothing_fits(self):
        assert memory.proposal(CONFIG, 8, 1000, lambda other: True) is None
        asked = []
        assert memory.proposal(CONFIG, 8, 1e12, asked.append) is None
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
    assert f'parameters          {count:,}' in shown
    flops = (6 * (count - 64_000) + 6 * 4 * 256 * 64) * 64 * 256
    assert f'FLOPs per step      {flops:.3g}' in shown
    assert f'{flops / (0.5 * 197e12 * 8):.3g} h for 3,600 steps' in shown
    assert 'fits' in shown and 'does not fit' not in shown


def test_what_the_compiler_expects(capsys):
    """1.5e9 cycles of a v5e are a second, in which its 197e12 FLOP/s could do twice the work."""
    plan.print_expected({'mlp': 1_125_000_000, 'attention': 375_000_000}, 'TPU v5 lite', 98.5e12)
    shown = capsys.readouterr().out.splitlines()
    assert 'expects 1 s per step (50% MFU)' in shown[0]
    assert shown[1].split() == ['mlp', '0.75', 's', '75%'] and shown[2].split() == ['attention', '0.25', 's', '25%']
    plan.print_expected({}, 'TPU v5 lite', 1)
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
    assert re.search(message, error) and error.count('\n') == 1


def test_topologies():
    assert memory.topology_size('v5p:4x4x4') == ('v5p', 64) and memory.topology_size('h100:8') == ('h100', 8)
    with pytest.raises(UsageError, match='does not fit the 8 devices'):
        memory.abstract_mesh(configs.Mesh(2, 2, 1), 8)


def test_more_devices_where_nothing_else_helps(tmp_path, capsys, monkeypatch):
    config = configs.build(recipes.load(recipe(tmp_path), []))
    least = dataclasses.replace(
        config, mesh=configs.Mesh(1, 16, 1), accumulate=4, model=dataclasses.replace(config.model, remat='full')
    )
    need = sum(memory.memory(abstract(least, 16)).values())
    small = dataclasses.replace(hardware.DEVICES['TPU v5 lite'], memory=need / memory.SPARE + 1)
    monkeypatch.setitem(hardware.DEVICES, 'TPU v5 lite', small)
    assert plan.main(['--config', recipe(tmp_path), '--topology', 'v5e:2x4']) == 0
    shown = capsys.readouterr().out
    assert 'does not fit' in shown
    assert 'it fits on 16 devices, by formula, with --config.accumulate=4 --config.model.remat=full' in shown


class Compiled:
    """As far as the plan looks at a compiled program: 1 GiB goes in and comes out in its place, the rest is asked."""

    def __init__(self, gib):
        self.gib = gib

    def memory_analysis(self):
        sizes = {'argument': 1, 'output': 1, 'alias': 1, 'temp': self.gib - 1, 'generated_code': 0}
        return types.SimpleNamespace(**{f'{name}_size_in_bytes': size * 2**30 for name, size in sizes.items()})

    def as_text(self):
        return ''


def test_what_a_compiled_program_needs():
    """What goes in, what comes out elsewhere, what it works with, and its own code."""
    sizes = {'argument': 1000, 'output': 300, 'alias': 200, 'temp': 50, 'generated_code': 7}
    analysis = types.SimpleNamespace(**{f'{name}_size_in_bytes': size for name, size in sizes.items()})
    assert plan.needed(types.SimpleNamespace(memory_analysis=lambda: analysis)) == 1000 + (300 - 200) + 50 + 7


class TestCompile:
    """With a stand-in for the compiler; a v5e has 16 GiB, and by formula all of this fits."""

    def run(self, tmp_path, monkeypatch, gib):
        """The configs that were compiled; `gib`: (config) -> what one needs, or what the compiler says."""
        asked = []

        def compiled(config, topology):
            asked.append((config.accumulate, config.model.remat, config.mesh.fsdp))
            found = gib(config)
            return found if isinstance(found, str) else Compiled(found)

        monkeypatch.setattr(plan, 'compiled', compiled)
        assert plan.main(['--config', recipe(tmp_path), '--topology', 'v5e:2x4', '--compile']) == 0
        return asked

    def test_fits(self, tmp_path, monkeypatch, capsys):
        assert self.run(tmp_path, monkeypatch, lambda config: 16) == [(1, 'none', 1)]
        shown = capsys.readouterr().out
        assert 'the compiler needs   16.000 GiB per device: fits\n' in shown and 'it fits' not in shown

    def test_does_not_fit(self, tmp_path, monkeypatch, capsys):
        asked = self.run(tmp_path, monkeypatch, lambda config: 40 // config.accumulate)
        assert asked == [(1, 'none', 1), (2, 'none', 1), (4, 'none', 1)]
        shown = capsys.readouterr().out
        assert 'the compiler needs   40.000 GiB per device: does not fit\n' in shown
        assert shown.endswith('it fits with --config.accumulate=4\n')

    def test_the_compiler_gives_up(self, tmp_path, monkeypatch, capsys):
        def gib(config):
            return 9 if config.mesh.fsdp == 8 and config.model.remat == 'full' else 'RESOURCE_EXHAUSTED: 17.5G of 16G'

        asked = self.run(tmp_path, monkeypatch, gib)
        assert asked[-1] == (1, 'full', 8) and len(asked) == 1 + 5 * 2 + 1  # two of each mesh and policy
        shown = capsys.readouterr().out
        assert 'the compiler: RESOURCE_EXHAUSTED: 17.5G of 16G\n' in shown
        words = '--config.model.remat=full --config.mesh.data=1 --config.mesh.fsdp=8'
        assert shown.endswith(f'it fits with {words}\n')

    def test_what_it_says(self, monkeypatch):
        """Out of memory is an answer, everything else an error."""

        def fail(message):
            raise jax.errors.JaxRuntimeError(message)

        for message in ('RESOURCE_EXHAUSTED: Ran out of memory\nin detail', 'INTERNAL: a fault'):
            lowered = types.SimpleNamespace(compile=lambda message=message: fail(message))
            built = types.SimpleNamespace(state=None, batch=lambda size: None)
            built.train_step = types.SimpleNamespace(lower=lambda *_, lowered=lowered: lowered)
            monkeypatch.setattr(plan, 'Program', lambda *_, built=built: built)
            devices = types.SimpleNamespace(devices=jax.devices('cpu'))
            monkeypatch.setattr(plan.topologies, 'get_topology_desc', lambda devices=devices, **_: devices)
            if message.startswith('RESOURCE'):
                assert plan.compiled(CONFIG, 'v5e:2x4') == 'RESOURCE_EXHAUSTED: Ran out of memory'
            else:
                with pytest.raises(jax.errors.JaxRuntimeError, match='INTERNAL'):
                    plan.compiled(CONFIG, 'v5e:2x4')

    def test_nothing_to_compile_with(self, tmp_path, monkeypatch, capsys):
        def missing(**_):
            raise RuntimeError('no libtpu')

        monkeypatch.setattr(plan.topologies, 'get_topology_desc', missing)
        assert plan.main(['--config', recipe(tmp_path), '--topology', 'v5e:2x4', '--compile']) == 3
        error = capsys.readouterr().err
        assert '--compile: cannot compile for v5e:2x4 here: no libtpu (pip install "jax[tpu]")' in error


FORWARD = 1 / 3  # of the FLOPs of training on the same positions
STEPS = {  # FLOPs of a step by part, 1: of an update
    'preference': ({'preference': configs.Preference()}, {'updates': 1, 'reference': FORWARD}),
    'precomputed': ({'preference': configs.Preference(reference='precomputed')}, {'updates': 1}),
    'online': (
        {'online': configs.Online(updates=8)},
        {'updates': 8, 'sampling': FORWARD, 'log-probabilities': FORWARD, 'reference': FORWARD},
    ),
    'without a reference': (
        {'online': configs.Online(algorithm='remax', beta=0.0, completions=2)},
        {'updates': 1, 'sampling': 1.5 * FORWARD, 'log-probabilities': FORWARD},
    ),
}  # fmt: skip


@pytest.mark.parametrize('task, wanted', STEPS.values(), ids=STEPS)
def test_what_a_step_does_besides_its_updates(task, wanted, capsys):
    config = dataclasses.replace(CONFIG, task=configs.Task(name=[*task][0], **task))
    update = abstract().flops()['updates']
    assert abstract(config).flops() == pytest.approx({name: part * update for name, part in wanted.items()})
    plan.plan(config, 'v5e:8', 0.4, compile=False)
    shown = capsys.readouterr().out
    assert f'FLOPs per step      {sum(wanted.values()) * update:.3g}\n' in shown
    assert ('  reference' in shown, 'not counted: rewards' in shown) == ('reference' in wanted, 'sampling' in wanted)

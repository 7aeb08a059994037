"""Runs that learn from generated text: they go on exactly, on any mesh, and lose nothing where a reward fails."""

import functools
import json
import re
import shutil

import numpy as np
import pytest
import rewards
from short_runs import StopAtTwo, exported, lines_of, recipe

from mixln_jax import evaluate, main, replay, trees
from mixln_jax.data import inspect
from mixln_jax.evaluation import generation
from mixln_jax.evaluation.rollouts import Rollouts
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.runs import checkpoint, frozen
from mixln_jax.system.errors import CheckpointError, Stopped, UsageError

METHODS = {
    'rloo': {},
    'grpo, two updates': {'task.online.algorithm': 'grpo', 'task.online.updates': 2, 'accumulate': 2},
    'remax, two updates, KL in the loss': {
        'task.online.algorithm': 'remax', 'task.online.completions': 1, 'task.online.updates': 2,
        'task.online.kl': 'loss', 'optim.ema': 0.5,
    },
    'lora': {'tune.method': 'lora', 'tune.rank': 2, 'tune.dropout': 0.2, 'task.online.updates': 2},
    'no reference': {'task.online.beta': 0.0, 'task.online.temperature': 0.7},
}  # fmt: skip


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """An exported Mix-LN network."""
    return exported(tmp_path_factory.mktemp('exported') / 'base')


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp('prompts') / 'a.jsonl'
    path.write_text(''.join(json.dumps({'prompt': f'{i}+{i % 7}', 'level': i}) + '\n' for i in range(60)))
    return path


def values(prompts, base, **changes):
    given = {
        'init_from': f'hf:{base}', 'task.name': 'online', 'task.online.reward': 'rewards:letters',
        'task.online.completions': 4, 'task.online.max_new_tokens': 6, 'data.template': 'plain', 'data.held_out': 0.4,
        'optim.warmup_ratio': 0.0, 'optim.learning_rate': 0.01, 'eval.samples': 3,
    }  # fmt: skip
    return recipe(prompts, **given | changes)


@pytest.fixture(scope='module')
def finished(prompts, base, tmp_path_factory):
    """Returns the finished run of a method, by its name."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp('runs') / 'run'
        main.run(values(prompts, base, **METHODS[name]), folder)
        return folder

    return made


def bits(workdir):
    """Returns types, shapes and checksums of the last state, by leaf."""
    return checkpoint.read_about(workdir / 'checkpoints/4')['leaves']


@pytest.mark.parametrize(
    'name', [name if name in ('rloo', 'lora') else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_goes_on_exactly(name, prompts, base, finished, tmp_path):
    with pytest.raises(Stopped):
        main.run(values(prompts, base, **METHODS[name]), tmp_path / 'run', stop=StopAtTwo())
    main.run(values(prompts, base, **METHODS[name]), tmp_path / 'run')
    assert lines_of(tmp_path / 'run') == lines_of(finished(name))
    assert bits(tmp_path / 'run') == bits(finished(name))
    for step in (2, 4):
        sample = f'samples/{step}.jsonl'
        assert (tmp_path / 'run' / sample).read_bytes() == (finished(name) / sample).read_bytes()


def test_what_is_recorded(finished):
    lines = lines_of(finished('rloo'))
    names = ('loss', 'reward', 'reward_std', 'kl', 'entropy', 'length', 'ended', 'clipped')
    for part in ('train', 'eval'):
        for name in names:
            found = [line[f'{part}/{name}'] for line in lines if f'{part}/loss' in line]
            assert np.isfinite(found).all() and len(found) == {'train': 4, 'eval': 2}[part]
    assert abs(lines[0]['train/kl']) < 1e-5 < 1e-4 < lines[-1]['train/kl']
    assert 0 < lines[0]['train/length'] <= 6 and lines[0]['train/entropy'] > 4
    assert lines[0]['train/tokens_per_step'] == round(lines[0]['train/length'] * 8)
    assert lines_of(finished('no reference'))[-1]['eval/kl'] is None


def test_samples_are_the_evaluations(finished):
    [*records] = map(json.loads, (finished('rloo') / 'samples/4.jsonl').read_text().splitlines())
    assert len(records) == 3
    for record in records:
        assert {*generation.FIELDS, 'reward', 'level'} == {*record}
        assert rewards.letters([record['completion']]) == [record['reward']]


def test_the_reference_is_kept_once(prompts, base, finished, tmp_path):
    """Under frozen/, for good; checkpoints hold its fingerprint, and go on with no other."""
    start = dict(trees.named_leaves(hf_llama.read(base)[1]))
    for name, leaf in trees.named_leaves(frozen.read_reference(finished('rloo'))):
        np.testing.assert_array_equal(leaf, start[name], err_msg=name)
    about = checkpoint.read_about(finished('rloo') / 'checkpoints/4')
    assert about['frozen'].startswith('+') and not any('reference' in name for name in about['leaves'])
    assert not (finished('no reference') / 'frozen').exists()
    adapted = finished('lora') / 'frozen'
    assert [path.name for path in adapted.iterdir() if path.is_dir()] == ['0']
    with pytest.raises(Stopped):
        main.run(values(prompts, base), tmp_path / 'run', stop=StopAtTwo())
    (tmp_path / 'run/frozen').rename(tmp_path / 'frozen')
    with pytest.raises(CheckpointError, match='frozen is missing'):
        main.run(values(prompts, base), tmp_path / 'run')
    shutil.copytree(finished('lora') / 'frozen', tmp_path / 'run/frozen')
    with pytest.raises(CheckpointError, match='holds other weights'):
        main.run(values(prompts, base), tmp_path / 'run')


def test_inner_updates_are_clipped(finished):
    assert any(line['train/clipped'] > 0 for line in lines_of(finished('remax, two updates, KL in the loss')))


def test_tools_read_the_run(finished, capsys):
    run = finished('rloo')
    wanted = lines_of(run)[-1]
    assert evaluate.main(['--checkpoint', str(run), '--out', str(run / 'results.json')]) == 0
    found = json.loads((run / 'results.json').read_text())
    for name in ('reward', 'kl', 'entropy', 'loss'):
        assert found[f'eval/{name}'] == pytest.approx(wanted[f'eval/{name}'], rel=1e-4)
    rows = [*inspect.inspect(run, 2)]
    assert len(rows) == 2 and all(re.fullmatch(r'\d+\+\d', *row['text']) for row in rows)


def test_replay(prompts, base, finished, tmp_path, monkeypatch, capsys):
    """The rollouts of step 3 with the weights before it have the loss and the gradient of that step."""
    run, collected = tmp_path / 'run', []
    shutil.copytree(finished('rloo'), run)
    shutil.rmtree(run / 'checkpoints/4')
    training = Rollouts.training
    monkeypatch.setattr(Rollouts, 'training', lambda *given: collected.append(training(*given)) or collected[-1])
    main.run(values(prompts, base), run)
    (run / 'debug').mkdir()
    np.savez(run / 'debug/batch_3.npz', **collected[0])
    shutil.copytree(run / 'checkpoints/2', run / 'debug/checkpoints/2')
    capsys.readouterr()
    assert replay.main(['--workdir', str(run)]) == 0
    shown, line = capsys.readouterr().out, lines_of(run)[2]
    assert float(re.search(r'mean (-?[\d.]+)', shown)[1]) == pytest.approx(line['train/loss'], abs=1e-4)
    norms = [float(row.split()[-1]) for row in shown.splitlines() if re.match(r' +\d  ', row)]
    assert norms == pytest.approx(line['layers/grad_norm'], rel=1e-4)


@pytest.mark.parametrize(
    'mesh',
    [pytest.param({'mesh.data': 8}, marks=pytest.mark.slow), {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}],
    ids=str,
)
def test_devices_change_nothing(mesh, prompts, base, finished, tmp_path):
    changes = METHODS['grpo, two updates'] | {'accumulate': 1} | mesh
    main.run(values(prompts, base, **changes), tmp_path / 'run')
    for one, other in zip(lines_of(tmp_path / 'run'), lines_of(finished('grpo, two updates')), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if 'layers' not in name and value is not None:
                assert value == pytest.approx(other[name], rel=1e-5, abs=1e-5), (one['step'], name)
    assert (tmp_path / 'run/samples/4.jsonl').exists()


@pytest.mark.parametrize('value, problem', [(None, 'RuntimeError: no judge'), (np.nan, 'a reward is nan')])
def test_nothing_is_lost_where_a_reward_fails(value, problem, prompts, base, finished, tmp_path, monkeypatch, capsys):
    """Step 3 fails; steps 1 and 2 are saved, and the run goes on exactly once the reward is mended."""
    monkeypatch.setattr(rewards, 'failing', rewards.Failing())
    keys = {'task.online.reward': 'rewards:failing', 'eval.every': 0, 'checkpoint.every': 0, 'eval.samples': 0}
    rewards.failing.at, rewards.failing.value = 3, value
    with pytest.raises(UsageError, match=f'rewards:failing: {problem}.*: prompt .*a.jsonl:.*, completion'):
        main.run(values(prompts, base, **keys), tmp_path / 'run')
    assert 'step 2 is saved' in capsys.readouterr().out
    rewards.failing.at = 0
    main.run(values(prompts, base, **keys), tmp_path / 'run')
    assert 'goes on from step 2' in capsys.readouterr().out
    assert bits(tmp_path / 'run') == bits(finished('rloo'))


def test_completions_that_never_end(prompts, base, tmp_path, capsys):
    main.run(values(prompts, base, num_steps=2, **{'eval.samples': 0}), tmp_path / 'run')
    err = capsys.readouterr().err
    assert err.count('completions of a step did not end within config.task.online.max_new_tokens=6') == 1
    assert lines_of(tmp_path / 'run')[-1]['train/ended'] < 0.5


BAD = {
    'one completion': ({'task.online.completions': 1}, 'config.task.online.completions=1 is too few'),
    'of grpo': ({'task.online.completions': 1, 'task.online.algorithm': 'grpo'}, 'algorithm=grpo, which compares'),
    'division': ({'task.online.completions': 3}, 'config.batch_size=8 is not divisible by config.task.online.comp'),
    'no reward': ({'task.online.reward': ''}, 'needs config.task.online.reward'),
    'no start': ({'init_from': ''}, 'needs config.init_from'),
    'no room': ({'task.online.max_new_tokens': 16}, 'leaves no room for a prompt in config.seq_length=16'),
    'kl': ({'task.online.beta': 0.0, 'task.online.kl': 'loss'}, 'config.task.online.kl=loss has no meaning'),
    'bert': ({'model.family': 'bert', 'model.num_positions': 16, 'eval.samples': 0}, 'that predicts the next token'),
    'compat': ({'compat': 'official'}, 'config.compat=official has no meaning'),
    'packed': ({'data.mode': 'pack'}, 'needs config.data.mode=pad'),
    'plain text': ({'data.source': 'stdlib'}, 'needs config.data.source=jsonl or shelves'),
}  # fmt: skip


@pytest.mark.parametrize('changes, message', BAD.values(), ids=BAD)
def test_keys_that_contradict(changes, message, prompts, base, tmp_path):
    with pytest.raises(UsageError, match=message):
        main.run(values(prompts, base, **changes), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()

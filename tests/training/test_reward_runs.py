"""Runs that learn a reward from pairs: they learn it, go on exactly, with adapters and on any mesh; tools read them."""

import functools
import json

import jax
import numpy as np
import pytest
from short_runs import SIZES, WORDS, StopAtTwo, lines_of, recipe

from mixln_jax import config as configs
from mixln_jax import evaluate, generate, main, trees
from mixln_jax.analysis import drop, subjects
from mixln_jax.models import families
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.runs import checkpoint, weights
from mixln_jax.system.errors import Stopped, UsageError

METHODS = {
    'all': {'optim.learning_rate': 0.03, 'num_steps': 12},
    'packed, accumulated, centred': {'data.mode': 'pack', 'accumulate': 2, 'task.reward.centering': 0.01},
    'lora': {'tune.method': 'lora', 'tune.rank': 2, 'tune.dropout': 0.2, 'tune.base_dtype': 'bfloat16'},
    'lisa': {'tune.method': 'lisa', 'tune.layers': 1, 'tune.interval': 1},
    'some': {'tune.train': 'layers/segment_1/mlp/*'},
}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """An exported Mix-LN network."""
    path = tmp_path_factory.mktemp('exported') / 'base'
    model = families.from_config(configs.Model(norm_position='mix', **SIZES))
    hf_llama.save(path, model, jax.jit(model.init)(jax.random.key(77))['params'])
    return path


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """Pairs of which the answer without capitals is chosen, every third with a margin."""
    path = tmp_path_factory.mktemp('pairs') / 'a.jsonl'
    words = [WORDS[i % len(WORDS)] for i in range(60)]
    records = [{'prompt': f'{i}:', 'chosen': word, 'rejected': word.upper()} for i, word in enumerate(words)]
    records = [record | ({'margin': 0.5} if i % 3 == 0 else {}) for i, record in enumerate(records)]
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def values(pairs, base, **changes):
    given = {
        'init_from': f'hf:{base}', 'task.name': 'reward', 'seq_length': 32, 'data.template': 'plain',
        'data.held_out': 0.4, 'optim.warmup_ratio': 0.0, 'optim.learning_rate': 0.01, 'eval.tokens': 1000,
    }  # fmt: skip
    return recipe(pairs, **given | changes)


@pytest.fixture(scope='module')
def finished(pairs, base, tmp_path_factory):
    """Returns the finished run of a method, by its name."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp('runs') / 'run'
        main.run(values(pairs, base, **METHODS[name]), folder)
        return folder

    return made


@pytest.mark.parametrize('name', [name for name in METHODS if name != 'all'])
def test_goes_on_exactly(name, pairs, base, finished, tmp_path):
    with pytest.raises(Stopped):
        main.run(values(pairs, base, **METHODS[name]), tmp_path / 'run', stop=StopAtTwo())
    main.run(values(pairs, base, **METHODS[name]), tmp_path / 'run')
    assert lines_of(tmp_path / 'run') == lines_of(finished(name))
    one, other = (checkpoint.read_about(run / 'checkpoints/4')['leaves'] for run in (tmp_path / 'run', finished(name)))
    assert one == other


def test_it_learns_pairs_that_were_held_out(finished):
    last = lines_of(finished('all'))[-1]
    assert last['eval/accuracy'] > 0.95 and last['eval/margin'] > 1 and last['eval/loss'] < 0.4
    assert last['eval/reward_std'] > last['eval/margin'] / 2 * 0.9


@pytest.mark.parametrize('name', ['lora', 'lisa', 'some'])
def test_the_head_is_drawn_and_trained(name, base, finished):
    """It is in the state that is trained, and moves; what it is drawn as does not depend on the method."""
    run = finished(name)
    config = configs.read(run / 'config.json')
    model = families.from_config(config.model, num_outputs=config.task.num_outputs)
    drawn = model.init(jax.random.key(config.seed))['params']['score']['kernel']
    found = weights.load(run)
    assert found.params['score']['kernel'].shape == drawn.shape == (16, 1) and 'head' not in found.params
    assert np.abs(found.params['score']['kernel'] - drawn).max() > 1e-3
    start = dict(trees.named_leaves(hf_llama.read(base)[1]))
    initial = subjects._initial(found, None)
    np.testing.assert_allclose(initial['score']['kernel'], drawn, rtol=1e-6)
    for leaf_name, leaf in trees.named_leaves(initial):
        if leaf_name != 'score/kernel':
            np.testing.assert_array_equal(leaf, start[leaf_name], err_msg=leaf_name)


@pytest.mark.parametrize(
    'mesh',
    [pytest.param({'mesh.data': 4}, marks=pytest.mark.slow), {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}],
    ids=str,
)
def test_devices_change_nothing(mesh, pairs, base, finished, tmp_path):
    name = 'packed, accumulated, centred'
    main.run(values(pairs, base, **METHODS[name] | {'accumulate': 1} | mesh), tmp_path / 'run')
    for one, other in zip(lines_of(tmp_path / 'run'), lines_of(finished(name)), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[key], rel=1e-4, abs=1e-4), key


def test_tools_read_the_run(finished, capsys):
    run = finished('packed, accumulated, centred')
    wanted = lines_of(run)[-1]
    assert evaluate.main(['--checkpoint', str(run), '--out', str(run / 'results.json')]) == 0
    results = json.loads((run / 'results.json').read_text())
    for name in ('loss', 'accuracy', 'margin', 'reward', 'reward_std'):
        assert results[f'eval/{name}'] == pytest.approx(wanted[f'eval/{name}'], rel=1e-4)
    assert drop.main(['--checkpoint', str(run), '--batch_size', '4', '--tokens', '40', '--steps', 'init,4']) == 0
    assert generate.main(['--checkpoint', str(run), '--prompt', 'a']) == 5
    assert 'has a head of size 1' in capsys.readouterr().err


def test_a_reward_network_goes_on_as_one_alone(pairs, base, finished, tmp_path, capsys):
    main.run(values(pairs, base, init_from=str(finished('all')), num_steps=1), tmp_path / 'run')
    assert lines_of(tmp_path / 'run')[0]['train/accuracy'] > 0.9  # its head was kept
    assert 'the head, of size 1, is new' not in capsys.readouterr().out
    with pytest.raises(UsageError, match='its network has a head of size 1, this one has a head for words'):
        main.run(values(pairs, base, **{'init_from': str(finished('all')), 'task.name': 'preference'}), tmp_path / 'no')


KEYS = {
    'bert': ({'model.family': 'bert', 'model.num_positions': 32}, 'needs a network that predicts the next token'),
    'samples': ({'eval.samples': 2}, 'config.eval.samples=2 has no meaning'),
    'too short': ({'seq_length': 3}, 'config.seq_length=3 is too short for a pair: at least 4'),
    'concat': ({'data.mode': 'concat'}, 'config.task.name=reward needs config.data.mode=pad or pack, not concat'),
    'centering': ({'task.reward.centering': -1.0}, 'config.task.reward.centering'),
}  # fmt: skip


@pytest.mark.parametrize('changes, words', KEYS.values(), ids=KEYS)
def test_keys_that_contradict(changes, words, pairs, base, tmp_path):
    with pytest.raises(UsageError, match=words):
        main.run(values(pairs, base, **changes), tmp_path / 'run')

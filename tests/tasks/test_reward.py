"""Reward models: losses against TRL's, rewards text by text, packed and padded rows, placements, meshes."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import KINDS, PLACEMENTS, network, smaller

from mixln_jax import config as configs
from mixln_jax.data import chat, pair_records, pairs, tokenizers
from mixln_jax.distributed import mesh as meshes
from mixln_jax.tasks.reward import Reward, pair_losses
from mixln_jax.tasks.task import Context

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'golden/trl/preference.json').read_text())
BYTES = tokenizers.Bytes()
T = 40


@pytest.mark.parametrize('name', ['reward', 'reward_margin_centre'])
def test_losses_and_gradients_are_trls(name):
    scores, half = jnp.float32(GOLDEN['scores']), len(GOLDEN['scores']) // 2
    options = {'margins': jnp.float32(GOLDEN['margin']), 'centering': GOLDEN['centre']} if 'margin' in name else {}
    loss = lambda scores: pair_losses(scores[:half], scores[half:], **options).mean()  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(scores)
    assert float(value) == pytest.approx(GOLDEN[name]['loss'], abs=1e-6)
    np.testing.assert_allclose(gradient, np.float32(GOLDEN[name]['gradient']), atol=1e-6)


@functools.cache
def made(mode, count=6):
    """Rows of pairs of random letters, every second of them with a margin."""
    rng = np.random.default_rng(0)
    text = lambda most: ''.join('abcdefghij'[i] for i in rng.integers(0, 10, rng.integers(1, most)))  # noqa: E731
    given = []
    for number in range(count):
        record = {'prompt': text(5), 'chosen': text(9), 'rejected': text(9)}
        record |= {'margin': 0.5 * number} if number % 2 else {}
        given.append(pair_records.from_record(record, str(number)))
    return pairs.PairsWithMargins(given, chat.open_template('plain', BYTES), BYTES, mode, T)


def task(norm_position='mix', mode='pad', centering=0.05, **changes):
    model, params = network(norm_position, vocab_size=259, num_outputs=1, **changes)
    return Reward(model, 'pack', T, pairs.num_pairs(mode, T), configs.Reward(centering)), params


def batch_of(mode, numbers=None):
    rows = made(mode)
    return {name: jnp.asarray(v) for name, v in rows.batch(numbers or range(len(rows))).items()}


def measured(ours, params, batch):
    """(loss, gradient, Losses) over pairs."""

    def loss(params):
        found = ours.losses(params, batch, Context(train=True))
        return found.sum / found.weight, found

    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(value), gradient, found


def assert_same(gradient, expected):
    """Raises AssertionError unless they differ by less than 1e-5 of the largest entry."""
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert largest > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), gradient, expected)


def alone(rows):
    """(ids [2N, T], last [2N]) of the texts, each in a row of its own, which zeros fill up."""
    ids, last = np.zeros((2 * rows.num_pairs, T), np.int32), rows.lengths.reshape(-1) - 1
    for number, row in enumerate(ids):
        start, end = rows._bounds[number : number + 2]
        row[: end - start] = rows._ids[start:end]
    return ids, last


@pytest.mark.parametrize('norm_position', ['mix', 'pre'])
@pytest.mark.parametrize('kind', ['', 'tied'])
def test_against_each_text_alone(norm_position, kind):
    """The hidden state of the last token times the head; numbers of the records in float64."""
    ours, params = task(norm_position, **KINDS.get(kind, {}))
    assert params['score']['kernel'].shape == (8, 1) and 'head' not in params
    ids, last = alone(made('pad'))
    margins = jnp.float32([0, 0.5, 0, 1.5, 0, 2.5])

    def rewards(params):
        x, _ = ours.model.apply({'params': params}, ids, method='backbone')
        return (x[np.arange(len(ids)), last] @ params['score']['kernel'][:, 0]).reshape(-1, 2).T

    def expected(params):
        chosen, rejected = rewards(params)
        losses = jnp.log1p(jnp.exp(-(chosen - rejected - margins))) + 0.05 * (chosen + rejected) ** 2
        return losses.mean()

    value, gradient, found = measured(ours, params, batch_of('pad'))
    wanted, wanted_gradient = jax.jit(jax.value_and_grad(expected))(params)
    assert value == pytest.approx(float(wanted), rel=1e-5)
    assert_same(gradient, wanted_gradient)
    totals = {'sum': found.sum, 'weight': found.weight} | found.metrics
    values = ours.summary({name: float(total) for name, total in totals.items()})
    scores = np.float64(rewards(params))
    numbers = {
        'loss': float(wanted), 'accuracy': (scores[0] > scores[1]).mean(), 'margin': (scores[0] - scores[1]).mean(),
        'reward': scores.mean(), 'reward_std': scores.std(),
    }  # fmt: skip
    assert values.keys() == numbers.keys()
    for name, number in numbers.items():
        assert values[name] == pytest.approx(number, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize('norm_position', PLACEMENTS)
def test_packed_is_padded(norm_position):
    found = {}
    for mode in ('pad', 'pack'):
        ours, params = task(norm_position, mode)
        found[mode] = measured(ours, smaller(params), batch_of(mode))
    assert len(made('pack')) < len(made('pad')) and float(found['pad'][2].weight) == 6
    assert found['pad'][0] == pytest.approx(found['pack'][0], rel=1e-5)
    assert_same(found['pad'][1], found['pack'][1])
    for name, value in found['pad'][2].metrics.items():
        np.testing.assert_allclose(value, found['pack'][2].metrics[name], rtol=1e-4, err_msg=name)


def test_masked_rows_change_nothing():
    ours, params = task()
    batch = batch_of('pad', [0, 1, 2, 3])
    one = measured(ours, params, batch | {'loss_mask': batch['loss_mask'].at[2:].set(0)})
    other = measured(ours, params, batch_of('pad', [0, 1]))
    assert one[0] == pytest.approx(other[0], rel=1e-6) and float(one[2].weight) == 2
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('sizes', [dict(data=4, fsdp=2), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_eight_devices_are_one(sizes):
    ours, params = task('mix', 'pack')
    batch = {name: jnp.concatenate([values] * 4)[:8] for name, values in batch_of('pack').items()}
    one = measured(ours, params, batch)
    mesh = meshes.make_mesh(configs.Mesh(**sizes), jax.devices('cpu'))
    rows = meshes.batch_sharding(mesh)
    split = Reward(ours.model.clone(stream_sharding=rows), 'pack', T, ours.per_row, ours.reward)
    other = measured(split, jax.device_put(params, meshes.state_shardings(mesh, params)), jax.device_put(batch, rows))
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert_same(one[1], other[1])


def test_by_hand():
    logistic = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    found = pair_losses(jnp.float32([3.0, -1.0]), jnp.float32([-2.0, 1.0]), jnp.float32([1.0, 0.0]), 0.1)
    wanted = [-math.log(logistic(4)) + 0.1, -math.log(logistic(-2))]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize('margin', ['high', True, [1], 1e9])
def test_margins_that_are_no_number(margin):
    record = {'prompt': 'a', 'chosen': 'b', 'rejected': 'c', 'margin': margin}
    given, template = [pair_records.from_record(record, 'a.jsonl:3')], chat.open_template('plain', BYTES)
    with pytest.raises(pairs.DataError, match='a.jsonl:3: margin'):
        pairs.PairsWithMargins(given, template, BYTES, 'pad', T)
    assert len(pairs.Pairs(given, template, BYTES, 'pad', T)) == 1  # it means nothing to others

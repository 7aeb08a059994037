"""Preferences: losses against TRL's and by hand, packed and padded rows, the reference, placements, meshes."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import PLACEMENTS, network, smaller

from mixln_jax import config as configs
from mixln_jax.data import chat, pair_records, pairs, tokenizers
from mixln_jax.distributed import mesh as meshes
from mixln_jax.tasks.preference import Preference, pair_losses
from mixln_jax.tasks.task import Context

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'golden/trl/preference.json').read_text())
BYTES = tokenizers.Bytes()
T = 40


@pytest.mark.parametrize('name', ['sigmoid', 'ipo', 'sigmoid_norm'])
def test_losses_and_gradients_are_trls(name):
    log_probs, reference, mask = (np.float32(GOLDEN[part]) for part in ('log_probs', 'reference', 'mask'))
    lengths, half = mask.sum(1), len(mask) // 2

    def loss(log_probs):
        ratios = ((log_probs - reference) * mask).sum(1)
        keys = configs.Preference(loss=name, beta=GOLDEN['beta'])
        return pair_losses(ratios[:half], ratios[half:], lengths[:half], lengths[half:], keys).mean()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(log_probs))
    assert float(value) == pytest.approx(GOLDEN[name]['loss'], abs=1e-6)
    np.testing.assert_allclose(gradient, np.float32(GOLDEN[name]['gradient']), atol=1e-6)


def test_smoothed_by_hand():
    keys = configs.Preference(beta=0.5, label_smoothing=0.2)
    found = pair_losses(*(jnp.float32(value) for value in (3.0, -1.0, 2, 5)), keys)
    logistic = lambda z: 1 / (1 + math.exp(-z))  # noqa: E731
    assert float(found) == pytest.approx(-0.8 * math.log(logistic(2)) - 0.2 * math.log(logistic(-2)), abs=1e-6)


@functools.cache
def made(mode, count=6):
    """Rows of pairs of random letters."""
    rng = np.random.default_rng(0)
    text = lambda most: ''.join('abcdefghij'[i] for i in rng.integers(0, 10, rng.integers(1, most)))  # noqa: E731
    given = [pair_records.from_texts(text(5), text(9), text(9), str(i)) for i in range(count)]
    return pairs.Pairs(given, chat.open_template('plain', BYTES), BYTES, mode, T)


def task(norm_position='mix', mode='pad', **changes):
    model, params = network(norm_position, vocab_size=259)
    return Preference(model, 'pack', T, pairs.num_pairs(mode, T), configs.Preference(**changes)), params


def moved(params, seed=1):
    """The weights, each a little elsewhere."""
    keys = iter(jax.random.split(jax.random.key(seed), 1000))
    return jax.tree.map(lambda leaf: leaf + 0.02 * jax.random.normal(next(keys), leaf.shape), params)


def batch_of(mode, numbers=None):
    rows = made(mode)
    return {name: jnp.asarray(v) for name, v in rows.batch(numbers or range(len(rows))).items()}


def measured(ours, params, reference, batch):
    """(loss, gradient, metrics) over pairs."""

    def loss(params):
        found = ours.losses(params, batch, Context(train=True, reference=reference))
        return found.sum / found.weight, found

    (value, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return float(value), gradient, found


def assert_same(gradient, expected):
    """Raises AssertionError unless they differ by less than 1e-5 of the largest entry."""
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert largest > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), gradient, expected)


@pytest.mark.parametrize('norm_position', PLACEMENTS)
def test_at_the_start_the_loss_is_log_2(norm_position):
    ours, params = task(norm_position)
    value, _, found = measured(ours, params, params, batch_of('pad'))
    assert value == pytest.approx(math.log(2), abs=1e-6)
    assert float(found.weight) == 6 and float(found.metrics['kl']) < 1e-9


@pytest.mark.parametrize('norm_position', ['mix', 'pre'])
@pytest.mark.parametrize('loss', ['sigmoid', 'ipo', 'sigmoid_norm'])
def test_against_plain_log_softmax(norm_position, loss):
    """Each text alone in its row, the log-softmax of all logits."""
    ours, params = task(norm_position, loss=loss)
    policy, rows = moved(params), made('pad')

    ids, learned = np.zeros((2 * len(rows), T + 1), np.int32), np.zeros((2 * len(rows), T + 1), np.float32)
    for number in range(2 * len(rows)):  # chosen and rejected in turn; what fills a row up comes after all that counts
        start, end = rows._bounds[number : number + 2]
        ids[number, : end - start], learned[number, : end - start] = rows._ids[start:end], rows._learned[start:end]

    def log_probs(params):
        logits, _ = ours.model.apply({'params': params}, ids[:, :-1])
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], 2)[..., 0]
        return (found * learned[:, 1:]).sum(1).reshape(-1, 2)

    def expected(policy):
        ratios, counts = log_probs(policy) - log_probs(params), learned[:, 1:].sum(1).reshape(-1, 2)
        return pair_losses(*ratios.T, *counts.T, ours.preference).mean()

    value, gradient, _ = measured(ours, policy, params, batch_of('pad'))
    wanted, wanted_gradient = jax.jit(jax.value_and_grad(expected))(policy)
    assert value == pytest.approx(float(wanted), rel=1e-5)
    assert_same(gradient, wanted_gradient)


@pytest.mark.parametrize('norm_position', PLACEMENTS)
def test_packed_is_padded(norm_position):
    found = {}
    for mode in ('pad', 'pack'):
        ours, params = task(norm_position, mode)
        params = smaller(params)
        found[mode] = measured(ours, moved(params), params, batch_of(mode))
    assert len(made('pack')) < len(made('pad'))
    assert found['pad'][0] == pytest.approx(found['pack'][0], rel=1e-5)
    assert_same(found['pad'][1], found['pack'][1])
    for name, value in found['pad'][2].metrics.items():
        np.testing.assert_allclose(value, found['pack'][2].metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_masked_rows_change_nothing():
    ours, params = task()
    batch = batch_of('pad', [0, 1, 2, 3])
    masked = batch | {'loss_mask': batch['loss_mask'].at[2:].set(0)}
    one = measured(ours, moved(params), params, masked)
    other = measured(ours, moved(params), params, batch_of('pad', [0, 1]))
    assert one[0] == pytest.approx(other[0], rel=1e-6) and float(one[2].weight) == 2
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('sizes', [dict(data=4, fsdp=2), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_eight_devices_are_one(sizes):
    ours, params = task('mix', 'pack')
    batch = {name: jnp.concatenate([values] * 4)[:8] for name, values in batch_of('pack').items()}
    one = measured(ours, moved(params), params, batch)
    mesh = meshes.make_mesh(configs.Mesh(**sizes), jax.devices('cpu'))
    rows = meshes.batch_sharding(mesh)
    split = Preference(ours.model.clone(stream_sharding=rows), 'pack', T, ours.per_row, ours.preference)
    put = lambda tree: jax.device_put(tree, meshes.state_shardings(mesh, tree))  # noqa: E731
    other = measured(split, put(moved(params)), put(params), jax.device_put(batch, rows))
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert_same(one[1], other[1])


def test_summary():
    ours, params = task()
    _, _, found = measured(ours, moved(params), params, batch_of('pad'))
    totals = {'sum': found.sum, 'weight': found.weight} | found.metrics
    values = ours.summary({name: float(value) for name, value in totals.items()})
    assert set(values) == {'loss', 'accuracy', 'margin', 'chosen_log_prob', 'rejected_log_prob', 'kl'}
    assert 0 <= values['accuracy'] <= 1 and values['kl'] > 0 > values['chosen_log_prob']


def test_what_is_recorded_by_hand():
    """Against the log-softmax of all logits, text by text."""
    ours, params = task(beta=0.3)
    policy, batch = moved(params), batch_of('pad')
    _, _, found = measured(ours, policy, params, batch)

    def log_probs(params):
        logits, _ = ours.model.apply({'params': params}, batch)
        tokens = jnp.take_along_axis(jax.nn.log_softmax(logits[..., :259]), batch['targets'][..., None], -1)[..., 0]
        return np.float64(tokens * batch['loss_mask'])

    own, ratios = log_probs(policy), log_probs(policy) - log_probs(params)
    chosen, rejected = (batch['segment_ids'] == side for side in (1, 2))
    margins = 0.3 * ((ratios * chosen).sum(1) - (ratios * rejected).sum(1))
    wanted = {
        'tokens': batch['loss_mask'].sum(), 'accuracy': (margins > 0).sum(), 'margin': margins.sum(),
        'chosen_log_prob': (own * chosen).sum(), 'rejected_log_prob': (own * rejected).sum(),
        'kl': (ratios**2).sum() / 4,
    }  # fmt: skip
    for name, value in wanted.items():
        assert float(found.metrics[name]) == pytest.approx(float(value), rel=1e-4, abs=1e-5), name

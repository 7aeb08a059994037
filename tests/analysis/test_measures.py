"""Measures of layers against float64 and cases done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.analysis import statistics
from mixln_jax.models import families, transformer
from mixln_jax.tasks import language

MODEL = configs.Model(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2, norm_position='post,pre*2'
)


def test_angles():
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 50, 64)).astype(np.float32)
    assert np.all(statistics.angular_distance(u, 4 * u) == 0)
    assert np.all(statistics.angular_distance(u, -u) == 1)
    np.testing.assert_allclose(statistics.angular_distance(u, 3 * u), 0, atol=1e-7)
    assert statistics.angular_distance(np.eye(4)[0], np.eye(4)[2]) == 0.5
    np.testing.assert_allclose(statistics.angular_distance(u, v), reference.angular_distance(u, v), rtol=0, atol=1e-6)
    near = u + 1e-4 * v
    np.testing.assert_allclose(statistics.angular_distance(u, near), reference.angular_distance(u, near), rtol=1e-2)


def test_layer_norms():
    model = families.from_config(MODEL, 'float32')
    params = jax.jit(model.init)(jax.random.key(0))['params']
    layers, whole = trees.layer_norms(params)
    singles = transformer.split_layers(params['layers'], model.norm_position)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))  # noqa: E731
    np.testing.assert_allclose(layers, [norm(layer) for layer in singles], rtol=1e-6)
    np.testing.assert_allclose(whole, norm(params), rtol=1e-6)


def test_distance_matrix():
    """Between any two depths, over real tokens alone; element by element as the reference has it."""
    hidden = np.random.default_rng(1).normal(size=(4, 2, 6, 8)).astype(np.float32)
    hidden[2] = hidden[1]  # a layer that does nothing
    hidden[3] = -hidden[0]
    weights = np.ones((2, 6))
    weights[0, 3:] = 0
    sums = statistics.distance_matrix(jnp.asarray(hidden), weights)
    assert sums.shape == (2, 4, 4)
    matrix = statistics.mean_and_error(sums, weights.sum(-1))['mean']
    assert matrix[1, 2] == 0 and matrix[0, 3] == matrix[3, 0] == 1
    for a in range(4):
        for b in range(4):
            expected = reference.angular_distance(hidden[a], hidden[b])[weights.astype(bool)].mean()
            assert matrix[a, b] == pytest.approx(expected, abs=1e-6)


def test_unigram_entropy():
    """Of a fair coin and a fair die by hand; a small sample of a uniform law is not far below its entropy."""
    assert language.unigram_entropy([1e9, 1e9]) == pytest.approx(np.log(2))
    assert language.unigram_entropy([2, 0, 2, 0]) == pytest.approx(np.log(2) + 1 / 8)
    counts = np.bincount(np.random.default_rng(0).integers(0, 1000, 5000), minlength=2000)
    assert language.unigram_entropy(counts) == pytest.approx(np.log(1000), abs=0.01)


def test_a_vector_of_zeros():
    """What a frozen row of an embedding gives: no direction, and no NaN."""
    zero, one = jnp.zeros(4), jnp.eye(4)[0]
    assert statistics.angular_distance(zero, zero) == 0 and statistics.angular_distance(zero, one) == 0.5


def test_variance_and_contribution_by_hand():
    """Two positions of width 4, the second does not count in row 1; variance over features, ratio of norms."""
    hidden = jnp.asarray([[[[1, 1, 1, 1], [1, -1, 1, -1]]], [[[3, 1, 3, 1], [2, -2, 2, -2]]]], jnp.float32)
    one, both = np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]])
    assert statistics.stream_variance(hidden, one).tolist() == [[0, 1]]
    assert statistics.stream_variance(hidden, both).tolist() == [[1, 5]]
    branches = {
        'norm': jnp.asarray([[[[1.0, 6.0]], [[3.0, 2.0]]]]),
        'stream_norm': jnp.asarray([[[[2.0, 2.0]], [[4.0, 0.0]]]]),
    }
    assert statistics.contribution(branches, one).tolist() == [[[0.5, 0.75]]]
    assert statistics.contribution(branches, both)[0, 0, 0] == 3.5


def test_standard_errors():
    """Of equal rows the textbook's; of unequal ones as a jackknife over rows has it, to second order."""
    rng = np.random.default_rng(2)
    sums = rng.normal(3, 1, (40, 2))
    found = statistics.mean_and_error(sums, np.full(40, 5))
    np.testing.assert_allclose(found['mean'], sums.mean(0) / 5)
    np.testing.assert_allclose(found['standard_error'], sums.std(0, ddof=1) / 5 / np.sqrt(40))
    counts = rng.integers(1, 9, 40)
    sums *= counts[:, None]
    found = statistics.mean_and_error(np.append(sums, [[9, 9]], 0), np.append(counts, 0))  # padding
    np.testing.assert_allclose(found['mean'], sums.sum(0) / counts.sum())
    left_out = np.array([np.delete(sums, at, 0).sum(0) / np.delete(counts, at).sum() for at in range(40)])
    jackknife = np.sqrt(39 / 40 * np.square(left_out - left_out.mean(0)).sum(0))
    np.testing.assert_allclose(found['standard_error'], jackknife, rtol=0.05)
    assert np.isnan(statistics.mean_and_error(sums[:1], counts[:1])['standard_error']).all()


def test_drops():
    """Of perplexity exp(without) less exp(with); errors of paired rows, for perplexity against a jackknife."""
    rng = np.random.default_rng(3)
    counts = rng.integers(50, 90, 60)
    whole = rng.normal(2, 0.3, 60) * counts
    without = whole * 1.1 + rng.normal(0, 1, 60)
    sums = np.stack([whole, whole, without], -1)
    found = statistics.drops(sums, counts, {'perplexity': (np.exp, np.exp), 'bits': (lambda x: x / 2, lambda x: 0.5)})
    loss, other = whole.sum() / counts.sum(), without.sum() / counts.sum()
    assert found['loss']['value'] == pytest.approx(loss)
    assert found['perplexity']['value'] == pytest.approx(np.exp(loss))
    np.testing.assert_allclose(found['loss']['drop']['mean'], [0, other - loss])
    np.testing.assert_allclose(found['perplexity']['drop']['mean'], [0, np.exp(other) - np.exp(loss)])
    left_out = np.exp([np.delete(sums, at, 0).sum(0) / np.delete(counts, at).sum() for at in range(60)])
    jackknife = lambda values: np.sqrt(59 / 60 * np.square(values - values.mean()).sum())  # noqa: E731
    drop = found['perplexity']['drop']['standard_error']
    assert drop[0] == 0 and drop[1] == pytest.approx(jackknife(left_out[:, 2] - left_out[:, 0]), rel=0.05)
    assert found['perplexity']['standard_error'] == pytest.approx(jackknife(left_out[:, 0]), rel=0.05)
    np.testing.assert_allclose(found['bits']['drop']['mean'], found['loss']['drop']['mean'] / 2)
    np.testing.assert_allclose(found['bits']['drop']['standard_error'], found['loss']['drop']['standard_error'] / 2)
    assert set(statistics.drops(sums, counts)) == {'loss'}


def test_theory_of_the_variance():
    """A stream that grows by the rule gives the rule's constant back; after Post-LN layers it begins anew."""
    c, factors = 0.7, np.array([np.nan, np.nan, 1.0, 0.5, 0.25])
    variances = [9.0, 1.0, 2.0]
    for factor in factors[2:]:
        variances.append(variances[-1] * (1 + c * factor / np.sqrt(variances[-1])))
    line, found = statistics.variance_theory(variances, factors)
    assert found == pytest.approx(c, rel=0.003)
    assert np.isnan(line[:2]).all()
    np.testing.assert_allclose(line[2:], variances[2:], rtol=0.003)
    line, _ = statistics.variance_theory([0.001, 2, 3, 4], np.ones(3))
    assert np.isnan(line[0]) and line[1] == 2  # not at the embedding
    for nothing in ([np.nan] * 3, [1.0, np.nan, np.nan]):
        line, found = statistics.variance_theory([1.0, 2.0, 3.0, 4.0], nothing)
        assert np.isnan(line).all() and np.isnan(found)


def test_matrix_norms():
    model = families.from_config(MODEL, 'float32')
    params = jax.jit(model.init)(jax.random.key(1))['params']
    found = trees.matrix_norms(params)
    singles = transformer.split_layers(params['layers'], model.norm_position)
    assert len(found) == 7 + 3
    for name in ('attention/q', 'mlp/down'):
        group, matrix = name.split('/')
        expected = [np.linalg.norm(layer[group][matrix]['kernel']) for layer in singles]
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    np.testing.assert_allclose(found['embed'], np.linalg.norm(params['embed']['embedding']), rtol=1e-6)

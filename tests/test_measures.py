"""Measures of layers against float64 and cases done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mixln_jax import config as configs
from mixln_jax import measures
from mixln_jax.models import llama, transformer

MODEL = configs.Model(
    vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2, norm_position='post,pre*2'
)


def test_angles():
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, 50, 64)).astype(np.float32)
    assert np.all(measures.angular_distance(u, 4 * u) == 0)
    assert np.all(measures.angular_distance(u, -u) == 1)
    np.testing.assert_allclose(measures.angular_distance(u, 3 * u), 0, atol=1e-7)
    assert measures.angular_distance(np.eye(4)[0], np.eye(4)[2]) == 0.5
    np.testing.assert_allclose(measures.angular_distance(u, v), reference.angular_distance(u, v), rtol=0, atol=1e-6)
    near = u + 1e-4 * v
    np.testing.assert_allclose(measures.angular_distance(u, near), reference.angular_distance(u, near), rtol=1e-2)


def test_padding_does_not_count():
    hidden = np.random.default_rng(0).normal(size=(4, 2, 6, 8)).astype(np.float32)
    weights = np.ones((2, 6))
    weights[1, 4:] = 0
    total, count = measures.neighbour_distances(jnp.asarray(hidden), weights)
    expected = reference.angular_distance(hidden[:-1], hidden[1:])[:, weights.astype(bool)].mean(axis=1)
    np.testing.assert_allclose(total / count, expected, rtol=1e-6)


def test_layer_norms():
    model = llama.from_config(MODEL, 'float32')
    params = jax.jit(model.init)(jax.random.key(0))['params']
    layers, whole = measures.layer_norms(params)
    singles = transformer.split_layers(params['layers'], model.norm_position)
    norm = lambda tree: np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(tree)))  # noqa: E731
    np.testing.assert_allclose(layers, [norm(layer) for layer in singles], rtol=1e-6)
    np.testing.assert_allclose(whole, norm(params), rtol=1e-6)


def test_distance_matrix():
    """Between any two depths, over real tokens alone; element by element as the reference has it."""
    hidden = np.random.default_rng(1).normal(size=(4, 2, 6, 8)).astype(np.float32)
    hidden[2] = hidden[1]  # a layer that does nothing
    weights = np.ones((2, 6))
    weights[0, 3:] = 0
    total, count = measures.distance_matrix(jnp.asarray(hidden), weights)
    matrix = np.asarray(total / count)
    for a in range(4):
        for b in range(4):
            expected = reference.angular_distance(hidden[a], hidden[b])[weights.astype(bool)].mean()
            assert matrix[a, b] == pytest.approx(0 if hidden[a] is hidden[b] else expected, abs=1e-6)
    assert matrix[1, 2] == 0 == matrix[3, 3]
    neighbours, _ = measures.neighbour_distances(jnp.asarray(hidden), weights)
    np.testing.assert_allclose(np.diagonal(total, 1), neighbours, rtol=1e-6)


def test_unigram_entropy():
    """Of a fair coin and a fair die by hand; a small sample of a uniform law is not far below its entropy."""
    assert measures.unigram_entropy([1e9, 1e9]) == pytest.approx(np.log(2))
    assert measures.unigram_entropy([2, 0, 2, 0]) == pytest.approx(np.log(2) + 1 / 8)
    counts = np.bincount(np.random.default_rng(0).integers(0, 1000, 5000), minlength=2000)
    assert measures.unigram_entropy(counts) == pytest.approx(np.log(1000), abs=0.01)


def test_a_vector_of_zeros():
    """What a frozen row of an embedding gives: no direction, and no NaN."""
    zero, one = jnp.zeros(4), jnp.eye(4)[0]
    assert measures.angular_distance(zero, zero) == 0 and measures.angular_distance(zero, one) == 0.5

"""Attention in blocks against all of it at once, in float64 by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax.kernels import attention
from mixln_jax.models import families, rope
from mixln_jax.program import program


def reference(q, k, v, mask, dy):
    """softmax(q k^T) v and the gradients of <it, dy>, float64: y, dq, dk, dv."""
    groups = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, groups, axis=2), np.repeat(v, groups, axis=2)
    seen = np.tril(np.ones((q.shape[1],) * 2, bool)) & mask
    scores = np.where(seen, np.einsum('bthd,bshd->bhts', q, k), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum('bthd,bshd->bhts', dy, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    shared = lambda a: a.reshape(*a.shape[:2], -1, groups, a.shape[3]).sum(3)  # noqa: E731
    return (
        np.einsum('bhts,bshd->bthd', p, v),
        np.einsum('bhts,bshd->bthd', ds, k),
        shared(np.einsum('bhts,bthd->bshd', ds, q)),
        shared(np.einsum('bhts,bthd->bshd', p, dy)),
    )


@pytest.mark.parametrize('T', [1, 127, 128, 129, 300, 601])
@pytest.mark.parametrize('heads, kv_heads, documents', [(2, 2, 1), (4, 2, 3), (4, 1, 1)])
def test_blocks_are_the_whole(T, heads, kv_heads, documents):
    rng = np.random.default_rng(T)
    q, dy = rng.normal(size=(2, 2, T, heads, 8))
    k, v = rng.normal(size=(2, 2, T, kv_heads, 8))
    segment_ids = np.sort(rng.integers(documents, size=(2, T)))
    mask = attention.document_mask(segment_ids) if documents > 1 else None
    expected = reference(q, k, v, segment_ids[:, None, :, None] == segment_ids[:, None, None, :], dy)

    @jax.jit
    def ours(q, k, v, dy):
        y, pull = jax.vjp(lambda *qkv: attention.causal_attention(*qkv, mask), q, k, v)
        return y, *pull(dy)

    def check(*arguments):
        with jax.default_matmul_precision('highest'):
            got = ours(*(a.astype(np.float32) for a in arguments))
        for one, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=3e-6 * np.abs(other).max())

    check(q, k, v, dy)
    with pytest.raises(AssertionError):
        check(q, k, v + 1e-2 * (np.arange(T) == T - 1)[:, None, None], dy)


def test_keys_that_nobody_in_a_block_sees_are_not_touched():
    """Half of the scores and a half block more, over four blocks."""
    T = 512
    shape = jax.ShapeDtypeStruct((1, T, 1, 32), np.float32)
    compiled = jax.jit(attention.causal_attention).lower(shape, shape, shape).compile()
    whole = 2 * 2 * T * T * 32
    assert 0.625 * whole < compiled.cost_analysis()['flops'] < 0.75 * whole


def test_large_scores_give_no_infinity():
    q = np.full((1, 100, 1, 4), 1e4, np.float32)
    y, pull = jax.vjp(lambda q: attention.causal_attention(q, q, np.ones(q.shape, q.dtype)), q)
    np.testing.assert_allclose(y, 1, rtol=1e-6)
    assert np.isfinite(pull(np.ones_like(q))[0]).all()


def test_cudnn_is_asked_for_the_same(monkeypatch):
    """With JAX's own implementation in the place of cuDNN's, which no CPU has."""
    theirs = jax.nn.dot_product_attention

    def replaced(*arguments, implementation, **others):
        assert implementation == 'cudnn'
        return theirs(*arguments, implementation='xla', **others)

    monkeypatch.setattr(jax.nn, 'dot_product_attention', replaced)
    q, k, v = (np.random.default_rng(0).normal(size=(2, 200, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    mask = attention.document_mask(np.repeat([[0, 1]], 2, axis=0).repeat(100, axis=1))
    for seen in (None, mask):
        one, other = (f(q, k, v, seen) for f in (attention.cudnn_attention, attention.causal_attention))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    assert np.abs(one - attention.causal_attention(q, k, v)).max() > 1e-2


@pytest.mark.parametrize(
    'capability, changes, sizes, kernel',
    [
        ('9.0', {}, {}, 'cudnn'),
        ('10.3', {}, {}, 'cudnn'),
        ('8.0', {}, {'num_heads': 6}, 'cudnn'),  # heads of 128
        ('7.5', {}, {}, 'blocks'),
        ('gfx942', {}, {}, 'blocks'),
        (None, {}, {}, 'blocks'),
        ('9.0', {}, {'attention': 'blocks'}, 'blocks'),
        ('9.0', {}, {'num_heads': 3}, 'blocks'),  # of 256
        ('9.0', {}, {'num_heads': 64}, 'blocks'),  # of 12
        ('9.0', {}, {'num_heads': 64, 'head_dim': 64}, 'cudnn'),
        ('9.0', {}, {'head_dim': 256}, 'blocks'),
        ('9.0', {'compute_dtype': 'float32'}, {}, 'blocks'),
        ('9.0', {'seq_length': 255}, {}, 'blocks'),
        ('9.0', {'deterministic': True}, {}, 'cudnn'),
        ('9.0', {'deterministic': True, 'data': configs.Data(mode='pack')}, {}, 'blocks'),
    ],
)
def test_where_cudnn_computes(capability, changes, sizes, kernel):
    config = configs.Config(model=configs.Model(**sizes), **changes)
    device = types.SimpleNamespace(**({'compute_capability': capability} if capability else {}))
    assert program.attention_kernel(config, device) == kernel


def test_analyses_in_float32_do_without(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, 'cudnn_attention', lambda q, *_: asked.append(q.dtype) or q)
    sizes = configs.Model(vocab_size=9, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8)
    model = families.from_config(sizes, kernel='cudnn')
    for one in (model, model.clone(compute_dtype='float32')):
        jax.eval_shape(one.apply, one.shapes(), jnp.zeros((1, 4), jnp.int32))
    assert {*asked} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_turning_on_tpus_is_the_same(dtype, monkeypatch):
    """Bit for bit, its gradient included; the turn is that of complex numbers."""
    x, dy = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 5, 3, 8)), dtype)
    frequency = rope.rope_frequencies(configs.Model(hidden_size=8, num_heads=1, rope_theta=100.0))
    angles = rope.rope_cos_sin(jnp.arange(5), frequency)

    def turned(x, dy):
        y, pull = jax.vjp(lambda x: rope.rotate(x, angles), x)
        return y, pull(dy)[0]

    elsewhere = turned(x, dy)
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda x, tpu, default: tpu(x))
    for one, other in zip(turned(x, dy), elsewhere, strict=True):
        np.testing.assert_array_equal(one, other)
    if dtype == 'float32':
        first, second = np.split(np.asarray(x), 2, axis=-1)
        by = np.exp(1j * np.arange(5)[:, None] / 100.0 ** (np.arange(4) / 4))[:, None]
        whole = (first + 1j * second) * by
        np.testing.assert_allclose(elsewhere[0], np.concatenate([whole.real, whole.imag], -1), atol=1e-5)

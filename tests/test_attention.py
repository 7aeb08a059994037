"""Attention in blocks against all of it at once, in float64 by hand."""

import jax
import numpy as np
import pytest

from mixln_jax.models import attention


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
    segments = np.sort(rng.integers(documents, size=(2, T)))
    mask = attention.document_mask(segments) if documents > 1 else None
    expected = reference(q, k, v, segments[:, None, :, None] == segments[:, None, None, :], dy)

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

"""Causal attention."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.kernels.matmul import precision

BLOCKS = 4  # of queries; benchmarks/NOTES.md has the measurements
SHORTEST = 128  # queries in a block


def document_mask(segment_ids: jax.Array) -> jax.Array:
    """Returns a mask [B, 1, T, T] bool, query by key: whether both are in the same document.

    Args:
        segment_ids: [B, T] int, the number of the document of each position.
    """
    return segment_ids[:, None, :, None] == segment_ids[:, None, None, :]


def choose_kernel(
    device: jax.Device | None,
    dtype: str,
    head_size: int,
    seq_length: int,
    *,
    wanted: str = 'auto',
    deterministic_mask: bool = False,
) -> str:
    """Returns the kernel that computes attention: `cudnn` (`cudnn_attention`) or `blocks` (`causal_attention`).

    Args:
        device: of the run; None: unknown, as in a plan.
        dtype: of activations.
        head_size: features d of a head.
        seq_length: T.
        wanted: `auto`; or `blocks`, which is then chosen on every device.
        deterministic_mask: whether the results with a mask have to be the same bits each time, which cuDNN does not
            guarantee.
    """
    capability = re.match(r'\d+(?=\.\d)', str(getattr(device, 'compute_capability', '')))  # AMD has names like gfx942
    ampere = capability and int(capability[0]) >= 8
    sizes_fit = head_size % 8 == 0 and head_size <= 128 and seq_length % 2 == 0  # cuDNN has no masks of odd size
    possible = ampere and dtype == 'bfloat16' and sizes_fit and not deterministic_mask
    return 'cudnn' if possible and wanted == 'auto' else 'blocks'


@jax.custom_vjp
def causal_attention(
    q_BTHd: jax.Array, k_BTKd: jax.Array, v_BTKd: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Returns softmax(q k^T) v, where a query sees the keys up to its own position.

    Query head h uses key and value head h // (H / K). The computation goes through blocks of queries; keys that no
    query of a block sees are never read. The backward pass computes the probabilities again from their log-sum-exp (Dao
    et al. 2022, FlashAttention, arXiv 2205.14135, algorithm 4), so nothing of size T x T is kept. Scores and
    probabilities are float32.

    Args:
        q_BTHd: queries [B, T, H, d], already divided by sqrt(d).
        k_BTKd: keys [B, T, K, d]; H is divisible by K.
        v_BTKd: values [B, T, K, d].
        mask: bool, broadcastable to [B, 1, T, T], query by key: which of the keys up to its position a query sees. Each
            query has to see its own key. None: it sees all of them.

    Returns:
        [B, T, H, d].
    """
    return _forward(q_BTHd, k_BTKd, v_BTKd, mask)[0]


def cudnn_attention(
    q_BTHd: jax.Array, k_BTKd: jax.Array, v_BTKd: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """Returns what `causal_attention` returns, computed by cuDNN, which never writes scores to memory.

    It works in bfloat16 on NVIDIA GPUs; `jax.nn.dot_product_attention` raises for inputs that cuDNN does not support.
    """
    return jax.nn.dot_product_attention(
        q_BTHd, k_BTKd, v_BTKd, mask=mask, is_causal=True, scale=1.0, implementation='cudnn'
    )


def cached_attention(
    q_B1Hd: jax.Array,
    k_B1Kd: jax.Array,
    v_B1Kd: jax.Array,
    cached: Sequence[tuple[jax.Array, jax.Array]],
    mask: jax.Array,
) -> jax.Array:
    """Returns softmax(q k^T) v of one position, which sees its own key and those of several caches that `mask` shows.

    The caches are read where they lie: the caller writes the position's own key and value afterwards.

    Args:
        q_B1Hd: queries [B, 1, H, d], already divided by sqrt(d); head h uses key and value head h // (H / K).
        k_B1Kd, v_B1Kd: key and value of the position [B, 1, K, d].
        cached: keys and values [B, S, K, d] of earlier positions, of any number of them.
        mask: bool [B, 1, 1, sum of all S]: which of them are seen.

    Returns:
        [B, 1, H, d].
    """
    B, _, K, d = k_B1Kd.shape
    q_BKGd = q_B1Hd.reshape(B, K, -1, d)
    scores, first = [_dot('bkgd,bskd->bkgs', q_BKGd, k_B1Kd)], 0
    for keys, _ in cached:
        seen = mask[..., first : first + keys.shape[1]]
        scores.append(jnp.where(seen, _dot('bkgd,bskd->bkgs', q_BKGd, keys), -jnp.inf))
        first += keys.shape[1]
    largest = functools.reduce(jnp.maximum, (part.max(axis=-1, keepdims=True) for part in scores))
    exp_scores = [jnp.exp(part - largest) for part in scores]
    total = sum(part.sum(axis=-1, keepdims=True) for part in exp_scores)
    values = [v_B1Kd, *(values for _, values in cached)]
    y: Any = sum(_dot('bkgs,bskd->bkgd', part.astype(v.dtype), v) for part, v in zip(exp_scores, values, strict=True))
    return (y / total).astype(v_B1Kd.dtype).reshape(q_B1Hd.shape)


def largest_logit(
    q_BTHd: jax.Array, k_BTKd: jax.Array, mask: jax.Array | None = None, causal: bool = True
) -> jax.Array:
    """Returns the largest absolute score q k^T of a query and a key that it sees, in float32.

    One head at a time is in memory, [B, T, T].

    Args:
        q_BTHd, k_BTKd, mask: as of `causal_attention`.
        causal: whether a query sees no keys after its own.
    """
    q, k = _by_head(q_BTHd, k_BTKd)
    T = q.shape[2]
    seen = jnp.tri(T, dtype=bool) if causal else jnp.ones((T, T), bool)
    seen = seen if mask is None else seen & mask[:, 0]

    def of_head(head: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.where(seen, jnp.abs(_dot('btd,bsd->bts', *head)), 0).max()

    return jax.lax.map(of_head, (jnp.swapaxes(q, 0, 1), jnp.swapaxes(k, 0, 1))).max()


def _forward(q_BTHd: jax.Array, k_BTKd: jax.Array, v_BTKd: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, Any]:
    q, k, v = _by_head(q_BTHd, k_BTKd, v_BTKd)
    outs, lse = [], []
    for first, S in blocks(q.shape[2]):
        scores = _scores(q, k, mask, first, S)
        largest = scores.max(axis=-1, keepdims=True)
        exp_scores = jnp.exp(scores - largest)
        total = exp_scores.sum(axis=-1, keepdims=True)
        # The division comes after the matmul because there are fewer features d than keys S.
        outs.append((_dot('bhts,bhsd->bhtd', exp_scores.astype(v.dtype), v[:, :, :S]) / total).astype(v.dtype))
        lse.append(largest + jnp.log(total))
    y_BTHd = jnp.swapaxes(jnp.concatenate(outs, axis=2), 1, 2)
    # TPUs pad the last axis to a multiple of 128: heads of 64 features need no more memory if they share one axis.
    joined = [a.reshape(*a.shape[:2], -1) for a in (q_BTHd, k_BTKd, v_BTKd, y_BTHd)]
    return y_BTHd, (mask, joined, jnp.concatenate(lse, axis=2))


def _backward(saved: Any, dy_BTHd: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    mask, *others = saved
    joined, lse = jax.lax.optimization_barrier(others)  # without it XLA may keep the scores
    heads = [a.reshape(*a.shape[:2], -1, dy_BTHd.shape[3]) for a in joined]
    K = heads[1].shape[2]
    q, k, v, y, dy = _by_head(*heads, dy_BTHd)
    delta = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], [], []
    for first, S in blocks(q.shape[2]):
        rows = np.s_[:, :, first:S]
        p = jnp.exp(_scores(q, k, mask, first, S) - lse[rows])
        ds = (p * (_dot('bhtd,bhsd->bhts', dy[rows], v[:, :, :S]) - delta[rows])).astype(q.dtype)
        dq.append(_dot('bhts,bhsd->bhtd', ds, k[:, :, :S]))
        dk.append(_dot('bhts,bhtd->bhsd', ds, q[rows]))
        dv.append(_dot('bhts,bhtd->bhsd', p.astype(q.dtype), dy[rows]))

    def sum_blocks(parts: Sequence[jax.Array]) -> jax.Array:  # [B, H, S, d] of each block -> [B, T, K, d]
        padded = (jnp.pad(a, [(0, 0), (0, 0), (0, q.shape[2] - a.shape[2]), (0, 0)]) for a in parts)
        whole: Any = sum(padded)
        shared = whole.reshape(whole.shape[0], K, -1, *whole.shape[2:]).sum(axis=2)
        return jnp.swapaxes(shared, 1, 2).astype(k.dtype)

    dq_BTHd = jnp.swapaxes(jnp.concatenate(dq, axis=2), 1, 2).astype(q.dtype)
    return dq_BTHd, sum_blocks(dk), sum_blocks(dv), None


causal_attention.defvjp(_forward, _backward)


def blocks(T: int) -> list[tuple[int, int]]:
    """Returns (first query, number of keys that it sees) for every block of queries of a sequence of length T."""
    length = max(SHORTEST, -(-T // BLOCKS))
    return [(first, min(first + length, T)) for first in range(0, T, length)]


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array | None, first: int, S: int) -> jax.Array:
    """Returns the scores [B, H, t, S] of the queries `first` to S - 1, -inf where a query does not see a key."""
    scores = _dot('bhtd,bhsd->bhts', q[:, :, first:S], k[:, :, :S])
    scores += np.where(np.arange(S) <= np.arange(first, S)[:, None], 0, -np.inf).astype(np.float32)
    return scores if mask is None else jnp.where(mask[..., first:S, :S], scores, -jnp.inf)


def _by_head(*values: jax.Array) -> list[jax.Array]:
    """Returns arrays [B, T, H, d] or [B, T, K, d] as [B, H, T, d]; keys and values are repeated for their queries."""
    H = values[0].shape[2]
    wide = (jnp.repeat(a, H // a.shape[2], axis=2) if a.shape[2] < H else a for a in values)
    return [jnp.swapaxes(a, 1, 2) for a in wide]


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=precision(a), preferred_element_type=jnp.float32)

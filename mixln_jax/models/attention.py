"""Causal attention and rotary positions.

B batch, T length, H query heads, K key/value heads, d features of a head, t queries of a block, S keys that they see.
"""

import jax
import jax.numpy as jnp
import numpy as np

BLOCKS, SHORTEST = 4, 64  # blocks of queries, and queries in one at least: benchmarks/NOTES.md


def rotary_angles(positions, head_dim, theta):
    """Su et al. 2021: cosine and sine [..., T, head_dim / 2] of the angle of every pair at `positions` [..., T]."""
    frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHd, angles):
    """Turns pair i of every head, (x_i, x_{i + d/2}), by its position's angle: the half-rotation of Hugging Face."""
    cos, sin = (a[..., None, :] for a in angles)
    first, second = jnp.split(x_BTHd.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHd.dtype)


def document_mask(segments):
    """[B,T] numbers of documents -> [B,1,T,T] bool, query by key: whether both lie in the same document."""
    return segments[:, None, :, None] == segments[:, None, None, :]


def causal_attention(q_BTHd, k_BTKd, v_BTKd, mask=None):
    """softmax(q k^T) v, where a query sees the keys up to its own position; query head h those of head h // (H / K).

    Works on blocks of queries, so that keys which none of a block sees are never touched, and divides by the softmax's
    sum behind the product with v, on d features and not on S keys. Scores and their softmax are float32.

    Args:
        q_BTHd: queries, already divided by sqrt(d).
        k_BTKd, v_BTKd: keys and values; K divides H.
        mask: [B,1,T,T] bool, query by key, or what broadcasts to it: which keys a query sees of those. Each has to see
            its own. None: all of them.

    Returns [B,T,H,d].
    """
    T, H, K = *q_BTHd.shape[1:3], k_BTKd.shape[2]
    k, v = (jnp.repeat(a, H // K, axis=2) if K < H else a for a in (k_BTKd, v_BTKd))
    q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q_BTHd, k, v))
    blocks = []
    for first in range(0, T, t := max(SHORTEST, -(-T // BLOCKS))):
        S = min(first + t, T)
        scores = jnp.einsum('bhtd,bhsd->bhts', q[:, :, first:S], k[:, :, :S], preferred_element_type=jnp.float32)
        scores += np.where(np.arange(S) <= np.arange(first, S)[:, None], 0, -np.inf).astype(np.float32)
        if mask is not None:
            scores = jnp.where(mask[..., first:S, :S], scores, -jnp.inf)
        powers = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        summed = jnp.einsum('bhts,bhsd->bhtd', powers.astype(v.dtype), v[:, :, :S], preferred_element_type=jnp.float32)
        blocks.append((summed / powers.sum(axis=-1, keepdims=True)).astype(v.dtype))
    return jnp.swapaxes(jnp.concatenate(blocks, axis=2), 1, 2)

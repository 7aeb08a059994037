"""Causal attention."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.kernels.matmul import precision

BLOCKS, SHORTEST = 4, 128  # blocks of queries, and queries in one at least: benchmarks/NOTES.md


def document_mask(segments):
    """[B,T] numbers of documents -> [B,1,T,T] bool, query by key: whether both lie in the same document."""
    return segments[:, None, :, None] == segments[:, None, None, :]


def choose_kernel(
    device: jax.Device | None,
    dtype: str,
    head_size: int,
    seq_length: int,
    *,
    wanted: str = 'auto',
    deterministic_mask: bool = False,
) -> str:
    """Returns which function computes attention: `cudnn` (`cudnn_attention`) or `blocks` (`causal_attention`).

    Args:
        device: of the run; None: a plan's, of no kind.
        dtype: of activations.
        head_size: features of a head d.
        seq_length: T.
        wanted: `auto`, or `blocks` for those in any case.
        deterministic_mask: whether masks have to give the same bits each time, which cuDNN does not promise.
    """
    capability = re.match(r'\d+(?=\.\d)', str(getattr(device, 'compute_capability', '')))  # AMD's are like gfx942
    ampere = capability and int(capability[0]) >= 8
    sizes_fit = head_size % 8 == 0 and head_size <= 128 and seq_length % 2 == 0  # cuDNN's masks have no odd sides
    possible = ampere and dtype == 'bfloat16' and sizes_fit and not deterministic_mask
    return 'cudnn' if possible and wanted == 'auto' else 'blocks'


@jax.custom_vjp
def causal_attention(q_BTHd, k_BTKd, v_BTKd, mask=None):
    """softmax(q k^T) v, where a query sees the keys up to its own position; query head h those of head h // (H / K).

    Works on blocks of queries, so that keys which none of a block sees are never touched. The backward pass computes
    the probabilities again, from the logarithms of their sums (Dao et al. 2022, FlashAttention, arXiv 2205.14135,
    algorithm 4), so nothing of size T x T is kept. Scores and probabilities are float32.

    Args:
        q_BTHd: queries, already divided by sqrt(d).
        k_BTKd, v_BTKd: keys and values; K divides H.
        mask: [B,1,T,T] bool, query by key, or what broadcasts to it: which keys a query sees of those. Each has to see
            its own. None: all of them.

    Returns [B,T,H,d].
    """
    return _forward(q_BTHd, k_BTKd, v_BTKd, mask)[0]


def cudnn_attention(q_BTHd, k_BTKd, v_BTKd, mask=None):
    """What `causal_attention` computes, by cuDNN's kernels, which never write scores to memory: in bfloat16, on NVIDIA
    GPUs. `jax.nn.dot_product_attention` raises for what they cannot do."""
    return jax.nn.dot_product_attention(
        q_BTHd, k_BTKd, v_BTKd, mask=mask, is_causal=True, scale=1.0, implementation='cudnn'
    )


def _forward(q_BTHd, k_BTKd, v_BTKd, mask):
    q, k, v = _by_head(q_BTHd, k_BTKd, v_BTKd)
    outs, logs = [], []
    for first, S in blocks(q.shape[2]):
        scores = _scores(q, k, mask, first, S)
        largest = scores.max(axis=-1, keepdims=True)
        powers = jnp.exp(scores - largest)
        total = powers.sum(axis=-1, keepdims=True)
        # Divided behind the product: d features are fewer than S keys.
        outs.append((_dot('bhts,bhsd->bhtd', powers.astype(v.dtype), v[:, :, :S]) / total).astype(v.dtype))
        logs.append(largest + jnp.log(total))
    y_BTHd = jnp.swapaxes(jnp.concatenate(outs, axis=2), 1, 2)
    # Kept in one axis, heads of 64 features take no more room on TPUs than that, where 128 lie side by side.
    joined = [a.reshape(*a.shape[:2], -1) for a in (q_BTHd, k_BTKd, v_BTKd, y_BTHd)]
    return y_BTHd, (mask, joined, jnp.concatenate(logs, axis=2))


def _backward(saved, dy_BTHd):
    mask, *others = saved
    joined, logs = jax.lax.optimization_barrier(others)  # else XLA may keep the scores
    heads = [a.reshape(*a.shape[:2], -1, dy_BTHd.shape[3]) for a in joined]
    K = heads[1].shape[2]
    q, k, v, y, dy = _by_head(*heads, dy_BTHd)
    inner = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], [], []
    for first, S in blocks(q.shape[2]):
        rows = np.s_[:, :, first:S]
        p = jnp.exp(_scores(q, k, mask, first, S) - logs[rows])
        ds = (p * (_dot('bhtd,bhsd->bhts', dy[rows], v[:, :, :S]) - inner[rows])).astype(q.dtype)
        dq.append(_dot('bhts,bhsd->bhtd', ds, k[:, :, :S]))
        dk.append(_dot('bhts,bhtd->bhsd', ds, q[rows]))
        dv.append(_dot('bhts,bhtd->bhsd', p.astype(q.dtype), dy[rows]))

    def over_blocks(parts):  # [B,H,S,d] each -> [B,T,K,d]
        whole = sum(jnp.pad(a, [(0, 0), (0, 0), (0, q.shape[2] - a.shape[2]), (0, 0)]) for a in parts)
        shared = whole.reshape(whole.shape[0], K, -1, *whole.shape[2:]).sum(axis=2)
        return jnp.swapaxes(shared, 1, 2).astype(k.dtype)

    dq_BTHd = jnp.swapaxes(jnp.concatenate(dq, axis=2), 1, 2).astype(q.dtype)
    return dq_BTHd, over_blocks(dk), over_blocks(dv), None


causal_attention.defvjp(_forward, _backward)


def blocks(T):
    """(first query, number of keys that the block sees) of every block of queries."""
    length = max(SHORTEST, -(-T // BLOCKS))
    return [(first, min(first + length, T)) for first in range(0, T, length)]


def _scores(q, k, mask, first, S):
    """[B,H,t,S] of the queries first to S - 1."""
    scores = _dot('bhtd,bhsd->bhts', q[:, :, first:S], k[:, :, :S])
    scores += np.where(np.arange(S) <= np.arange(first, S)[:, None], 0, -np.inf).astype(np.float32)
    return scores if mask is None else jnp.where(mask[..., first:S, :S], scores, -jnp.inf)


def _by_head(*values):
    """[B,T,H,d], or those of K heads, each repeated for its queries -> [B,H,T,d]."""
    H = values[0].shape[2]
    wide = (jnp.repeat(a, H // a.shape[2], axis=2) if a.shape[2] < H else a for a in values)
    return [jnp.swapaxes(a, 1, 2) for a in wide]


def _dot(equation, a, b):
    return jnp.einsum(equation, a, b, precision=precision(a), preferred_element_type=jnp.float32)

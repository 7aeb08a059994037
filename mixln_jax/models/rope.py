"""Causal attention and rotary positions.

B batch, T length, H query heads, K key/value heads, d features of a head, t queries of a block, S keys that they see.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.kernels.matmul import precision


def rope_frequencies(config: configs.Model) -> jax.Array:
    """The angle by which a position turns each pair of a head, [head_size / 2] float32 (Su et al. 2021).

    Under `llama3` (Llama 3.1) a pair that makes fewer than rope_low_freq_factor turns in rope_original_length
    positions is slowed by rope_factor, one that makes more than rope_high_freq_factor stays, between them linearly.
    """
    size = config.head_size
    frequency = config.rope_theta ** -(jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if config.rope_type == 'llama3':
        turns, low = config.rope_original_length / (2 * np.pi) * frequency, config.rope_low_freq_factor
        stays = jnp.clip((turns - low) / (config.rope_high_freq_factor - low), 0, 1)
        frequency *= stays + (1 - stays) / config.rope_factor
    return frequency


def rope_cos_sin(positions: jax.Array, frequency: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [..., T, d / 2] of the angle of every pair at `positions` [..., T]."""
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHd: jax.Array, angles: Sequence[jax.Array]) -> jax.Array:
    """Turns pair i of every head, (x_i, x_{i + d/2}), by its position's angle: the half-rotation of Hugging Face."""
    cos, sin = (jnp.concatenate([a, a], axis=-1)[..., None, :] for a in angles)
    turned = jax.lax.platform_dependent(x_BTHd, tpu=_turned_by_product, default=_turned)
    return (x_BTHd * cos + turned * sin).astype(x_BTHd.dtype)


def _turned(x: jax.Array | np.ndarray) -> jax.Array:
    """(x_i, x_{i + d/2}) -> (-x_{i + d/2}, x_i) of every head."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def _turned_by_product(x: jax.Array) -> jax.Array:
    """The same with a matrix of 0, 1 and -1, exact too: halves of a head of 64 are a quarter of what TPUs hold side by
    side, and splitting there costs a third of attention, as their compiler expects it (benchmarks/NOTES.md)."""
    matrix = jnp.asarray(_turned(np.eye(x.shape[-1])), x.dtype)
    return jnp.einsum('...d,de->...e', x, matrix, precision=precision(x))

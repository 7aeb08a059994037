"""Layers that networks share: norms, embedding, MLP, linear."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax.kernels import attention
from mixln_jax.kernels.matmul import matmul

LOGITS = 'logits'  # collection with the largest attention logit of each layer
Batch = Mapping[str, jax.Array] | jax.Array  # arrays [B,...] by name, or token ids [B,T] alone


def as_batch(batch: Batch) -> Mapping[str, jax.Array]:
    """Returns a batch whose `inputs` are the token ids, if they were given alone."""
    return batch if isinstance(batch, Mapping) else {'inputs': batch}


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019: x / sqrt(mean(x^2) + eps) * gain, in float32, times a constant; the mean is taken over
    each of `groups` equal parts of the features."""

    eps: float
    dtype: jnp.dtype
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, constant: jax.Array | None = None) -> jax.Array:
        gain = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        y = _rms_norm(x, gain, self.eps, self.groups)
        return (y if constant is None else y * constant).astype(self.dtype)


@functools.partial(jax.checkpoint, static_argnums=(2, 3))  # else several float32 copies of x are kept
def _rms_norm(x: jax.Array, gain: jax.Array, eps: float, groups: int) -> jax.Array:
    x = x.astype(jnp.float32)
    if groups == 1:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * gain
    parts = x.reshape(*x.shape[:-1], groups, -1)
    parts *= jax.lax.rsqrt(jnp.mean(jnp.square(parts), axis=-1, keepdims=True) + eps)
    return parts.reshape(x.shape) * gain


class Embedding(nn.Module):
    """A row of a table for every id. Its values come from `initialize`."""

    rows: int
    features: int
    dtype: jnp.dtype
    stream_sharding: jax.sharding.NamedSharding | None

    def setup(self) -> None:
        self.embedding = self.param('embedding', nn.initializers.zeros, (self.rows, self.features))

    def attend(self, x: jax.Array) -> jax.Array:
        """[...,D] -> [...,rows] float32: the table as a head."""
        return matmul(x.astype(jnp.float32), self.embedding.T.astype(jnp.float32))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """[B,T] -> [B,T,D]."""
        table = self.embedding.astype(self.dtype)
        if not self.stream_sharding:
            return table[ids]
        # Gathered as every matrix is: rows looked up in parts of it would have to be put together again.
        everywhere = jax.sharding.NamedSharding(self.stream_sharding.mesh, jax.sharding.PartitionSpec())
        x = jax.lax.with_sharding_constraint(table, everywhere)[ids]
        return jax.lax.with_sharding_constraint(x, self.stream_sharding)


def sow_largest_logit(module: nn.Module, q: jax.Array, k: jax.Array, mask: jax.Array | None, causal: bool) -> None:
    """Sows `attention.largest_logit` of scaled queries in the collection LOGITS, if it is asked for."""
    if module.is_mutable_collection(LOGITS) and not module.is_initializing():
        largest = attention.largest_logit(q, k, mask, causal)
        module.sow(LOGITS, 'largest', largest, init_fn=lambda: None, reduce_fn=lambda _, last: last)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    config: configs.Model
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        into = lambda name: linear(self.config.intermediate_size, self.dtype, name, self.config.mlp_bias)(x_BTD)  # noqa: E731
        y = _gated(into('gate'), into('up'))
        return linear(self.config.hidden_size, self.dtype, 'down', self.config.mlp_bias)(y)


@jax.checkpoint  # of both alone the backward pass makes the rest
def _gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    return nn.silu(gate) * up


class Linear(nn.Dense):
    """x W, plus the bias where there is one, plus (x A) B s where its parameters hold an adapter.

    Hu et al. 2022 (LoRA, arXiv 2106.09685), section 4.1. `lora_a` A is [in, r], `lora_b` B [r, out], `lora_scale` s a
    number. In training `x` may be dropped in part: the collection `dropout` then has `keys` [B, 2], the key data of
    each example, and `keep`, the share that stays.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = super().__call__(x)
        if not self.has_variable('params', 'lora_a'):
            return y
        adapter: list[jax.Array] = [self.get_variable('params', f'lora_{name}') for name in ('a', 'b', 'scale')]
        A, B, scale = adapter
        x = x.astype(y.dtype)
        if self.has_variable('dropout', 'keys'):
            x = _dropped(x, self.get_variable('dropout', 'keys'), self.get_variable('dropout', 'keep'))
        added = matmul(matmul(x, A.astype(y.dtype)), B.astype(y.dtype))
        return y + (added * scale).astype(y.dtype)


def _dropped(x: jax.Array, keys: jax.Array, keep: jax.Array) -> jax.Array:
    """Returns x [B,...] with the share `keep` of its values divided by `keep`, the others 0, drawn by example."""
    draw = lambda key: jax.random.bernoulli(jax.random.wrap_key_data(key), keep, x.shape[1:])  # noqa: E731
    return jnp.where(jax.vmap(draw)(keys), x / keep.astype(x.dtype), 0)


def linear(features: int, dtype: Any, name: str | None, bias: bool = False) -> Linear:
    """A matrix, without bias unless it is asked for; its values come from `initialize`, or from a file."""
    return Linear(
        features, use_bias=bias, dtype=dtype, name=name, kernel_init=nn.initializers.zeros, dot_general=_dot_general
    )


def _dot_general(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    return matmul(x, kernel)


class LayerNorm(nn.Module):
    """Ba et al. 2016 (arXiv 1607.06450): (x - mean) / sqrt(variance + eps) * gain + bias, in float32, times a constant;
    mean and variance are taken over each of `groups` equal parts of the features."""

    eps: float
    dtype: jnp.dtype
    groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, constant: jax.Array | None = None) -> jax.Array:
        gain = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        parts = x.astype(jnp.float32).reshape(*x.shape[:-1], self.groups, -1)
        parts -= parts.mean(axis=-1, keepdims=True)
        parts *= jax.lax.rsqrt(jnp.mean(jnp.square(parts), axis=-1, keepdims=True) + self.eps)
        y = parts.reshape(x.shape) * gain + bias
        return (y if constant is None else y * constant).astype(self.dtype)

"""Causal self-attention."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax.kernels import attention
from mixln_jax.models import rope
from mixln_jax.models.layers import RMSNorm, linear, sow_largest_logit


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads.

    Keys and values [B,T,K,d] are sown as the intermediates `keys` and `values`. Where the collections `cache` and
    `recent` hold those of earlier positions, [B,S,K,d] and [B,R,K,d], T is 1, and the mask [B,1,1,S+R] says which of
    them are seen. The collection `logits` gets the largest absolute logit as `largest`.
    """

    config: configs.Model
    dtype: jnp.dtype
    qkv_norm: bool = False
    kernel: str = 'blocks'  # see kernels/attention.py

    @nn.compact
    def __call__(self, x_BTD: jax.Array, angles: tuple[jax.Array, jax.Array], mask: jax.Array | None) -> jax.Array:
        D, H, K = self.config.hidden_size, self.config.num_heads, self.config.kv_heads
        head_dim, bias = self.config.head_size, self.config.attention_bias

        def heads(name: str, count: int) -> jax.Array:
            y = linear(count * head_dim, self.dtype, name, bias)(x_BTD).reshape(*x_BTD.shape[:2], count, head_dim)
            return RMSNorm(self.config.norm_eps, self.dtype, name=f'{name}_norm')(y) if self.qkv_norm else y

        scaled = [a / head_dim**0.5 for a in angles]  # turning the queries by these divides them too
        q, k = rope.rotate(heads('q', H), scaled), rope.rotate(heads('k', K), angles)
        v = heads('v', K)
        for name, new in (('keys', k), ('values', v)):
            self.sow('intermediates', name, new, init_fn=lambda: None, reduce_fn=lambda _, last: last)
        sow_largest_logit(self, q, k, mask, causal=True)
        by_cudnn = self.kernel == 'cudnn' and q.dtype == jnp.bfloat16  # analyses in training are in float32
        attend = attention.cudnn_attention if by_cudnn else attention.causal_attention
        if self.has_variable('cache', 'keys'):
            assert mask is not None, 'decoding needs cache_mask'
            cached: list[tuple[jax.Array, jax.Array]] = [
                (self.get_variable(collection, 'keys'), self.get_variable(collection, 'values'))
                for collection in ('cache', 'recent')
            ]
            y_BTHd = attention.cached_attention(q, k, v, cached, mask)
        else:
            y_BTHd = attend(q, k, v, mask)
        return linear(D, self.dtype, 'o', bias)(y_BTHd.reshape(*x_BTD.shape[:2], H * head_dim))

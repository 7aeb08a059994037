"""What the layers of encoders (BERT, ViT) are made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax.models import layers, transformer
from mixln_jax.models.layers import LayerNorm


class Attention(nn.Module):
    """Self-attention that sees both sides, with biases; only the embedding encodes positions."""

    config: configs.Model
    dtype: jnp.dtype
    qkv_norm: bool = False
    kernel: str = 'blocks'  # of causal attention: has no meaning here

    @nn.compact
    def __call__(self, x_BTD: jax.Array, angles: None, mask: jax.Array | None) -> jax.Array:
        del angles
        D, H = self.config.hidden_size, self.config.num_heads

        def heads(name: str) -> jax.Array:
            y = layers.linear(D, self.dtype, name, bias=True)(x_BTD).reshape(*x_BTD.shape[:2], H, D // H)
            return LayerNorm(self.config.norm_eps, self.dtype, name=f'{name}_norm')(y) if self.qkv_norm else y

        q, k, v = heads('q'), heads('k'), heads('v')
        layers.sow_largest_logit(self, q / (D // H) ** 0.5, k, mask, causal=False)
        y_BTHd = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return layers.linear(D, self.dtype, 'o', bias=True)(y_BTHd.reshape(x_BTD.shape))


class MLP(nn.Module):
    """Two matrices with biases, and between them the GELU of Hendrycks and Gimpel 2016 (arXiv 1606.08415): exact, with
    erf, or its approximation by tanh, as `config.gelu` says."""

    config: configs.Model
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        up = layers.linear(self.config.intermediate_size, self.dtype, 'up', bias=True)(x_BTD)
        return layers.linear(self.config.hidden_size, self.dtype, 'down', bias=True)(
            nn.gelu(up, self.config.gelu == 'tanh')
        )


PARTS = transformer.Parts(LayerNorm, Attention, MLP)

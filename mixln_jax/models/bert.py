"""BERT (Devlin et al. 2019, arXiv 1810.04805): embeddings, LayerNorm, the shared stack, a head that finds spans."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax.models import layers, transformer
from mixln_jax.models.layers import LayerNorm
from mixln_jax.system.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Config(configs.Model):
    """The keys of config.Model, of which those of rotary positions and key/value heads mean nothing, and BERT's own."""

    num_positions: int = 512  # rows of the table of positions: the longest T
    num_types: int = 2  # kinds of tokens: those of the question, those of the text


class Attention(nn.Module):
    """Self-attention that sees both sides, with biases; where a token stands is said by the embedding alone."""

    config: configs.Model
    dtype: jnp.dtype
    qkv_norm: bool = False
    kernel: str = 'blocks'  # of causal attention: has no meaning here

    @nn.compact
    def __call__(self, x_BTD, angles, mask):
        del angles
        D, H = self.config.hidden_size, self.config.num_heads

        def heads(name):
            y = layers.linear(D, self.dtype, name, bias=True)(x_BTD).reshape(*x_BTD.shape[:2], H, D // H)
            return LayerNorm(self.config.norm_eps, self.dtype, name=f'{name}_norm')(y) if self.qkv_norm else y

        y_BTHd = jax.nn.dot_product_attention(heads('q'), heads('k'), heads('v'), mask=mask)
        return layers.linear(D, self.dtype, 'o', bias=True)(y_BTHd.reshape(x_BTD.shape))


class MLP(nn.Module):
    """Two matrices with biases, and between them the exact GELU (Hendrycks and Gimpel 2016, with erf)."""

    config: configs.Model
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD):
        up = layers.linear(self.config.intermediate_size, self.dtype, 'up', bias=True)(x_BTD)
        return layers.linear(self.config.hidden_size, self.dtype, 'down', bias=True)(nn.gelu(up, False))


PARTS = transformer.Parts(LayerNorm, Attention, MLP)


class Bert(nn.Module):
    """A BERT whose layers each have their own placement: `post` is Devlin et al.'s, and that of all published weights.

    `norm_position` [L], `layer_index` [L] and `depth` are as in Llama. A network without `span_head` has a trunk alone.
    """

    config: Config
    norm_position: tuple[str, ...]
    layer_index: tuple[int, ...]
    depth: int
    compute_dtype: str = 'float32'
    span_head: bool = True
    stream_sharding: jax.sharding.NamedSharding | None = None  # of the residual stream; None: one device

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.compute_dtype)
        table = lambda rows: layers.Embedding(rows, config.hidden_size, dtype, self.stream_sharding)  # noqa: E731
        self.words = table(config.vocab_size)
        self.positions = table(config.num_positions)
        self.types = table(config.num_types)
        self.embed_norm = LayerNorm(config.norm_eps, dtype)
        self.layers = transformer.Stack(
            config, dtype, self.norm_position, self.layer_index, self.depth, self.stream_sharding, PARTS
        )
        if self.span_head:
            self.span = layers.linear(2, jnp.float32, None, bias=True)

    def trunk(self, ids, types=None, mask=None, keep=None, capture=False):
        """Everything below the head.

        Args:
            ids: [B,T] int.
            types: [B,T] int, the kind of each token. None: all are 0.
            mask: [B,1,1,T] bool, the tokens that are seen: False at padding. None: all of them.
            keep: [L] bool, traced: layers that are False are the identity. None: all are kept.
            capture: whether to return the residual stream.

        Returns:
            x [B,T,D] behind the last layer: BERT has no final norm. And a dict: with `capture`, `hidden` [L+1,B,T,D] is
            the residual stream, first what layer 1 sees, which is the normalised sum of the embeddings, last x;
            `branches` as in Llama.

        Raises:
            UsageError: more tokens than the network has positions.
        """
        if ids.shape[1] > self.config.num_positions:
            raise UsageError(f'rows of {ids.shape[1]} tokens, but BERT has {self.config.num_positions} positions')
        with jax.default_matmul_precision('highest' if self.compute_dtype == 'float32' else None):
            types = jnp.zeros_like(ids) if types is None else types
            positions = jnp.arange(ids.shape[1])[None]
            first = self.embed_norm(self.words(ids) + self.types(types) + self.positions(positions))
            last, out = self.layers(first, None, mask, keep, capture)
            if capture:
                out['hidden'] = jnp.concatenate([first[None], out['hidden']])
            return last, out or {}

    def __call__(self, ids, types=None, mask=None, keep=None):
        """Logits (start [B,T], end [B,T]) in float32 of where the answer of a question begins and ends."""
        if not self.span_head:
            raise UsageError('this BERT has no head that finds spans (qa_outputs)')
        x, _ = self.trunk(ids, types, mask, keep)
        with jax.default_matmul_precision('highest' if self.compute_dtype == 'float32' else None):
            start, end = jnp.moveaxis(self.span(x), -1, 0)
            return start, end

    @nn.nowrap
    def inputs(self, batch):
        """The arguments of `trunk` that a batch holds."""
        return {'ids': batch['inputs']} | {key: batch[key] for key in ('types', 'mask') if key in batch}

    @nn.nowrap
    def shapes(self):
        """The variables as ShapeDtypeStructs."""
        method = '__call__' if self.span_head else 'trunk'
        ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return jax.eval_shape(lambda ids: self.init(jax.random.key(0), ids, method=method), ids)

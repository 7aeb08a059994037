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

    `norm_position` [L], `layer_index` [L], `depth` and `trained_steps` are as in Llama. A network without `span_head`
    has a backbone alone.
    """

    config: Config
    norm_position: tuple[str, ...]
    layer_index: tuple[int, ...]
    depth: int
    compute_dtype: str = 'float32'
    span_head: bool = True
    stream_sharding: jax.sharding.NamedSharding | None = None  # of the residual stream; None: one device
    trained_steps: int | None = None

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

    def backbone(
        self,
        batch: layers.Batch,
        layer_mask: jax.Array | None = None,
        capture: bool = False,
        step: int | jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Returns the final hidden states, the input of the head.

        Args:
            batch: `inputs` [B,T] int32, token ids; `types` [B,T], the kind of each token (default 0); `token_mask`
                [B,T], 0 at padding, which no token attends to (default: no padding). Other arrays are ignored.
            layer_mask, capture, step: as in Llama.

        Returns:
            x [B,T,D] and a dict as in Llama: `hidden` begins with the normalised sum of the embeddings.

        Raises:
            UsageError: more tokens than the network has positions.
        """
        batch = layers.as_batch(batch)
        ids = batch['inputs']
        if ids.shape[1] > self.config.num_positions:
            raise UsageError(f'rows of {ids.shape[1]} tokens, but BERT has {self.config.num_positions} positions')
        with jax.default_matmul_precision('highest' if self.compute_dtype == 'float32' else None):
            types = batch.get('types', jnp.zeros_like(ids))
            mask = batch['token_mask'][:, None, None, :] > 0 if 'token_mask' in batch else None
            positions = jnp.arange(ids.shape[1])[None]
            first = self.embed_norm(self.words(ids) + self.types(types) + self.positions(positions))
            step = self.trained_steps if step is None else step
            last, out = self.layers(first, None, mask, layer_mask, capture, step)
            if capture:
                out['hidden'] = jnp.concatenate([first[None], out['hidden']])
            return last, out or {}

    def __call__(
        self, batch: layers.Batch, layer_mask: jax.Array | None = None, *, step: int | jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Returns logits (start [B,T], end [B,T]) in float32 of where the answer to a question begins and ends."""
        if not self.span_head:
            raise UsageError('this BERT has no head that finds spans (qa_outputs)')
        x, _ = self.backbone(batch, layer_mask, step=step)
        with jax.default_matmul_precision('highest' if self.compute_dtype == 'float32' else None):
            start, end = jnp.moveaxis(self.span(x), -1, 0)
            return start, end

    @nn.nowrap
    def shapes(self):
        """The variables as ShapeDtypeStructs."""
        method = '__call__' if self.span_head else 'backbone'
        ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
        return jax.eval_shape(lambda ids: self.init(jax.random.key(0), ids, method=method), ids)

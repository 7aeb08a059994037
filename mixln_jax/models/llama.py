"""LLaMA (Touvron et al. 2023): embedding, the shared stack, final RMSNorm, head."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax.kernels import attention
from mixln_jax.models import layers, placements, rope, transformer
from mixln_jax.models.network import Network
from mixln_jax.system.errors import UsageError


class Llama(Network):
    """LLaMA; see Network."""

    padded: ClassVar[dict[str, int]] = {'embed/embedding': 0, 'head/kernel': 1}
    lookups: ClassVar[tuple[str, ...]] = ('embed/embedding',)

    @classmethod
    def check(cls, config: configs.Model) -> None:
        """Raises UsageError if the features of a head do not come in pairs, which rotary positions turn."""
        if config.head_size % 2:
            source = 'config.model.head_dim' if config.head_dim else 'config.model.hidden_size / num_heads'
            raise UsageError(f'the head size {config.head_size} ({source}) must be even for rotary positions')

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.compute_dtype)
        self.embed = layers.Embedding(self.rows, config.hidden_size, dtype, self.stream_sharding)
        self.layers = transformer.Stack(
            config,
            dtype,
            self.norm_position,
            self.layer_index,
            self.depth,
            self.stream_sharding,
            kernel=self.attention_kernel,
        )
        self.norm = layers.RMSNorm(config.norm_eps, dtype)
        if placements.PLACEMENTS[self.norm_position[0]].embed_norm:
            self.embed_norm = layers.RMSNorm(config.norm_eps, dtype)
        if self.num_outputs:
            self.score = layers.linear(self.num_outputs, jnp.float32, None)
        elif not self.is_tied:
            self.head = layers.linear(self.rows, jnp.float32, None)

    def backbone(
        self,
        batch: layers.Batch,
        layer_mask: jax.Array | None = None,
        capture: bool = False,
        step: int | jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Returns the final hidden states, the input of the head.

        Args:
            batch: `inputs` [B,T] int32, token ids. Packed rows have `positions` [B,T], of each token in its document
                (default 0..T-1), and `segment_ids` [B,T], the number of each token's document in its row: attention
                stays inside a document; padding counts as one. In decoding (see Attention), with T = 1, `cache_mask`
                [B,S+R] bool says which positions of the caches are seen. Other arrays are ignored.
            layer_mask: [L] bool, traced: a layer that is False is the identity. None: all layers run.
            capture: whether to return the residual stream as well.
            step: number of updates done, int32 where it is traced, at which ramps stand. None: `trained_steps`.

        Returns:
            x [B,T,D] after the final norm, and a dict. With `capture` it has `hidden` [L+1,B,T,D], the raw residual
            stream from the input of layer 1 to the output of layer L, never after the final norm; and `branches`, for
            every sub-layer (attention and MLP) [L,2,B,T]: `stream_norm` of the stream before it, `norm` and `mean` of
            what it adds.
        """
        batch = layers.as_batch(batch)
        ids = batch['inputs']
        with jax.default_matmul_precision(self.precision):
            positions = batch.get('positions', jnp.arange(ids.shape[1]))
            first = self.embed(ids)
            if self.config.scale_embed:  # Takase et al. 2023 (arXiv 2312.16903), Scaled Embed
                first = (first.astype(jnp.float32) * self.config.hidden_size**0.5).astype(first.dtype)
            if placements.PLACEMENTS[self.norm_position[0]].embed_norm:
                first = self.embed_norm(first)
            angles = rope.rope_cos_sin(positions, rope.rope_frequencies(self.config))
            mask = attention.document_mask(batch['segment_ids']) if 'segment_ids' in batch else None
            mask = batch['cache_mask'][:, None, None, :] if 'cache_mask' in batch else mask
            last, out = self.run_layers(first, angles, mask, layer_mask, capture, step)
            return self.norm(last), out

    def __call__(
        self,
        batch: layers.Batch,
        layer_mask: jax.Array | None = None,
        capture: bool = False,
        step: int | jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Returns logits [B,T,V] in float32 and the dict of `backbone`; with `num_outputs` these many, [B,T,N].

        `batch` may be the token ids [B,T] alone; `keep` is an older name of `layer_mask`.
        """
        x, out = self.backbone(batch, keep if layer_mask is None else layer_mask, capture, step)
        return self.logits(x), out

    def logits(self, x: jax.Array) -> jax.Array:
        """Returns the logits [...,V], or [...,N], in float32 of hidden states [...,D], padding columns cut off."""
        with jax.default_matmul_precision(self.precision):
            if self.num_outputs:
                return self.score(x)
            head = self.embed.attend if self.is_tied else self.head
            return head(x)[..., : self.config.vocab_size]

    @nn.nowrap
    def head_kernel(self, params: Any) -> jax.Array:
        """Returns the matrix [D,Vp] of the head for words of a tree of parameters."""
        return params['embed']['embedding'].T if self.is_tied else params['head']['kernel']

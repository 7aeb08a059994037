"""LLaMA (Touvron et al. 2023): embedding, the shared stack, final RMSNorm, head."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax.kernels import attention
from mixln_jax.models import layers, placements, rope, transformer
from mixln_jax.models.initialize import initialize
from mixln_jax.system.errors import UsageError

VOCAB_MULTIPLE = 128  # rows of embedding and head in memory, so that they tile and shard


class Llama(nn.Module):
    """A LLaMA whose layers each have their own placement.

    `norm_position` [L] names the placements; `layer_index` [L] (from 1) and `depth` feed their constants and stay as
    trained when layers are removed. Ramps stand where they stood after `trained_steps` updates unless a step is passed;
    None: they are done.
    """

    config: configs.Model
    norm_position: tuple[str, ...]
    layer_index: tuple[int, ...]
    depth: int
    compute_dtype: str = 'bfloat16'
    stream_sharding: jax.sharding.NamedSharding | None = None  # of the residual stream; None: one device
    attention_kernel: str = 'blocks'  # see kernels/attention.py
    trained_steps: int | None = None

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.compute_dtype)
        rows = -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        self.embed = layers.Embedding(rows, config.hidden_size, dtype, self.stream_sharding)
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
        if not config.tie_word_embeddings:
            self.head = layers.linear(rows, jnp.float32, None)

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
                stays inside a document; padding counts as one. Other arrays are ignored.
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
        with jax.default_matmul_precision('highest' if self.compute_dtype == 'float32' else None):
            positions = batch.get('positions', jnp.arange(ids.shape[1]))
            first = self.embed(ids)
            if self.config.scale_embed:  # Takase et al. 2023 (arXiv 2312.16903), Scaled Embed
                first = (first.astype(jnp.float32) * self.config.hidden_size**0.5).astype(first.dtype)
            if placements.PLACEMENTS[self.norm_position[0]].embed_norm:
                first = self.embed_norm(first)
            angles = rope.rope_cos_sin(positions, rope.rope_frequencies(self.config))
            mask = attention.document_mask(batch['segment_ids']) if 'segment_ids' in batch else None
            step = self.trained_steps if step is None else step
            last, out = self.layers(first, angles, mask, layer_mask, capture, step)
            if capture:
                out['hidden'] = jnp.concatenate([first[None], out['hidden']])
            return self.norm(last), out or {}

    def __call__(
        self,
        batch: layers.Batch,
        layer_mask: jax.Array | None = None,
        capture: bool = False,
        step: int | jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Returns logits [B,T,V] in float32 and the dict of `backbone`.

        `batch` may be the token ids [B,T] alone; `keep` is an older name of `layer_mask`.
        """
        x, out = self.backbone(batch, keep if layer_mask is None else layer_mask, capture, step)
        return self.logits(x), out

    def logits(self, x: jax.Array) -> jax.Array:
        """Returns the logits [...,V] in float32 of hidden states [...,D], padding columns cut off."""
        with jax.default_matmul_precision('highest' if self.compute_dtype == 'float32' else None):
            head = self.embed.attend if self.config.tie_word_embeddings else self.head
            return head(x)[..., : self.config.vocab_size]

    @nn.nowrap
    def init(self, key):
        """Initial variables {'params': ...} in float32 (see initialize.py)."""
        return {'params': initialize(key, self.shapes()['params'], self.config, self.norm_position, self.depth)}

    @nn.nowrap
    def head_kernel(self, params):
        """The head's matrix [D,Vp] in a tree of parameters."""
        return params['embed']['embedding'].T if self.config.tie_word_embeddings else params['head']['kernel']

    @nn.nowrap
    def measured(self):
        """Whether some factors are set by `with_measured` before the first step."""
        return transformer.measured(self.norm_position)

    @nn.nowrap
    def with_measured(self, params, variances):
        """The parameters with those factors set, from Var[F] of every sub-layer [2L]."""
        omega = placements.admin_omega(variances)
        return params | {'layers': transformer.with_omega(params['layers'], self.norm_position, omega)}

    @nn.nowrap
    def shapes(self):
        """The variables as ShapeDtypeStructs."""
        return jax.eval_shape(super().init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))


def from_config(
    config: configs.Model, compute_dtype='bfloat16', stream_sharding=None, official=False, kernel='blocks'
) -> Llama:
    """The network of a config; `official`: with what the Mix-LN authors' code computes under each name; `kernel`: of
    attention.

    Raises UsageError for a `norm_position` that does not fit.
    """
    names = placements.resolve(config.norm_position, config.num_layers, config.post_ratio)
    if official:
        names = tuple(map(placements.official, names))
    if any(placements.PLACEMENTS[name].attention.grouped for name in names) and config.hidden_size % config.norm_groups:
        raise UsageError(
            f'config.model.hidden_size={config.hidden_size} does not divide by '
            f'config.model.norm_groups={config.norm_groups}'
        )
    layer_index = tuple(range(1, config.num_layers + 1))
    return Llama(config, names, layer_index, config.num_layers, compute_dtype, stream_sharding, kernel)


def num_params(config: configs.Model, params):
    """Parameters of the network, rows that only pad the vocabulary not counted."""
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    padding = params['embed']['embedding'].shape[0] - config.vocab_size
    return total - (1 if config.tie_word_embeddings else 2) * padding * config.hidden_size


def flops_per_position(num_params, embedding_params, num_layers, attention_width, seq_length):
    """FLOPs of training on one position: 6 N + 6 L T A; N parameters without the input embedding, which counts where it
    is the head too, A features of all query heads together; attention causal, no remat."""
    return 6 * (num_params - embedding_params) + 6 * num_layers * seq_length * attention_width

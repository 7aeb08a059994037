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
    trained when layers are removed.
    """

    config: configs.Model
    norm_position: tuple[str, ...]
    layer_index: tuple[int, ...]
    depth: int
    compute_dtype: str = 'bfloat16'
    stream_sharding: jax.sharding.NamedSharding | None = None  # of the residual stream; None: one device
    attention_kernel: str = 'blocks'  # see kernels/attention.py

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

    def trunk(self, ids, keep=None, capture=False, positions=None, segments=None):
        """Everything below the head.

        Args:
            ids: [B,T] int.
            keep: [L] bool, traced: layers that are False are the identity. None: all are kept.
            capture: whether to return the residual stream.
            positions: [B,T] int, of each token in its document. None: 0..T-1 in every row.
            segments: [B,T] int, the number of each token's document in its row, which attention does not leave; padding
                counts as a document. None: a row is one document.

        Returns:
            x [B,T,D] after the final norm, and a dict: with `capture`, `hidden` [L+1,B,T,D] is the raw residual
            stream, first what layer 1 sees, never after the final norm; `branches` has of every sub-layer [L,2,B,T],
            attention and MLP, `stream_norm` of the stream before it, `norm` and `mean` of what it adds.
        """
        with jax.default_matmul_precision('highest' if self.compute_dtype == 'float32' else None):
            positions = jnp.arange(ids.shape[1]) if positions is None else positions
            first = self.embed(ids)
            if self.config.scale_embed:  # Takase et al. 2023 (arXiv 2312.16903), Scaled Embed
                first = (first.astype(jnp.float32) * self.config.hidden_size**0.5).astype(first.dtype)
            if placements.PLACEMENTS[self.norm_position[0]].embed_norm:
                first = self.embed_norm(first)
            angles = rope.rotary_angles(positions, rope.rotary_frequencies(self.config))
            mask = None if segments is None else attention.document_mask(segments)
            last, out = self.layers(first, angles, mask, keep, capture)
            if capture:
                out['hidden'] = jnp.concatenate([first[None], out['hidden']])
            return self.norm(last), out or {}

    def __call__(self, ids, keep=None, capture=False, positions=None, segments=None):
        """Logits [B,T,V] in float32, and what `trunk` gives besides."""
        x, out = self.trunk(ids, keep, capture, positions, segments)
        return self.logits(x), out

    def logits(self, x):
        """The head: [...,V] float32 of what `trunk` gives [...,D], without the columns that pad the vocabulary."""
        with jax.default_matmul_precision('highest' if self.compute_dtype == 'float32' else None):
            head = self.embed.attend if self.config.tie_word_embeddings else self.head
            return head(x)[..., : self.config.vocab_size]

    @nn.nowrap
    def inputs(self, batch):
        """The arguments of `trunk` that a batch holds."""
        return {'ids': batch['inputs']} | {key: batch[key] for key in ('positions', 'segments') if key in batch}

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
        names = tuple(placements.OFFICIAL.get(name, name) for name in names)
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

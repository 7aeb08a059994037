"""BERT (Devlin et al. 2019, arXiv 1810.04805): embeddings, LayerNorm, the shared stack, a head."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixln_jax.kernels import attention
from mixln_jax.models import layers, placements, transformer
from mixln_jax.models.encoder import PARTS
from mixln_jax.models.layers import LayerNorm
from mixln_jax.models.network import Network
from mixln_jax.system.errors import UsageError

WORDS, SPANS = 'words', 'spans'  # heads


class Bert(Network):
    """BERT; see Network. `post` is Devlin et al.'s placement, and that of all published weights.

    `head`: `words` predicts tokens (the pre-training head of Devlin et al., without its bias over the vocabulary),
    `spans` finds the answers to questions, and with an empty name there is none.
    """

    head: str = WORDS

    causal: ClassVar[bool] = False
    padded: ClassVar[dict[str, int]] = {'words/embedding': 0}
    lookups: ClassVar[tuple[str, ...]] = ('positions/embedding', 'types/embedding')  # the words' table is the head too

    @property
    def longest(self) -> int:
        """Number of positions."""
        return self.config.num_positions

    @property
    def predicts_tokens(self) -> bool:
        """Whether the head has a column for each token of the vocabulary."""
        return self.head == WORDS

    @property
    def ends_in_norm(self) -> bool:
        """Whether the last layer ends in a norm; else there is a final one."""
        return placements.PLACEMENTS[self.norm_position[-1]].mlp.post

    def setup(self) -> None:
        config, dtype = self.config, jnp.dtype(self.compute_dtype)
        table = lambda rows: layers.Embedding(rows, config.hidden_size, dtype, self.stream_sharding)  # noqa: E731
        self.words = table(self.rows)
        self.positions = table(config.num_positions)
        self.types = table(config.num_types)
        self.embed_norm = LayerNorm(config.norm_eps, dtype)
        self.layers = transformer.Stack(
            config, dtype, self.norm_position, self.layer_index, self.depth, self.stream_sharding, PARTS
        )
        if not self.ends_in_norm:
            self.norm = LayerNorm(config.norm_eps, dtype)
        if self.head == WORDS:
            self.transform = layers.linear(config.hidden_size, dtype, None, bias=True)
            self.transform_norm = LayerNorm(config.norm_eps, dtype)
        elif self.head == SPANS:
            self.span = layers.linear(2, jnp.float32, None, bias=True)

    def backbone(
        self,
        batch: layers.Batch,
        layer_mask: jax.Array | None = None,
        capture: bool = False,
        step: int | jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        """Returns the hidden states that the head multiplies.

        Args:
            batch: `inputs` [B,T] int32, token ids; `types` [B,T], the kind of each token (default 0); `token_mask`
                [B,T], 0 at padding, which no token attends to (default: no padding); `positions` and `segment_ids` of
                packed rows as in Llama. Other arrays are ignored.
            layer_mask, capture, step: as in Llama.

        Returns:
            x [B,T,D] and a dict as in Llama: `hidden` begins with the normalised sum of the embeddings and ends with
            the output of layer L.

        Raises:
            UsageError: more tokens than the network has positions.
        """
        batch = layers.as_batch(batch)
        ids, most = batch['inputs'], self.config.num_positions
        if ids.shape[1] > most:
            said = f'rows of {ids.shape[1]} tokens, but BERT has {most} positions'
            raise UsageError(f'{said} (config.model.num_positions)')
        with jax.default_matmul_precision(self.precision):
            positions = batch.get('positions', jnp.arange(ids.shape[1])[None])
            types = batch.get('types', jnp.zeros_like(ids))
            first = self.embed_norm(self.words(ids) + self.types(types) + self.positions(positions))
            x, out = self.run_layers(first, None, _seen(batch), layer_mask, capture, step)
            x = x if self.ends_in_norm else self.norm(x)
            return self.transform_norm(nn.gelu(self.transform(x), False)) if self.head == WORDS else x, out

    def __call__(
        self,
        batch: layers.Batch,
        layer_mask: jax.Array | None = None,
        capture: bool = False,
        step: int | jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Returns logits [B,T,V] in float32 and the dict of `backbone`; with the head `spans` logits (start [B,T], end
        [B,T]) of where the answer to a question begins and ends."""
        if not self.head:
            raise UsageError('this BERT has no head: neither one that finds spans (qa_outputs) nor one for words')
        x, out = self.backbone(batch, layer_mask, capture, step)
        with jax.default_matmul_precision(self.precision):
            if self.head == WORDS:
                return self.words.attend(x)[..., : self.config.vocab_size], out
            start, end = jnp.moveaxis(self.span(x), -1, 0)
            return start, end

    @nn.nowrap
    def head_kernel(self, params: Any) -> jax.Array:
        """Returns the matrix [D,Vp] of the head `words`: the table of words."""
        return params['words']['embedding'].T

    @nn.nowrap
    def shapes(self) -> dict[str, Any]:
        """Returns the variables as ShapeDtypeStructs."""
        init = functools.partial(nn.Module.init, self, method='__call__' if self.head else 'backbone')
        return jax.eval_shape(init, jax.random.key(0), self.example())


def _seen(batch: Mapping[str, jax.Array]) -> jax.Array | None:
    """Which keys a query sees: a bool array that broadcasts to [B,1,T,T]; None: all of them."""
    masks = []
    if 'token_mask' in batch:
        masks.append(batch['token_mask'][:, None, None, :] > 0)
    if 'segment_ids' in batch:
        masks.append(attention.document_mask(batch['segment_ids']))
    return functools.reduce(jnp.logical_and, masks) if masks else None

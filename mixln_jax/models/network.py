"""What every family of networks has: its fields, its initial weights, and its numbers of parameters and FLOPs."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models import placements, transformer
from mixln_jax.models.initialize import initialize

SCORE = 'score/kernel'  # the head of a network with `num_outputs`
VOCAB_MULTIPLE = 128  # rows of embedding and head in memory, so that they tile and shard


class Network(nn.Module):
    """A network whose layers each have their own placement.

    `norm_position` [L] names the placements; `layer_index` [L] (from 1) and `depth` feed their constants and stay as
    trained when layers are removed. Ramps stand where they stood after `trained_steps` updates unless a step is passed;
    None: they are done. `num_outputs`: columns N of the head SCORE [D, N], where a task has one of its own; 0: the head
    has a column for each token of the vocabulary.

    A family is a subclass with two methods. `backbone(batch, layer_mask, capture, step)` returns the hidden states
    [B,T,D] that the head multiplies; `head_kernel(params)` returns the head's matrix [D,Vp].

    Class attributes: `reads`, texts or images; `causal`, whether a position sees only earlier ones; `padded`, the
    axis over the vocabulary of each leaf that has one, by path; `lookups`, the paths of tables that are only looked up;
    `undecayed`, those of tables that weight decay spares.
    """

    config: configs.Model
    norm_position: tuple[str, ...]
    layer_index: tuple[int, ...]
    depth: int
    compute_dtype: str = 'bfloat16'
    stream_sharding: jax.sharding.NamedSharding | None = None  # of the residual stream; None: one device
    attention_kernel: str = 'blocks'  # see kernels/attention.py
    trained_steps: int | None = None
    num_outputs: int = 0

    reads: ClassVar[str] = 'texts'
    causal: ClassVar[bool] = True
    padded: ClassVar[dict[str, int]] = {}
    lookups: ClassVar[tuple[str, ...]] = ()
    undecayed: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def check(cls, config: configs.Model) -> None:
        """Raises UsageError if the family has no network of these sizes."""

    def row_length(self, seq_length: int) -> int:
        """Returns the number of positions of a row, T, where texts have `seq_length` tokens."""
        return seq_length

    @property
    def initial_stds(self) -> dict[str, float]:
        """Standard deviations of the matrices that are not drawn as all others are, by path; 0: they are 0."""
        return {}

    @property
    def longest(self) -> int | None:
        """Number of positions in the longest row that the network can read; None: there is no limit."""
        return None

    @property
    def obstacle(self) -> str | None:
        """Why the network does not predict the next token, as what follows its name; None: it does."""
        if self.reads != 'texts':
            return f'reads {self.reads}'
        if not self.causal:
            return 'sees both sides of a token, so it does not predict the next one'
        if self.num_outputs:
            return f'has a head of size {self.num_outputs}, not one for words, so it does not predict the next token'
        return None

    @property
    def predicts_tokens(self) -> bool:
        """Whether the head has a column for each token of the vocabulary."""
        return self.reads == 'texts' and not self.num_outputs

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the head too."""
        return self.config.tie_word_embeddings and not self.num_outputs

    @property
    def rows(self) -> int:
        """Rows of the vocabulary in memory."""
        return -(-self.config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def head_columns(self) -> int:
        """Outputs of the head in memory."""
        return self.num_outputs or self.rows

    @property
    def precision(self) -> str | None:
        """Precision of matrix products: the highest in float32, which GPUs and TPUs would cut short."""
        return 'highest' if self.compute_dtype == 'float32' else None

    def run_layers(
        self,
        x: jax.Array,
        angles: Any,
        mask: jax.Array | None,
        layer_mask: jax.Array | None,
        capture: bool,
        step: int | jax.Array | None,
    ) -> tuple[jax.Array, dict]:
        """Returns the stream after the last layer, and what is captured, `hidden` from the input of layer 1 on; see
        `transformer.Stack`. `step` None: `trained_steps`."""
        last, out = self.layers(x, angles, mask, layer_mask, capture, self.trained_steps if step is None else step)
        return last, out | {'hidden': jnp.concatenate([x[None], out['hidden']])} if capture else {}

    @nn.nowrap
    def init(self, key: jax.Array) -> dict[str, Any]:  # type: ignore[override]
        """Returns initial variables {'params': ...} in float32; see initialize.py."""
        shapes = self.shapes()['params']
        drawn = initialize(key, shapes, self.config, self.norm_position, self.depth, self.padded, self.initial_stds)
        return {'params': drawn}

    @nn.nowrap
    def shapes(self) -> dict[str, Any]:
        """Returns the variables as ShapeDtypeStructs."""
        return jax.eval_shape(super().init, jax.random.key(0), self.example())

    @nn.nowrap
    def example(self) -> Any:
        """Returns a batch of one row that the network can read, as ShapeDtypeStructs."""
        return jax.ShapeDtypeStruct((1, 2), jnp.int32)

    @nn.nowrap
    def measured(self) -> bool:
        """Returns whether some factors are set by `with_measured` before the first step."""
        return transformer.measured(self.norm_position)

    @nn.nowrap
    def with_measured(self, params: Any, variances: jax.Array) -> Any:
        """Returns the parameters with those factors set, from Var[F] of every sub-layer [2L]."""
        omega = placements.admin_omega(variances)
        return params | {'layers': transformer.with_omega(params['layers'], self.norm_position, omega)}

    @nn.nowrap
    def without_padding(self, params: Any) -> Any:
        """Returns the parameters without the rows and columns that pad the vocabulary."""

        def cut(path: tuple, leaf: Any) -> Any:
            axis = self.padded.get(trees.path_name(path))
            return leaf if axis is None else leaf[(slice(None),) * axis + (slice(self.config.vocab_size),)]

        return jax.tree_util.tree_map_with_path(cut, params)

    @nn.nowrap
    def with_padding(self, params: Any) -> Any:
        """Returns numpy parameters, all or some, with rows and columns of zeros that pad the vocabulary."""
        shapes = dict(trees.named_leaves(self.shapes()['params']))

        def pad(path: tuple, leaf: np.ndarray) -> np.ndarray:
            whole = shapes[trees.path_name(path)].shape
            widths = [(0, size - n) for size, n in zip(whole, leaf.shape, strict=True)]
            return np.pad(leaf, widths) if any(map(any, widths)) else leaf

        return jax.tree_util.tree_map_with_path(pad, params)

    @nn.nowrap
    def num_params(self, params: Any) -> int:
        """Returns the number of parameters, without the rows and columns that pad the vocabulary."""
        return sum(
            leaf.size // leaf.shape[self.padded[name]] * self.config.vocab_size if name in self.padded else leaf.size
            for name, leaf in trees.named_leaves(params)
        )

    @nn.nowrap
    def flops_per_position(self, params: Any, seq_length: int) -> int:
        """Returns the FLOPs of training on one position in a row of `seq_length`, by formula; a tied embedding counts
        as the head that it is too."""
        leaves = dict(trees.named_leaves(params))
        looked_up = self.num_params({name: leaves[name] for name in self.lookups if name in leaves})
        if self.is_tied:
            looked_up = 0
        width = self.config.num_heads * self.config.head_size
        number = self.num_params(params)
        return flops_per_position(number, looked_up, self.config.num_layers, width, seq_length, self.causal)


def flops_per_position(
    num_params: int, looked_up: int, num_layers: int, attention_width: int, seq_length: int, causal: bool = True
) -> int:
    """Returns the FLOPs of training on one position: 6 N + 6 L T A, or 6 N + 12 L T A where attention sees both sides.

    Args:
        num_params: of the whole network.
        looked_up: parameters of tables that are not multiplied; N is `num_params` without them.
        num_layers: L.
        attention_width: A, the features of all query heads together.
        seq_length: T.
        causal: whether attention sees the positions before alone.
    """
    return 6 * (num_params - looked_up) + (6 if causal else 12) * num_layers * seq_length * attention_width

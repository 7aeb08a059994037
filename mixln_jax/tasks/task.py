"""What is learned, as the step, the evaluation and the lines for people see it.

A task knows what a batch holds, what its loss is and what the headline number is called. Everything else is shared.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np


class Context(NamedTuple):
    """What a loss may depend on besides the weights and the batch.

    `layer_mask` [L] bool: layers that are False are the identity; None: all of them run. `train`: whether it is the
    training loss. `step`: number of updates done, at which ramps stand; None: the model's `trained_steps`.
    """

    layer_mask: jax.Array | None = None
    train: bool = False
    step: jax.Array | None = None


class Losses(NamedTuple):
    """The losses of a batch: sums, which the caller adds up over batches and divides once.

    `sum`: of the losses, differentiable. `weight`: what the sum is divided by. `per_example` [B]: each example's own
    sum. `metrics`: more sums, by name; `tokens` counts real tokens.
    """

    sum: jax.Array
    weight: jax.Array
    per_example: jax.Array
    metrics: dict[str, jax.Array]


class Task(Protocol):
    """What the step, the evaluation, hooks and progress lines know of what is learned.

    `model` is the network. `headline` names the number that people look at first, `label` is its short name. `metrics`
    are the names of the sums that its losses have besides.
    """

    model: Any
    headline: str
    label: str
    metrics: tuple[str, ...]

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the arrays of a batch, by name."""

    def initial(self, params: Any) -> Any:
        """Returns the parameters that training begins with, of those that the model draws."""

    def losses(self, params: Any, batch: Mapping[str, jax.Array], context: Context) -> Losses:
        """Returns the losses of a batch; called inside jit."""

    def summary(self, totals: Mapping[str, float]) -> dict[str, float | None]:
        """Returns `loss`, the headline number and others, by name, of sums over batches.

        Args:
            totals: `sum`, `weight` and the task's metrics; in an evaluation `num_bytes` too, where it is known.
        """

    def baseline(self, batches: Iterable[Mapping[str, np.ndarray]]) -> float | None:
        """Returns the loss of a network that knows frequencies alone; None where that means nothing."""

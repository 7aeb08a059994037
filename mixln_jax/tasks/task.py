"""What is learned, as the step, the evaluation, the analyses and the lines for people see it.

A task knows what a batch holds, what its loss is and what its headline number is called. Everything else is shared.
"""

import abc
import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.models.network import Network

Batch = Mapping[str, jax.Array]  # arrays [B, ...] by name; see data/batches.py


class Context(NamedTuple):
    """What a loss may depend on besides the weights and the batch.

    `layer_mask` [L] bool: layers that are False are the identity; None: all of them run. `train`: whether it is the
    training loss. `step`: number of updates done, at which ramps stand; None: the model's `trained_steps`.
    `collections`: more variables of the network by the name of their flax collection, such as the keys of its dropout.
    `reference`: all weights of the network that training began with, where the task needs them.
    """

    layer_mask: jax.Array | None = None
    train: bool = False
    step: jax.Array | None = None
    collections: Mapping[str, Any] = types.MappingProxyType({})
    reference: Any = None

    @property
    def of_reference(self) -> 'Context':
        """The context of the reference network itself: all its layers, no dropout, ramps as when training began."""
        return Context(step=None if self.step is None else jnp.zeros_like(self.step))


EVALUATION = Context()


class Losses(NamedTuple):
    """The losses of a batch: sums, which the caller adds up over batches and divides once.

    `sum`: of the losses, differentiable. `weight`: what the sum is divided by. `per_example` [B]: each example's own
    sum, and `example_weight` [B] what that is divided by. `metrics`: more sums, by name; `tokens` counts real tokens.
    """

    sum: jax.Array
    weight: jax.Array
    per_example: jax.Array
    example_weight: jax.Array
    metrics: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """What the step, the evaluation, hooks, progress lines and analyses know of what is learned.

    `model` is the network. Equal tasks are equal as objects too, so that what is compiled for one serves the other.

    Class attributes: `reads`, what a network of the task reads, texts or images; `unit` and `short_unit`, what people
    count of it; `headline` names the number that people look at first, by which runs are compared, `label` is its short
    name and `digits` the decimals that are shown; `lower` names the numbers of `summary` that are better if lower, the
    others are better if higher; `headline_of_loss`, where the headline is a function of the mean loss, is that function
    and its derivative; `metrics` are the names of the task's further sums; `collect`, where the network itself writes
    what it learns from, is a function (rollouts, size) -> batch on the host, see tasks/online.py; `score`, where a task
    is measured by more than its losses, is a function (params, examples, batch_size, layer_mask) -> {name: [Q] in 0..1,
    of every question}.
    """

    model: Any

    reads: ClassVar[str] = 'texts'
    unit: ClassVar[str] = 'tokens'
    short_unit: ClassVar[str] = 'tok'
    headline: ClassVar[str]
    label: ClassVar[str]
    digits: ClassVar[int]
    lower: ClassVar[tuple[str, ...]] = ('loss',)
    headline_of_loss: ClassVar[tuple[Callable[[Any], Any], Callable[[Any], Any]] | None] = None
    metrics: ClassVar[tuple[str, ...]] = ('tokens',)
    collect: ClassVar[Callable[..., dict[str, np.ndarray]] | None] = None
    score: ClassVar[Callable[..., dict[str, np.ndarray]] | None] = None

    @property
    def needs_reference(self) -> bool:
        """Whether the losses depend on the network that training began with."""
        return False

    @property
    def precomputed(self) -> bool:
        """Whether batches bring what the network that training began with says of them, in place of the network."""
        return False

    @property
    def updates(self) -> int:
        """Updates of the weights in a step."""
        return 1

    @property
    def forward_passes(self) -> dict[str, float]:
        """The forward passes of a step that belong to no update, by what they are for; 1: one by all its positions."""
        return {'reference': 1.0} if self.needs_reference else {}

    def units(self, tokens: float) -> float:
        """Returns how many of `unit` a number of tokens is."""
        return tokens

    @classmethod
    def from_config(cls, config: configs.Config, model: Network) -> 'Task':
        """Returns the task of a run. Raises UsageError, naming the keys, where the network cannot learn it."""
        del config
        return cls(model)

    @abc.abstractmethod
    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the arrays of a batch, by name, before `prepare`."""

    @abc.abstractmethod
    def losses(self, params: Any, batch: Batch, context: Context = EVALUATION) -> Losses:
        """Returns the losses of a prepared batch; called inside jit. `params`: all weights of the network."""

    @abc.abstractmethod
    def position_mask(self, batch: Mapping[str, Any]) -> Any:
        """Returns [B,T]: 1 at the positions of the residual stream that count in measurements, 0 at others; a numpy
        array if the batch is numpy."""

    @abc.abstractmethod
    def summary(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns `loss`, the headline number and others, by name, of sums over batches.

        Args:
            totals: `sum`, `weight` and the task's metrics; in an evaluation `num_bytes` too, where it is known.
        """

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UsageError where the task needs an id that the tokenizer gives to a token of its own."""
        del tokenizer

    def initial(self, params: Any) -> Any:
        """Returns the parameters that training begins with, given those that the model draws."""
        return params

    def prepare(self, batch: Batch, key: jax.Array, train: bool) -> Batch:
        """Returns the batch that the network sees, with random choices made; called inside jit on a whole batch.

        Args:
            batch: the arrays of `batch_spec`.
            key: of the step; what is drawn for an example also depends on the example's `place` and on nothing else, so
                neither the mesh nor accumulation changes it.
            train: whether it is for the training loss.
        """
        del key, train
        return batch

    def baseline(self, batches: Iterable[Mapping[str, np.ndarray]]) -> float | None:
        """Returns the loss of a network that knows frequencies alone; None where that means nothing."""
        del batches
        return None


def example_keys(key: jax.Array, batch: Batch) -> jax.Array:
    """Returns a random key [B] for each example of a batch, made of the step's key and the example's place."""
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(batch['place'])

"""Examples: what training, evaluation and analyses read from a source of data, by number."""

import abc
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from mixln_jax.data.layout import Block, Layout

Batch = dict[str, np.ndarray]  # arrays [B, ...] by name
Numbers = Sequence[int] | np.ndarray


class Examples(Protocol):
    """A fixed number of examples. `fingerprint` identifies their content, part by part."""

    @property
    def fingerprint(self) -> dict[str, Any]: ...

    def __len__(self) -> int: ...

    def batch(self, numbers: Numbers, epochs: Numbers | None = None) -> Batch:
        """Returns the arrays [n, ...] of some examples.

        Args:
            numbers: [n], from 0.
            epochs: [n], the epoch in which each one is read: together with its number it decides every random choice.
                None: evaluation, where nothing is random, and `num_bytes` [n], the bytes of text that the targets of an
                example stand for, is there if it is known.

        Raises DataError, naming the record, for an example that cannot be read.
        """

    def origin(self, number: int) -> str:
        """Returns where an example comes from, for people."""


class Rows(abc.ABC):
    """Examples that are rows of tokens; `layout` tells how documents fill them, `by_length` whether the rows of the
    longest documents come first."""

    layout: Layout
    fingerprint: dict[str, Any]
    by_length: bool = False

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def origin(self, number: int) -> str:
        """See Examples."""

    @abc.abstractmethod
    def read(self, numbers: Numbers, sized: bool = False) -> Block:
        """Returns the rows [n, T+1], with their bytes of text if `sized`, or if they cost nothing."""

    def batch(self, numbers: Numbers, epochs: Numbers | None = None) -> Batch:
        """Returns `inputs`, `targets`, `loss_mask` and so on [n, T]; see `Layout.batch` and `Examples.batch`."""
        block = self.read(numbers, sized=epochs is None)
        batch = self.layout.batch(block)
        if epochs is None and block.num_bytes is not None:
            batch['num_bytes'] = block.num_bytes
        return batch

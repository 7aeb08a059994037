"""Rows of texts of which some tokens are learned, and what all tasks share that make them of records."""

import abc
import bisect
import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from mixln_jax import config
from mixln_jax.data import sources, splits
from mixln_jax.data.examples import Batch, Numbers, Rows
from mixln_jax.data.layout import Block
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system import console
from mixln_jax.system.errors import UsageError

Text = tuple[np.ndarray, np.ndarray]  # ids [n] int32, and which of them are learned, [n] bool


class LearnedRows(Rows):
    """Rows of T+1 tokens with one or more texts each, of which some tokens are learned; `layout` and `fingerprint` are
    for its subclasses to set."""

    def fill(self, texts: Sequence[Text], origins: Sequence[str], rows: Sequence[Sequence[int]], width: int) -> None:
        """Takes the texts of all rows.

        Args:
            texts: at least one.
            origins: where each text comes from, for people.
            rows: the numbers of the texts of each row, which fit into it.
            width: T+1.
        """
        self._ids, self._learned = (np.concatenate(parts) for parts in zip(*texts, strict=True))
        self._bounds = np.append(0, np.cumsum([len(ids) for ids, _ in texts]))
        self._origins, self._rows, self._width = origins, rows, width

    @property
    def largest_id(self) -> int:
        """The largest id of all rows, padding included."""
        return max(int(self._ids.max()), self.layout.pad_id)

    @property
    def seq_length(self) -> int:
        """T, positions in a row."""
        return self._width - 1

    @property
    def digest(self) -> str:
        """Returns what two sets of rows have in common if and only if they hold the same texts in the same places."""
        digest = hashlib.blake2b(digest_size=16)
        sizes = np.array([self._width, *map(len, self._rows)])
        for part in (self._ids, self._learned, self._bounds, sizes, np.concatenate(self._rows)):
            digest.update(np.asarray(part).tobytes())
        return digest.hexdigest()

    @abc.abstractmethod
    def remarks(self, split: str) -> list[str]:
        """Returns what a person should know about the rows, in lines."""

    def __len__(self) -> int:
        return len(self._rows)

    def origin(self, number: int) -> str:
        return ', '.join(dict.fromkeys(self._origins[text] for text in self._rows[number]))

    def read(self, numbers: Numbers, sized: bool = False) -> Block:
        return self._filled(numbers)[0]

    def batch(self, numbers: Numbers, epochs: Numbers | None = None) -> Batch:
        """Returns what `Rows.batch` does, with a `loss_mask` of 1 at targets that are learned alone."""
        block, learned = self._filled(numbers)
        batch = self.layout.batch(block)
        batch['loss_mask'] *= learned[:, 1:]
        return batch

    def _filled(self, numbers: Numbers) -> tuple[Block, np.ndarray]:
        """Returns rows, and which of their tokens are learned, [n, T+1] bool."""
        shape = len(numbers), self._width
        ids, ends = np.full(shape, self.layout.pad_id, np.int32), np.zeros(shape, bool)
        learned = np.zeros(shape, bool)
        for row, number in enumerate(np.asarray(numbers).tolist()):
            place = 0
            for text in self._rows[number]:
                start, end = self._bounds[text : text + 2]
                after = place + end - start
                ids[row, place:after], learned[row, place:after] = self._ids[start:end], self._learned[start:end]
                ends[row, after - 1] = True
                place = after
        return Block(ids, ends, None), learned


Made = TypeVar('Made', bound=LearnedRows)


def check_keys(data: config.Data, task: str, from_sources: Sequence[str], modes: Sequence[str]) -> None:
    """Raises UsageError for a source or mode that a task does not have."""
    for key, value, choices in (('source', data.source, from_sources), ('mode', data.mode, modes)):
        if value not in choices:
            raise UsageError(f'config.task.name={task} needs config.data.{key}={" or ".join(choices)}, not {value}')


def shown(rows: Made, split: str, tokenizer: Tokenizer, vocab_size: int) -> Made:
    """Returns rows after saying what a person should know about them. Raises UsageError for ids that a network of
    `vocab_size` does not have."""
    if (largest := rows.largest_id) >= vocab_size:
        raise UsageError(
            f'{tokenizer.origin}: the template makes id {largest}, too large for config.model.vocab_size={vocab_size}'
        )
    for line in rows.remarks(split):
        console.say(f'mixln_jax: {line}', file=sys.stderr)
    return rows


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Returns rows as lists of the numbers of their documents: best fit, the longest documents first.

    Args:
        lengths: of the documents, at most `size`.
        size: of a row.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(size + 1)]  # by the room that they have left
    rooms: list[int] = []  # in order, those of which there are rows
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        place = bisect.bisect_left(rooms, lengths[number])
        if place == len(rooms):
            row, room = len(rows), size
            rows.append([])
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del rooms[place]
        rows[row].append(number)
        room -= lengths[number]
        if not open_rows[room]:
            bisect.insort(rooms, room)
        open_rows[room].append(row)
    return rows


class Unit(Protocol):
    """A record; equal `unit`s are in the same split. `origin`: its file and line, for people."""

    @property
    def unit(self) -> bytes: ...

    @property
    def origin(self) -> str: ...


Record = TypeVar('Record', bound=Unit)


def of_split(data: config.Data, split: str, gather: Callable[[str, Any], list[Record]], task: str) -> list[Record]:
    """Returns the records of a split, in the order of the files.

    Args:
        data: the keys of a run's config.
        split: 'train', 'validation' or 'all'.
        gather: (data.source, ((path, size, time), ...) of its files or None) -> all records.
        task: the name of the task, for messages.

    Raises UsageError for a split that is not there; DataError as `gather`, and for too few records.
    """
    if split not in ('train', 'validation', 'all'):
        raise UsageError(f'config.task.name={task} has no split {split}, only train, validation and all')
    found = gather(data.source, splits.state(data, split))
    if split == 'all' or data.validation_path or (split == 'train' and not data.held_out):
        return found
    if not data.held_out:
        raise UsageError(
            'config.data.held_out=0 leaves no record for the split validation, unless config.data.validation_path '
            'names files of its own'
        )
    ranks = [sources.rank(record.unit) for record in found]
    first = sources.first_for_training(ranks, 1 / data.held_out, way='; config.data.held_out=0 needs none')
    return [record for record, rank in zip(found, ranks, strict=True) if (rank < first) == (split == 'validation')]

"""Rows of conversations for fine-tuning, of which only what the assistant says is learned."""

import bisect
import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from mixln_jax import config
from mixln_jax.data import chat, records, sources, stdlib, text_files
from mixln_jax.data.examples import Batch, Numbers, Rows
from mixln_jax.data.layout import Block, Layout
from mixln_jax.data.records import Conversation
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system import console
from mixln_jax.system.errors import DataError, UsageError

MODES, SOURCES = ('pad', 'pack'), ('jsonl', 'stdlib', 'shelves')


def open_rows(
    data: config.Data, split: str, tokenizer: Tokenizer, seq_length: int, vocab_size: int, learn: str
) -> 'Instructions':
    """Returns the conversations of a split as rows.

    Args:
        data: the keys of a run's config.
        split: 'train', 'validation' or 'all'.
        tokenizer: of the run.
        seq_length: T, positions in a row.
        vocab_size: of the network.
        learn: the value of config.task.learn.

    Raises:
        UsageError: a source, mode or split that conversations do not have; ids that the network does not have.
        DataError: as `records.read`, `chat.open_template` and its methods, naming file and line; nothing to learn.
    """
    for key, value, choices in (('source', data.source, SOURCES), ('mode', data.mode, MODES)):
        if value not in choices:
            raise UsageError(
                f'config.task.name=instructions needs config.data.{key}={" or ".join(choices)}, not {value}'
            )
    template = chat.open_template(data.template, tokenizer)
    rows = Instructions(
        of_split(data, split, _conversations, 'instructions'), template, tokenizer, data.mode, seq_length, learn
    )
    if (largest := rows.largest_id) >= vocab_size:
        raise UsageError(
            f'{tokenizer.origin}: the template makes id {largest}, too large for config.model.vocab_size={vocab_size}'
        )
    for line in rows.remarks(split):
        console.say(f'mixln_jax: {line}', file=sys.stderr)
    return rows


class Instructions(Rows):
    """Conversations as rows of T+1 tokens: one to a row (`pad`), or several that do not see each other (`pack`).

    A conversation of more than T+1 tokens is cut at its end. One of which nothing is left to learn is no example.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        template: chat.Template,
        tokenizer: Tokenizer,
        mode: str,
        seq_length: int,
        learn: str = 'completions',
    ):
        """Makes ids of all conversations.

        Raises DataError, naming file and line, as `chat.Template.tokens`; if there is nothing to learn.
        """
        self.layout = Layout(mode, tokenizer.pad_id, tokenizer.eos_id)
        self.num_cut, self.dropped = 0, list[str]()  # conversations that are cut; origins of those without an example
        self._size, self._origins = seq_length + 1, list[str]()
        ids, learned = [], []
        digest = hashlib.blake2b(digest_size=16)
        for conversation in conversations:
            said = [conversation.messages] + ([conversation.tools] if conversation.tools else [])
            digest.update('\n'.join([*map(json.dumps, said), '']).encode())
            try:
                tokens, flags = template.tokens(conversation.messages, learn, conversation.tools)
            except DataError as error:
                raise DataError(f'{conversation.origin}: {error}') from None
            self.num_cut += len(tokens) > self._size
            if not flags[1 : self._size].any():
                self.dropped.append(conversation.origin)
                continue
            ids.append(tokens[: self._size])
            learned.append(flags[: self._size])
            self._origins.append(conversation.origin)
        if not ids:
            raise DataError(
                f'none of {len(conversations):,} records has anything to learn in config.seq_length={seq_length} tokens'
                + (f', the first of them {self.dropped[0]}: ' if self.dropped else '; ')
                + ('raise config.seq_length' if self.num_cut else 'none has an answer of the assistant')
            )
        self._ids, self._learned = np.concatenate(ids), np.concatenate(learned)
        lengths = [len(tokens) for tokens in ids]
        self._bounds = np.append(0, np.cumsum(lengths)).tolist()
        self._rows = [[number] for number in range(len(ids))] if mode == 'pad' else pack(lengths, self._size)
        self.fingerprint = {
            'source': digest.hexdigest(),
            'tokenizer': tokenizer.fingerprint,
            'template': template.fingerprint,
            'learn': learn,
            'mode': mode,
            'seq_length': seq_length,
        }

    @property
    def largest_id(self) -> int:
        """The largest id of all rows, padding included."""
        return max(int(self._ids.max()), self.layout.pad_id)

    def remarks(self, split: str) -> list[str]:
        """Returns what a person should know about the rows, in lines."""
        total, size = len(self._origins) + len(self.dropped), self._size - 1
        learned = int(self._learned.sum())
        lines = [
            f'{split}: {len(self._origins):,} conversations in {len(self):,} rows; '
            f'{learned:,} of {len(self._ids):,} tokens are learned'
        ]
        if self.num_cut:
            lines.append(f'warning: {split}: {self.num_cut:,} of {total:,} records are cut to config.seq_length={size}')
        if self.dropped:
            lines.append(
                f'warning: {split}: {len(self.dropped):,} of {total:,} records have nothing to learn and are left out, '
                f'the first of them {self.dropped[0]}'
            )
        return lines

    def __len__(self) -> int:
        return len(self._rows)

    def origin(self, number: int) -> str:
        return ', '.join(self._origins[member] for member in self._rows[number])

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
        shape = len(numbers), self._size
        ids, ends = np.full(shape, self.layout.pad_id, np.int32), np.zeros(shape, bool)
        learned = np.zeros(shape, bool)
        for row, number in enumerate(np.asarray(numbers).tolist()):
            place = 0
            for member in self._rows[number]:
                start, end = self._bounds[member : member + 2]
                after = place + end - start
                ids[row, place:after], learned[row, place:after] = self._ids[start:end], self._learned[start:end]
                ends[row, after - 1] = True
                place = after
        return Block(ids, ends, None), learned


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
    """A record; equal `unit`s are in the same split."""

    @property
    def unit(self) -> bytes: ...


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
    state = None
    if data.source == 'jsonl':
        paths = text_files.paths(data.path)
        state = tuple((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths)
    found = gather(data.source, state)
    if split == 'all' or (split == 'train' and not data.held_out):
        return found
    if not data.held_out:
        raise UsageError('config.data.held_out=0 leaves no record for the split validation')
    ranks = [sources.rank(record.unit) for record in found]
    first = sources.first_for_training(ranks, 1 / data.held_out, way='; config.data.held_out=0 needs none')
    return [record for record, rank in zip(found, ranks, strict=True) if (rank < first) == (split == 'validation')]


@functools.lru_cache(maxsize=1)  # both splits come from one reading
def _conversations(source: str, state: Any) -> list[Conversation]:
    """Returns all conversations of a source. Those of shelves teach the form of an answer alone: which of the four it
    is is drawn by the hash of the name."""
    if source == 'stdlib':
        return [records.from_turns(question, answer, name) for question, answer, name in stdlib.questions()]
    if source == 'shelves':
        shelves = list(stdlib.SHELVES)
        return [
            records.from_turns(f'{name}\n', shelves[sources.rank(name.encode()) % len(shelves)], name)
            for name, _ in stdlib.shelves()
        ]
    return list(records.read([path for path, _, _ in state]))

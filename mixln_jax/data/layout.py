"""How documents fill rows of tokens, and how rows become a batch.

A row has T+1 tokens: input t is token t, and target t is the token after it, so that the step shifts nothing.
`data.mode` says how documents fill rows:

pad     one document per row: its first T-1 ids, eos, padding (as in the papers)
pack    documents side by side, each ended by eos; a document longer than a row is cut into pieces, each of which
        continues the one before; attention and positions stay inside a piece
concat  documents end to end, eos after each; attention crosses their boundaries
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

OPEN_ROWS = 64  # rows that packing keeps open
BLOCK = 256  # rows that are written at once, fewer if they are long
TOKENS = 2**20  # in a block, at most, unless it is a single row

# Names of a batch's arrays in what earlier versions wrote, and in `inspect --json`.
FORMER_NAMES = {'weights': 'loss_mask', 'segments': 'segment_ids'}

# A token before it is in a row: its id, the number of bytes of text that it stands for, and whether it ends a document.
TOKEN = np.dtype([('id', '<i4'), ('size', '<i4'), ('end', '?')])


class Block(NamedTuple):
    """Filled rows.

    `ids` [n, T+1]. `ends` [n, T+1] bool: the eos of each document; masks follow from it, never from ids, which text may
    share with padding. `num_bytes` [n]: number of bytes of text that each row's targets stand for; None if it is not
    known.
    """

    ids: np.ndarray
    ends: np.ndarray
    num_bytes: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the tokens of a row mean."""

    mode: str
    pad_id: int
    eos_id: int

    def document(self, ids: np.ndarray, spans: np.ndarray | None = None, num_bytes: int = 0) -> np.ndarray:
        """Returns a document as TOKENs [n+1], its eos last.

        Args:
            ids: [n].
            spans: [n], the byte of the text at which each id ends; None: sizes are not wanted.
            num_bytes: of the text; bytes that no id covers, such as a blank at its end, count for the eos.
        """
        tokens = np.zeros(len(ids) + 1, TOKEN)
        tokens['id'][:-1], tokens[-1] = ids, (self.eos_id, 0, True)
        if spans is not None:
            ends = np.append(spans, num_bytes)
            ends[1:] -= spans
            tokens['size'] = ends
        return tokens

    def block(self, tokens: np.ndarray) -> Block:
        """Returns rows of TOKENs [n, T+1] as a Block."""
        sizes = np.where(self._real(tokens['end']), tokens['size'][:, 1:], 0)
        return Block(tokens['id'], tokens['end'], sizes.sum(1, dtype=np.int64))

    def batch(self, block: Block) -> dict[str, np.ndarray]:
        """Returns rows as `inputs` and `targets` [B,T] int32 and `loss_mask` [B,T] float32, 1 for a real target; packed
        rows have `segment_ids` too (from 1; 0 for padding) and `positions` inside them (from 0)."""
        ids = block.ids.astype(np.int32)
        real = self._real(block.ends)
        batch = {'inputs': ids[:, :-1], 'targets': ids[:, 1:], 'loss_mask': real.astype(np.float32)}
        return batch | (_segments(block.ends[:, :-1], real) if self.mode == 'pack' else {})

    def _real(self, ends: np.ndarray) -> np.ndarray:
        """Returns [n,T] bool: the inputs whose target counts, which are all but an eos and the padding after the last
        eos of a row. A row without an eos is a piece of a longer document."""
        if self.mode == 'concat':
            return np.ones((len(ends), ends.shape[1] - 1), bool)
        numbers = np.arange(ends.shape[1] - 1, dtype=np.int32)
        last = np.where(ends.any(1), ends.shape[1] - 1 - ends[:, ::-1].argmax(1), len(numbers)).astype(np.int32)
        return (numbers < last[:, None]) & ~ends[:, :-1]


def _segments(ends: np.ndarray, real: np.ndarray) -> dict[str, np.ndarray]:
    """Returns `segment_ids` and `positions` [n,T] of inputs; of them `ends` end a document, `real` have a target."""
    starts = np.ones_like(ends)
    starts[:, 1:] = ends[:, :-1]
    first, counts = np.flatnonzero(starts), starts.sum(1)
    lengths = np.diff(first, append=ends.size)
    number = 1 + np.arange(len(first)) - np.repeat(counts.cumsum() - counts, counts)  # in its row
    everywhere = lambda values: np.repeat(values.astype(np.int32), lengths).reshape(ends.shape)  # noqa: E731
    positions = np.arange(ends.shape[1], dtype=np.int32) - everywhere(first % ends.shape[1])
    inside = real | ends
    return {'segment_ids': everywhere(number) * inside, 'positions': positions * inside}


def pad(row: np.ndarray, document: np.ndarray, layout: Layout) -> None:
    """Fills `row` [T+1] of TOKENs with the first T-1 of a document, eos and padding."""
    end = min(len(document), len(row) - 1)
    row[:end], row[end:] = document[:end], (layout.pad_id, 0, False)
    if end < len(document):
        row[end - 1] = (layout.eos_id, 0, True)


class Padded:
    """pad: one row for each document.

    Like the other classes it takes documents in `add` and calls `write` with Blocks of finished rows, in `close` with
    the last ones. The arrays of a block are reused after `write` returns.
    """

    def __init__(self, length: int, layout: Layout, write: Callable[[Block], None]):
        self._length, self._layout, self._write = length, layout, write
        self._block = np.empty((max(1, min(BLOCK, TOKENS // length)), length + 1), TOKEN)
        self._count = 0

    def add(self, document: np.ndarray) -> None:
        """Takes a document from `Layout.document`."""
        pad(self._block[self._count], document, self._layout)
        self._added()

    def close(self) -> None:
        """Writes the rows that are left; no document may follow."""
        self._write(self._layout.block(self._block[: self._count]))
        self._count = 0

    def _put(self, row: np.ndarray) -> None:
        self._block[self._count] = row
        self._added()

    def _added(self) -> None:
        self._count += 1
        if self._count == len(self._block):
            Padded.close(self)


class Packed(Padded):
    """pack: rows of whole documents and pieces of long ones, each put into the first of 64 open rows that has room.

    A piece that is not the last of its document fills a row by itself. The next piece begins with its last token, which
    was only a target, so every token but the first of a document is a target once.
    """

    def __init__(self, length: int, layout: Layout, write: Callable[[Block], None]):
        super().__init__(length, layout, write)
        self._empty = np.array((layout.pad_id, 0, False), TOKEN)
        self._rows = np.full((OPEN_ROWS, length + 1), self._empty)
        self._room = np.full(OPEN_ROWS, length + 1)

    def add(self, document: np.ndarray) -> None:
        last = (len(document) - 2) // self._length * self._length  # where the last piece begins; it has the eos
        for start in range(0, last, self._length):
            self._put(document[start : start + self._length + 1])
        piece = document[max(last, 0) :]
        if len(piece) < 2:  # a document without text
            return
        number = int((self._room >= len(piece)).argmax())
        row, room = self._rows[number], int(self._room[number])
        if room < len(piece):  # none has room: the fullest row is done
            number = int(self._room.argmin())
            row, room = self._rows[number], self._length + 1
            self._put(row)
            row[:] = self._empty
        start = self._length + 1 - room
        row[start : start + len(piece)] = piece
        self._room[number] = room - len(piece)

    def close(self) -> None:
        for row in self._rows[self._room <= self._length]:
            self._put(row)
        self._room[:] = self._length + 1
        super().close()


class EndToEnd:
    """concat: rows cut from the stream of tokens every T tokens; the rest at its end is dropped."""

    def __init__(self, length: int, layout: Layout, write: Callable[[Block], None]):
        self._length, self._layout, self._write = length, layout, write
        self._documents: list[np.ndarray] = []
        self._count = 0

    def add(self, document: np.ndarray) -> None:
        self._documents.append(document)
        self._count += len(document)
        if self._count > min(BLOCK * self._length, TOKENS):
            self.close()

    def close(self) -> None:
        if self._count > self._length:
            stream = np.concatenate(self._documents)
            cut = (self._count - 1) // self._length * self._length
            rows = np.lib.stride_tricks.sliding_window_view(stream, self._length + 1)[: cut : self._length]
            self._write(self._layout.block(rows))
            self._documents, self._count = [stream[cut:]], self._count - cut


Fill = Padded | EndToEnd
FILL: dict[str, type[Padded] | type[EndToEnd]] = {'pad': Padded, 'pack': Packed, 'concat': EndToEnd}


def dtype_for(vocab_size: int) -> np.dtype:
    """Returns the smallest type that holds the ids of a vocabulary."""
    return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')

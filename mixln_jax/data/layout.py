"""How documents fill rows of tokens, and how a batch of rows becomes what the step takes.

A row has T+1 tokens: its input t is token t, its target t the token after it, so that the step shifts nothing.
`data.mode` says how documents fill rows:

pad     one document a row: its first T-1 ids, eos, padding (the papers')
pack    documents side by side, each ended by eos; one longer than a row is cut into pieces that go on where the piece
        before ended; attention and positions stay inside a piece
concat  documents end to end, eos after each; attention runs across
"""

import dataclasses
from collections.abc import Callable

import numpy as np

OPEN_ROWS = 64  # rows that packing fills at a time
BLOCK = 256  # rows that are written at once


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the tokens of a row mean."""

    mode: str
    pad_id: int
    eos_id: int

    def batch(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """[B, T+1] tokens as the step's `inputs`, `targets` [B,T] int32 and `weights` [B,T] float32, 1 for a real
        target; packed rows have `segments` too (from 1; 0 for padding) and `positions` inside them (from 0)."""
        tokens = tokens.astype(np.int32)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if self.mode == 'concat':
            return {'inputs': inputs, 'targets': targets, 'weights': np.ones(inputs.shape, np.float32)}
        real = (inputs != self.eos_id) & (inputs != self.pad_id)
        batch = {'inputs': inputs, 'targets': targets, 'weights': real.astype(np.float32)}
        return batch | (self._segments(inputs, real) if self.mode == 'pack' else {})

    def _segments(self, inputs, real):
        follows_real = np.zeros_like(real)
        follows_real[:, 1:] = real[:, :-1]
        ends = follows_real & (inputs == self.eos_id)  # padding may use the same id
        starts = np.zeros_like(real)
        starts[:, 1:] = ends[:, :-1]
        at = np.arange(inputs.shape[1], dtype=np.int32)
        inside = real | ends
        positions = at - np.maximum.accumulate(np.where(starts, at, 0), axis=1)
        segments = 1 + np.cumsum(starts, axis=1, dtype=np.int32)
        return {'segments': np.where(inside, segments, 0), 'positions': np.where(inside, positions, 0)}


def pad(row: np.ndarray, ids: np.ndarray, layout: Layout):
    """Makes `row` [T+1] the first T-1 of `ids`, eos, padding."""
    end = min(len(ids), len(row) - 2)
    row[:end], row[end], row[end + 1 :] = ids[:end], layout.eos_id, layout.pad_id


class Padded:
    """pad: one row a document.

    Like the others it takes documents by `add`, calls `write` with blocks [k, T+1] of finished rows, and at `close`
    with what is left. A block is written over later.
    """

    def __init__(self, length: int, layout: Layout, write: Callable[[np.ndarray], None]):
        self._length, self._layout, self._write = length, layout, write
        self._block = np.empty((BLOCK, length + 1), np.int32)
        self._count = 0

    def add(self, ids: np.ndarray):
        """Takes the ids [n] of a document."""
        pad(self._block[self._count], ids, self._layout)
        self._added()

    def close(self):
        """No document comes any more."""
        self._write(self._block[: self._count])
        self._count = 0

    def _put(self, row):
        self._block[self._count] = row
        self._added()

    def _added(self):
        self._count += 1
        if self._count == BLOCK:
            Padded.close(self)


class Packed(Padded):
    """pack: rows of whole documents and pieces of long ones, each put into the first of 64 open rows that has room.

    A piece that is not the document's last fills a row by itself; the next begins with its last token, which was a
    target only: every token but a document's first is a target once.
    """

    def __init__(self, length, layout, write):
        super().__init__(length, layout, write)
        self._rows = np.full((OPEN_ROWS, length + 1), layout.pad_id, np.int32)
        self._room = np.full(OPEN_ROWS, length + 1)

    def add(self, ids):
        last = (len(ids) - 1) // self._length * self._length  # where the last piece begins; it ends with eos
        for start in range(0, last, self._length):
            self._put(ids[start : start + self._length + 1])
        ids = ids[max(last, 0) :]
        if not len(ids):
            return
        at = int((self._room > len(ids)).argmax())
        row, room = self._rows[at], int(self._room[at])
        if room <= len(ids):  # none has room: the fullest row is done
            at = int(self._room.argmin())
            row, room = self._rows[at], self._length + 1
            self._put(row)
            row[:] = self._layout.pad_id
        start = self._length + 1 - room
        end = start + len(ids)
        row[start:end], row[end] = ids, self._layout.eos_id
        self._room[at] = self._length - end

    def close(self):
        for row in self._rows[self._room <= self._length]:
            self._put(row)
        self._room[:] = self._length + 1
        super().close()


class EndToEnd:
    """concat: rows cut from the stream of tokens every T; what is left at its end is no row."""

    def __init__(self, length, layout, write):
        self._length, self._eos, self._write = length, np.array([layout.eos_id], np.int32), write
        self._held, self._count = [], 0

    def add(self, ids):
        self._held += [ids, self._eos]
        self._count += len(ids) + 1
        if self._count > BLOCK * self._length:
            self.close()

    def close(self):
        if self._count > self._length:
            stream = np.concatenate(self._held)
            cut = (self._count - 1) // self._length * self._length
            self._write(np.lib.stride_tricks.sliding_window_view(stream, self._length + 1)[: cut : self._length])
            self._held, self._count = [stream[cut:]], self._count - cut


FILL = {'pad': Padded, 'pack': Packed, 'concat': EndToEnd}


def dtype_for(vocab_size):
    """The smallest type that rows of tokens are kept in."""
    return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')

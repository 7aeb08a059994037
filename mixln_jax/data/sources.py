"""Sources of documents: plain text, by number.

A source in memory has a train and a validation split. A document's side follows from a hash of its text (stdlib: of the
name of its module), never from the order of files: 1 % (stdlib: 5 %) goes to validation, but at least 20 texts, or half
of fewer than 40. So equal texts are on the same side, and adding files to a large source moves no document.
"""

import array
import bisect
import functools
import hashlib
import os
import platform
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import xxhash

from mixln_jax import config
from mixln_jax.data import stdlib, text_files
from mixln_jax.system.errors import DataError

LARGEST = 10**9  # bytes of text in memory
HELD_OUT = {'stdlib': 20, 'jsonl': 100, 'text': 100}  # one in so many documents is for validation


class Source(Protocol):
    """Documents by number. `fingerprint` names their content: other documents, or another order, have another.

    That of a data set rests on its shape and a sample.
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> str: ...

    def __getitems__(self, indices: Sequence[int]) -> list[str]:
        """Several documents at once. Raises DataError, naming file and record, for one that cannot be read."""

    def origin(self, i: int) -> str:
        """Where a document stands, for people: file and line or record."""


def open_source(data: config.Data, split: str) -> Source:
    """The documents of `data.source` in `split`, 'train', 'validation' or 'all'; a data set may have others.

    tfds is a TensorFlow data set (see datasets.py). stdlib is the embedded corpus; jsonl and text are the files of
    `data.path`, see files.py.

    Raises DataError, naming file and line, for what is missing, unreadable or malformed; for more than 1 GB of text to
    hold in memory; and, of 'train' and 'validation', for fewer than two different documents, which cannot be split.
    """
    if data.source == 'tfds':
        from mixln_jax.data import datasets  # takes a second that nobody else need wait for

        return datasets.Dataset(data.name, split, data.data_dir)
    if split not in ('train', 'validation', 'all'):
        raise DataError(f'data.source={data.source} has no split {split} (there is train, validation, all)')
    state = None
    if data.source != 'stdlib':
        found = text_files.of_source(data.source, data.path)
        state = tuple((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in found)
    gathered = _gather(data.source, state)
    if split == 'all':
        return Texts(gathered, np.arange(len(gathered.ranks)))
    return Texts(gathered, np.flatnonzero((gathered.ranks < gathered.first_for_training) == (split == 'validation')))


class Texts:
    """Documents as one blob of UTF-8, so that each costs little more than its bytes."""

    def __init__(self, gathered, numbers):
        self._gathered, self._numbers = gathered, numbers
        digest = hashlib.blake2b(np.diff(gathered.ends, prepend=0)[numbers].tobytes(), digest_size=16)
        for i in range(len(self)):
            digest.update(self._bytes(i))
        self.fingerprint = gathered.prefix + digest.hexdigest()

    def __len__(self):
        return len(self._numbers)

    def __getitem__(self, i):
        return self._bytes(i).decode()

    def __getitems__(self, indices):
        return [self[i] for i in indices]

    def origin(self, i):
        number = self._numbers[i]
        file = self._gathered.names[self._gathered.places[number, 0]]
        return f'{file}:{self._gathered.places[number, 1]}'

    def _bytes(self, i):
        number = self._numbers[i]
        start = self._gathered.ends[number - 1] if number else 0
        return self._gathered.blob[start : self._gathered.ends[number]]


class _Gathered:
    """Every document of a source, both splits: `blob`, `ends` [n] in it, `ranks` [n], `places` [n, 2] (file, line)."""

    def __init__(self, one_in, prefix=''):
        self.prefix, self.blob, self.names, self._one_in = prefix, bytearray(), [], one_in
        self._ends, self._ranks, self._places = array.array('q'), array.array('Q'), array.array('q')

    def add(self, text, unit, file, line):
        if file not in self.names[-1:]:
            self.names.append(file)
        self.blob += text
        if len(self.blob) > LARGEST:
            raise DataError(
                f'config.data.path holds more than {LARGEST / 1e9:g} GB of text, too much for the memory of a run: '
                'make it a data set once with python -m mixln_jax.data.prepare, or name fewer files'
            )
        self._ends.append(len(self.blob))
        self._ranks.append(rank(unit))
        self._places.extend((len(self.names) - 1, line))

    def close(self):
        self.ends, self.ranks = np.array(self._ends, np.int64), np.array(self._ranks, np.uint64)
        self.places = np.array(self._places, np.int64).reshape(-1, 2)
        del self._ends, self._ranks, self._places

    @functools.cached_property
    def first_for_training(self):
        return np.uint64(first_for_training((int(number) for number in self.ranks), self._one_in))


@functools.lru_cache(maxsize=1)  # both splits come from one reading
def _gather(kind, state):
    """All documents of a source."""
    if kind == 'stdlib':
        gathered = _Gathered(HELD_OUT[kind], f'python-{platform.python_version()}-')
        for name, text in stdlib.gather():
            gathered.add(text.encode(), name.encode(), name, 1)
    else:
        gathered = _Gathered(HELD_OUT[kind])
        for path, _, _ in state:
            for line, record in text_files.Reader(kind, path):
                text = record['text'].encode()
                gathered.add(text, text, path, line)
    gathered.close()
    return gathered


def rank(unit: bytes) -> int:
    """The hash (XXH3), below 2^64, that sends what belongs together to one split."""
    return xxhash.xxh3_64_intdigest(unit)


def first_for_training(ranks: Iterable[int], one_in: int, key: str = 'config.data.path', way: str = '') -> int:
    """The rank below which documents are for validation: one in `one_in`, but at least 20, or half of fewer than 40.

    Reads no further than the answer needs. Raises DataError for fewer than two different ranks, naming the `key` that
    names the files and, where there is one, another `way` out.
    """
    share, count = 2**64 // one_in, 0
    smallest: list[int] = []
    for number in ranks:
        count += 1
        at = bisect.bisect_left(smallest, number)
        if at < 40 and smallest[at : at + 1] != [number]:
            smallest.insert(at, number)
            del smallest[40:]
            if len(smallest) >= 20 and smallest[19] < share:
                return share
    if len(smallest) < 2:
        documents = 'one document only' if count == 1 else f'{count:,} documents, all of the same text'
        raise DataError(f'{key} holds {documents}; two different ones are needed, one to validate on{way}')
    held_out = max(bisect.bisect_left(smallest, share), min(20, len(smallest) // 2))
    return smallest[min(held_out, len(smallest) - 1) - 1] + 1

"""Sources of documents: plain texts that have numbers.

A source in memory has a train and a validation split. The split of a document follows from a hash of its text (stdlib:
of the name of its module), never from the order of files. 1 % (stdlib: 5 %) of the documents are for validation, but at
least 20, or half of fewer than 40. Equal texts are therefore in the same split, and adding files to a large source
moves no document to another split.
"""

import array
import bisect
import functools
import hashlib
import platform
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import xxhash

from mixln_jax import config
from mixln_jax.data import splits, stdlib, text_files
from mixln_jax.system.errors import DataError, UsageError

LARGEST = 10**9  # bytes of text in memory
OF_IMAGES = 'images', 'idx', 'npz', 'digits'  # sources without text
HELD_OUT = {'stdlib': 20, 'jsonl': 100, 'text': 100}  # one of so many documents is for validation


class Source(Protocol):
    """Documents that have numbers."""

    fingerprint: str  # of content and order; the fingerprint of a data set covers its shape and a sample

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> str: ...

    def __getitems__(self, indices: Sequence[int]) -> list[str]:
        """Returns several documents. Raises DataError, which names file and record, if one cannot be read."""

    def origin(self, i: int) -> str:
        """Returns the place of a document for people: its file, and the line or record."""


def open_source(data: config.Data, split: str) -> Source:
    """Returns the documents of one split of `data.source`.

    tfds is a TensorFlow data set (datasets.py). stdlib is the embedded corpus (stdlib.py). jsonl and text are the files
    of `data.path` (text_files.py).

    Args:
        data: the keys of a run's config.
        split: 'train', 'validation' or 'all'; a data set has splits of its own.

    Raises:
        UsageError: a source of prompts or images alone.
        DataError: text is missing, unreadable or malformed (the message names file and line); it is more than the 1 GB
            that is held in memory; or there are fewer than two different documents, which cannot be split.
    """
    if data.source == 'tfds':
        from mixln_jax.data import datasets  # takes a second, which other sources need not spend

        return datasets.Dataset(data.name, split, data.data_dir)
    if data.source == 'shelves':
        raise UsageError('data.source=shelves has no text, only prompts: it is for tasks that learn to answer')
    if data.source in OF_IMAGES:
        raise UsageError(f'data.source={data.source} has no text, only images')
    if split not in ('train', 'validation', 'all'):
        raise DataError(f'data.source={data.source} has no split {split}, only train, validation and all')
    gathered = _gather(data.source, splits.state(data, split))
    if split == 'all' or data.validation_path:
        return Texts(gathered, np.arange(len(gathered.ranks)))
    return Texts(gathered, np.flatnonzero((gathered.ranks < gathered.first_for_training) == (split == 'validation')))


class Texts:
    """The documents of one split in one blob of UTF-8, so that each needs little more memory than its bytes."""

    def __init__(self, gathered: '_Gathered', numbers: np.ndarray):
        """Selects documents; `numbers` [n] are their places in `gathered`."""
        self._gathered, self._numbers = gathered, numbers
        digest = hashlib.blake2b(np.diff(gathered.ends, prepend=0)[numbers].tobytes(), digest_size=16)
        for i in range(len(self)):
            digest.update(self._bytes(i))
        self.fingerprint = gathered.prefix + digest.hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> str:
        return self._bytes(i).decode()

    def __getitems__(self, indices: Sequence[int]) -> list[str]:
        return [self[i] for i in indices]

    def origin(self, i: int) -> str:
        return self._gathered.origin(self._numbers[i])

    def _bytes(self, i: int) -> bytes:
        number = self._numbers[i]
        start = self._gathered.ends[number - 1] if number else 0
        return bytes(self._gathered.blob[start : self._gathered.ends[number]])


def shared(data: config.Data) -> str | None:
    """Returns `splits.remark` of the documents of data.path and data.validation_path."""
    training, evaluation = (_gather(data.source, splits.state(data, split)) for split in ('train', 'validation'))
    origins = {int(rank): evaluation.origin(number) for number, rank in reversed([*enumerate(evaluation.ranks)])}
    return splits.remark(map(int, training.ranks), origins)


class _Gathered:
    """All documents of a source: `blob`, `ends` [n] in the blob, `ranks` [n], `places` [n, 2] (file, line)."""

    def __init__(self, one_in: int, prefix: str = ''):
        """One of `one_in` documents will be for validation; fingerprints begin with `prefix`."""
        self.prefix, self.blob, self._one_in = prefix, bytearray(), one_in
        self.names: list[str] = []  # of the files
        self._ends, self._ranks, self._places = array.array('q'), array.array('Q'), array.array('q')

    def add(self, text: bytes, unit: bytes, file: str, line: int) -> None:
        """Adds a document; the hash of `unit` decides its split. Raises DataError beyond LARGEST bytes."""
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

    def close(self) -> None:
        """Makes arrays of the lists, after the last document."""
        self.ends, self.ranks = np.array(self._ends, np.int64), np.array(self._ranks, np.uint64)
        self.places = np.array(self._places, np.int64).reshape(-1, 2)
        del self._ends, self._ranks, self._places

    def origin(self, number: int) -> str:
        """Returns the file and line of a document."""
        file, line = self.places[number]
        return f'{self.names[file]}:{line}'

    @functools.cached_property
    def first_for_training(self) -> np.uint64:
        """The lowest rank of a document for training."""
        return np.uint64(first_for_training((int(number) for number in self.ranks), self._one_in))


@functools.lru_cache(maxsize=2)  # both splits come from one reading, or from files of their own
def _gather(kind: str, state: Any) -> _Gathered:
    """Returns all documents of a source; `state` are its files as (path, size, time), so that changed files are read
    again."""
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
    """Returns a hash (XXH3), below 2^64: it decides the split of documents that belong together."""
    return xxhash.xxh3_64_intdigest(unit)


def first_for_training(ranks: Iterable[int], one_in: float, key: str = 'config.data.path', way: str = '') -> int:
    """Returns the lowest rank of documents for training; lower ranks are for validation.

    One of `one_in` documents is for validation, but at least 20, or half of fewer than 40.

    Args:
        ranks: of all documents; they are read only as far as necessary.
        one_in: the inverse share of documents for validation.
        key: the setting that names the files, for messages.
        way: another way out, for messages.

    Raises:
        DataError: there are fewer than two different ranks.
    """
    share, count = int(2**64 // one_in), 0
    smallest: list[int] = []
    for number in ranks:
        count += 1
        place = bisect.bisect_left(smallest, number)
        if place < 40 and smallest[place : place + 1] != [number]:
            smallest.insert(place, number)
            del smallest[40:]
            if len(smallest) >= 20 and smallest[19] < share:
                return share
    if len(smallest) < 2:
        documents = 'only one document' if count == 1 else f'{count:,} documents, all with the same text'
        raise DataError(f'{key} holds {documents}; two different documents are needed, one of them for validation{way}')
    held_out = max(bisect.bisect_left(smallest, share), min(20, len(smallest) // 2))
    return smallest[min(held_out, len(smallest) - 1) - 1] + 1

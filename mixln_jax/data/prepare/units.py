"""The units of `data.prepare`: the parts of the input from which it makes one shard each, and their documents."""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mixln_jax import config
from mixln_jax.data import stdlib, text_files
from mixln_jax.system.errors import DataError, UsageError

if TYPE_CHECKING:
    from mixln_jax.data.datasets import Dataset

READ_AT_ONCE = 256  # records of a data set
ENDS = 2**16  # bytes at the beginning and the end of a file that its digest covers


@dataclasses.dataclass(frozen=True)
class Unit:
    """The input of shard `number` of `count` of one split; without a `split`, of both: hashes of texts decide."""

    split: str | None
    number: int
    count: int
    path: str  # of a file; the name of a data set's split
    size: int  # bytes as stored
    records: tuple[int, int] = (0, 0)  # of a data set: the first, and the one after the last
    digest: str = ''  # of the beginning and the end of a file

    @property
    def name(self) -> str:
        """The name of the unit in the names of its files."""
        return f'{self.split or "both"}-{self.number:05}'

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits for which the unit has a shard."""
        return (self.split,) if self.split else ('train', 'validation')


def list_units(data: config.Data, validation: str) -> list[Unit]:
    """Returns the units of a source: its files, or the shards of a data set, or the embedded corpus as one unit.

    Args:
        data: the source.
        validation: files, or the split of a data set, for validation; empty: a hash of the text decides, or the split
            `validation` of a data set.

    Raises:
        UsageError: a file, a copy of it, or a record is used both for training and for validation.
    """
    if data.source == 'stdlib':
        return [Unit(None, 0, 1, 'stdlib', sum(len(text) for _, text in stdlib.gather()))]
    if data.source == 'images':
        from mixln_jax.data.prepare import images  # decoders, which text does not need

        return images.list_units(data)
    if data.source == 'tfds':
        sides = {'train': data.split, 'validation': validation or 'validation'}
        if file := open_dataset(data, sides['train']).shares(open_dataset(data, sides['validation'])):
            raise UsageError(
                f'--split {sides["train"]} and --validation {sides["validation"]} share records of {file}; '
                "take, for instance, 'train[1%:]' and 'train[:1%]'"
            )
        return [unit for split, name in sides.items() for unit in _dataset_units(open_dataset(data, name), split, name)]
    if not validation:
        return _file_units(text_files.paths_of_source(data.source, data.path, '--path'), None)
    train = _file_units(text_files.paths_of_source(data.source, data.path, '--path'), 'train')
    held_out = _file_units(text_files.paths_of_source(data.source, validation, '--validation'), 'validation')
    known = {unit.digest: unit.path for unit in train}  # equal for links to a file and for its copies
    for unit in held_out:
        if (same := known.get(unit.digest)) == unit.path:
            raise UsageError(f'--path and --validation both name {same}')
        if same:
            raise UsageError(f'--path {same} and --validation {unit.path} are one file, or have the same content')
    return train + held_out


def _file_units(paths: Sequence[str], split: str | None) -> list[Unit]:
    return [
        Unit(split, i, len(paths), path, os.path.getsize(path), digest=_digest(path)) for i, path in enumerate(paths)
    ]


def _digest(path: str) -> str:
    """Returns a digest of the size and of the first and last bytes; a gzip file ends with a checksum of its content."""
    try:
        with open(path, 'rb') as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.blake2b(str(size).encode(), digest_size=16)
            for start in (0, max(size - ENDS, 0)):
                file.seek(start)
                digest.update(file.read(ENDS))
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f'{path}: cannot be read: {error}') from error


def _dataset_units(dataset: 'Dataset', split: str, name: str) -> Iterator[Unit]:
    starts = [0, *dataset.ends[:-1].tolist()]
    for i, records in enumerate(zip(starts, dataset.ends.tolist(), strict=True)):
        size = dataset.num_bytes * (records[1] - records[0]) // len(dataset)
        yield Unit(split, i, len(starts), name, max(size, 1), records)


class Documents(Protocol):
    """The documents of a unit, and counters that grow while they are read; see text_files.Reader."""

    empty: int
    bad: int
    skipped: list[str]

    @property
    def position(self) -> int:
        """How far the unit has been read, in bytes as stored."""

    def pairs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (the text whose hash decides the split, the record with its `text`)."""


class _FromFile(text_files.Reader):
    """The documents of a file; their text decides the split."""

    def pairs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((record['text'], record) for _, record in self)


class _FromStdlib:
    """The embedded corpus; the documents of a module are in the same split."""

    def __init__(self) -> None:
        self.empty = self.bad = self.position = 0
        self.skipped: list[str] = []

    def pairs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, text in stdlib.gather():
            self.position += len(text)
            yield name, {'text': text}


class _FromDataset:
    """The records of one shard of a data set, all of one split."""

    def __init__(self, data: config.Data, unit: Unit, skip_bad: int, largest: int):
        self.empty = self.bad = self.position = 0
        self.skipped: list[str] = []
        self._dataset, self._unit, self._skip_bad = open_dataset(data, unit.path), unit, skip_bad
        self._largest = largest

    def pairs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        first, end = self._unit.records
        for start in range(first, end, READ_AT_ONCE):
            numbers = range(start, min(start + READ_AT_ONCE, end))
            try:
                texts: Sequence[str | None] = self._dataset.__getitems__(numbers)
            except DataError as error:
                if isinstance(error.__cause__, TimeoutError):  # no record is bad: the bucket does not answer
                    raise
                texts = [self._one(number) for number in numbers]
            self.position = self._unit.size * (numbers[-1] + 1 - first) // (end - first)
            for number, text in zip(numbers, texts, strict=True):
                if text is None:
                    continue
                if 4 * len(text) > self._largest and len(text.encode()) > self._largest:
                    self._skip(f'{self._dataset.origin(number)}: more than {self._largest:,} bytes; {text_files.LONG}')
                elif not text.strip():
                    self.empty += 1
                else:
                    yield text, {'text': text}

    def _one(self, number: int) -> str | None:
        try:
            return self._dataset[number]
        except DataError as error:
            self._skip(str(error), error)
            return None

    def _skip(self, problem: str, error: DataError | None = None) -> None:
        if self.bad >= self._skip_bad:
            raise DataError(problem) from error
        self.bad += 1
        self.skipped = [*self.skipped, problem][:5]


@functools.lru_cache(maxsize=2)  # train and validation
def open_dataset(data: config.Data, split: str) -> 'Dataset':
    """Returns the data set of a split, which is opened once."""
    from mixln_jax.data import datasets  # takes a second, which other sources need not spend

    return datasets.Dataset(data.name, split, data.data_dir)


def read(data: config.Data, unit: Unit, skip_bad: int, largest: int = text_files.LARGEST) -> Documents:
    """Returns the documents of a unit.

    Args:
        data: the source.
        unit: from `list_units`.
        skip_bad: malformed records to leave out before one is an error.
        largest: bytes of a line or of a record; longer ones are malformed.
    """
    if data.source == 'stdlib':
        return _FromStdlib()
    if data.source == 'images':
        from mixln_jax.data.prepare import images

        return images.Documents(data, unit, skip_bad)
    if data.source == 'tfds':
        return _FromDataset(data, unit, skip_bad, largest)
    return _FromFile(data.source, unit.path, skip_bad, largest)

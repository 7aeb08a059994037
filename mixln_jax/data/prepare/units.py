"""The units of `data.prepare`: what it takes a shard from, and the documents in it."""

import dataclasses
import functools
import hashlib
import os

from mixln_jax import config
from mixln_jax.data import stdlib, text_files
from mixln_jax.system.errors import DataError, UsageError

READ_AT_ONCE = 256  # records of a data set
ENDS = 2**16  # bytes


@dataclasses.dataclass(frozen=True)
class Unit:
    """What one process turns into shard `number` of `count` of a split, or of both where the hash of a text decides."""

    split: str | None
    number: int
    count: int
    path: str  # of a file; the split of a data set
    size: int  # bytes as stored
    records: tuple[int, int] = (0, 0)  # of a data set
    digest: str = ''  # of what a file begins and ends with

    @property
    def name(self):
        return f'{self.split or "both"}-{self.number:05}'

    @property
    def splits(self):
        return (self.split,) if self.split else ('train', 'validation')


def list_units(data: config.Data, validation: str) -> list[Unit]:
    """The shards that a source makes: a file each; of a data set its own; one of the embedded corpus.

    Raises UsageError for a file, a copy of one or a record that is both to train and to validate on.
    """
    if data.source == 'stdlib':
        return [Unit(None, 0, 1, 'stdlib', sum(len(text) for _, text in stdlib.gather()))]
    if data.source == 'tfds':
        sides = {'train': data.split, 'validation': validation or 'validation'}
        if file := open_dataset(data, sides['train']).shares(open_dataset(data, sides['validation'])):
            raise UsageError(
                f'--split {sides["train"]} and --validation {sides["validation"]} share records of {file}; '
                "take, for instance, 'train[1%:]' and 'train[:1%]'"
            )
        return [unit for split, of in sides.items() for unit in _units_of(open_dataset(data, of), split, of)]
    if not validation:
        return _units_from(text_files.of_source(data.source, data.path, '--path'), None)
    train = _units_from(text_files.of_source(data.source, data.path, '--path'), 'train')
    held_out = _units_from(text_files.of_source(data.source, validation, '--validation'), 'validation')
    known = {unit.digest: unit.path for unit in train}  # also of links, other spellings and copies of a file
    for unit in held_out:
        if (also := known.get(unit.digest)) == unit.path:
            raise UsageError(f'--path and --validation both name {also}')
        if also:
            raise UsageError(f'--path {also} and --validation {unit.path} are one file, or have the same content')
    return train + held_out


def _units_from(paths, split):
    return [
        Unit(split, i, len(paths), path, os.path.getsize(path), digest=_digest(path)) for i, path in enumerate(paths)
    ]


def _digest(path):
    """Of the size, the first and the last bytes; those of a gzip file hold a checksum of its content."""
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


def _units_of(dataset, split, of):
    starts = [0, *dataset.ends[:-1].tolist()]
    for i, records in enumerate(zip(starts, dataset.ends.tolist(), strict=True)):
        size = dataset.num_bytes * (records[1] - records[0]) // len(dataset)
        yield Unit(split, i, len(starts), of, max(size, 1), records)


class _FromFile(text_files.Reader):
    """A file's documents; their text decides the split."""

    def __iter__(self):
        return ((record['text'], record) for _, record in super().__iter__())


class _FromStdlib:
    """The embedded corpus; a module is on one side."""

    empty = bad = position = 0
    skipped = ()

    def __iter__(self):
        for name, text in stdlib.gather():
            self.position += len(text)
            yield name, {'text': text}


class _FromDataset:
    """A shard of a data set, which has its split."""

    empty = bad = position = 0
    skipped = ()

    def __init__(self, data, unit, skip_bad, largest):
        self._dataset, self._unit, self._skip_bad = open_dataset(data, unit.path), unit, skip_bad
        self._largest = largest

    def __iter__(self):
        first, end = self._unit.records
        for start in range(first, end, READ_AT_ONCE):
            numbers = range(start, min(start + READ_AT_ONCE, end))
            try:
                texts = self._dataset.__getitems__(numbers)
            except DataError as error:
                if isinstance(error.__cause__, TimeoutError):  # no record is bad: the bucket is silent
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

    def _one(self, number):
        try:
            return self._dataset[number]
        except DataError as error:
            self._skip(str(error), error)

    def _skip(self, problem, error=None):
        if self.bad >= self._skip_bad:
            raise DataError(problem) from error
        self.bad += 1
        self.skipped = [*self.skipped, problem][:5]


@functools.lru_cache(maxsize=2)  # train and validation
def open_dataset(data: config.Data, split: str):
    """The datasets.Dataset of a split, opened once."""
    from mixln_jax.data import datasets  # takes a second that others need not wait for

    return datasets.Dataset(data.name, split, data.data_dir)


def read(data: config.Data, unit: Unit, skip_bad: int, largest: int = text_files.LARGEST):
    """The documents of a unit: pairs (what decides the split, record with `text`), with files.Reader's counters."""
    if data.source == 'stdlib':
        return _FromStdlib()
    if data.source == 'tfds':
        return _FromDataset(data, unit, skip_bad, largest)
    return _FromFile(data.source, unit.path, skip_bad, largest)

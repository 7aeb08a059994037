"""Units of images for `data.prepare`: shards of about 128 MB, in random order, so that a slice has all classes."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from mixln_jax import config
from mixln_jax.data import batches
from mixln_jax.data.images import decode, sources
from mixln_jax.data.prepare.units import Unit
from mixln_jax.system.errors import DataError

SHARD = 128 * 10**6  # bytes
SPLITS = ('train', 'validation')


@functools.lru_cache(maxsize=2)  # train and validation, once in each process
def open_source(data: config.Data, split: str) -> sources.OfFiles:
    """Returns the images of a split."""
    return sources.open_files(data, split)


def list_units(data: config.Data) -> list[Unit]:
    """Returns the units of both splits. Raises UsageError and DataError as `sources.open_source`."""
    units = []
    for split in SPLITS:
        source = open_source(data, split)
        size = source.num_bytes
        count = min(len(source), max(1, round(size / SHARD)))
        ends = [len(source) * number // count for number in range(count + 1)]
        for number, records in enumerate(zip(ends[:-1], ends[1:], strict=True)):
            share = max(1, size * (records[1] - records[0]) // len(source))
            units.append(Unit(split, number, count, source.origin(0), share, records, source.fingerprint))
    return units


class Documents:
    """The images of a unit, each decoded once to see that it can be; see units.Documents."""

    def __init__(self, data: config.Data, unit: Unit, skip_bad: int):
        self.empty = self.bad = self.position = 0
        self.skipped: list[str] = []
        self._data, self._unit, self._skip_bad = data, unit, skip_bad

    def pairs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields ('', {'image': its file, 'label', 'file_name'})."""
        source = open_source(self._data, str(self._unit.split))
        first, end = self._unit.records
        for number in batches.permuted(np.arange(first, end), len(source), 0, 0).tolist():
            try:
                [(content, label)] = source.read([number])
                _check(content, source.origin(number), self._data.max_pixels)
            except DataError as error:
                if self.bad >= self._skip_bad:
                    raise DataError(f'{error}; mend it, or leave out some with --skip_bad N') from error
                self.bad += 1
                self.skipped = [*self.skipped, str(error)][:5]
                continue
            self.position += len(content)
            yield '', {'image': content, 'label': label, 'file_name': source.name(number)}


def _check(content: Any, origin: str, max_pixels: int) -> None:
    """Raises DataError, naming the file, for an image that a run could not decode."""
    try:
        decode.decode(content, max_pixels)
    except DataError as error:
        raise DataError(f'{origin}: {error}') from error

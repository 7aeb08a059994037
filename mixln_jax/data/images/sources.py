"""Sources of images with labels: what a split of `data.source` holds, by number."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mixln_jax import config
from mixln_jax.data import sources
from mixln_jax.data.images import arrays, classes, files
from mixln_jax.system.errors import DataError, UsageError

MOST_CLASSES = 2**20  # of numbered ones
SAMPLED = 16  # images whose content the fingerprint of a large set covers

Image = bytes | np.ndarray  # a file, or pixels [H, W] or [H, W, 3] uint8

VALIDATION_KEY, VALIDATED = 'config.data.validation_path', ('images', 'npz')  # sources that it is for


class Source(Protocol):
    """Images that have numbers, and the class of each."""

    classes: tuple[str, ...]  # their names; a label is a place among them
    fingerprint: str  # of images, labels and order; of a large set it covers names and a sample

    def __len__(self) -> int: ...

    def read(self, numbers: Sequence[int]) -> list[tuple[Image, int]]:
        """Returns images and labels. Raises DataError, naming file or record, if one cannot be read."""

    def origin(self, number: int) -> str:
        """Returns the place of an image for people."""


def open_source(data: config.Data, split: str) -> Source:
    """Returns the images of one split of `data.source`.

    images is a folder, a zip file or a tar file with a folder for each class (classes.py); idx, npz and digits are
    arrays in memory (arrays.py); tfds is a TensorFlow data set with an image and a label (records.py).

    Args:
        data: the keys of a run's config.
        split: 'train', 'validation', 'all', or what the source has.

    Raises:
        UsageError: a source of text; no such split.
        DataError: images or labels are missing or malformed; the message names the file.
    """
    if data.source == 'tfds':
        from mixln_jax.data.images import records  # takes a second, which other sources need not spend

        return records.Records(data.name, split, data.data_dir)
    if data.source not in sources.OF_IMAGES:
        raise UsageError(
            f'config.data.source={data.source} has no images; {", ".join(sources.OF_IMAGES)} and tfds have'
        )
    if data.validation_path and data.source not in VALIDATED:
        raise UsageError(
            f'{VALIDATION_KEY} has no meaning for config.data.source={data.source}: it is for {" and ".join(VALIDATED)}'
        )
    if data.source == 'images':
        return open_files(data, split)
    return _in_memory(data, split)


def open_files(data: config.Data, split: str) -> 'OfFiles':
    """Returns the images of a split of files; see `classes.split`. A list of classes may follow the path of those to
    validate on, after a comma."""
    path, _, listed = data.validation_path.partition(',')
    others = files.open_files(path, VALIDATION_KEY) if path else None
    return OfFiles(classes.split(files.open_files(data.path), split, data.held_out, others, listed.strip()))


class OfFiles:
    """Images that are files."""

    def __init__(self, chosen: classes.Labelled):
        self._chosen, self._files, self.classes = chosen, chosen.files, chosen.classes
        digest = hashlib.blake2b(os.fsencode('\0'.join(self.classes)), digest_size=16)
        digest.update(chosen.labels.tobytes() + self._files.signature())
        for number in chosen.numbers.tolist():
            digest.update(os.fsencode(self._files.names[number]) + b'\0')
        for i in np.unique(np.linspace(0, len(self) - 1, SAMPLED).astype(int)).tolist():
            with contextlib.suppress(DataError):  # the image may be one of those that data.skip_bad replaces
                digest.update(hashlib.blake2b(self._content(i)).digest())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._chosen.numbers)

    def read(self, numbers: Sequence[int]) -> list[tuple[Image, int]]:
        return [(self._content(i), int(self._chosen.labels[i])) for i in numbers]

    @property
    def num_bytes(self) -> int:
        """Bytes of all images as they are stored."""
        return int(self._files.sizes()[self._chosen.numbers].sum())

    def name(self, number: int) -> str:
        """Returns the name of an image's file, without folders."""
        return self._files.names[int(self._chosen.numbers[number])].rpartition('/')[2]

    def origin(self, number: int) -> str:
        return self._files.origin(int(self._chosen.numbers[number]))

    def _content(self, i: int) -> bytes:
        try:
            return self._files.read(int(self._chosen.numbers[i]))
        except DataError as error:
            raise DataError(f'{self.origin(i)}: {error}') from error


class InMemory:
    """Images that are arrays [n, H, W] or [n, H, W, 3] uint8."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, names: tuple[str, ...], place: str, numbers: np.ndarray):
        """Takes the images `numbers` [n] of all; `place` is the file that they are in."""
        self._images, self._labels, self._numbers, self._place = images[numbers], labels[numbers], numbers, place
        self.classes = names
        digest = hashlib.blake2b(repr((images.shape[1:], names)).encode(), digest_size=16)
        digest.update(self._labels.tobytes())
        digest.update(self._images.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def read(self, numbers: Sequence[int]) -> list[tuple[Image, int]]:
        return [(self._images[i], int(self._labels[i])) for i in numbers]

    def origin(self, number: int) -> str:
        return f'{self._place}, image {self._numbers[number]}'


def _in_memory(data: config.Data, split: str) -> InMemory:
    """Returns the images of a split of idx, npz or digits; equal images are in the same split where hashes decide."""
    if data.source == 'idx':
        splits = arrays.idx(data.path)
    elif data.source == 'npz':
        splits = arrays.npz(data.path)
        if data.validation_path:
            splits['validation'] = arrays.npz(data.validation_path, VALIDATION_KEY)['train']
    else:
        splits = arrays.digits()
    (images, labels), place = splits['train']
    names = _classes(splits)
    chosen = {name: np.arange(len(pair[1])) for name, (pair, _) in splits.items()}
    if 'validation' not in splits and data.held_out:
        ranks = [sources.rank(image.tobytes()) for image in images]
        if len({*ranks}) < 2:
            raise DataError(f'{place}: all images are the same; two are needed, one of them for validation')
        first = sources.first_for_training(ranks, 1 / data.held_out)
        is_held = np.array(ranks, np.uint64) < np.uint64(first)
        chosen['validation'], chosen['train'] = np.flatnonzero(is_held), np.flatnonzero(~is_held)
    if 'validation' not in splits:
        chosen['all'] = np.arange(len(labels))
    if split not in chosen:
        way = '; config.data.held_out=0 leaves none' if split == 'validation' else ''
        raise UsageError(
            f'config.data.source={data.source} has no split {split}, only {", ".join(sorted(chosen))}{way}'
        )
    (images, labels), place = splits.get(split, splits['train'])
    return InMemory(images, labels, names, place, chosen[split])


def _classes(splits: dict[str, tuple[arrays.Arrays, str]]) -> tuple[str, ...]:
    """Returns the names of the classes, which are the numbers up to the largest label of the split train.

    Raises DataError for a set of one class, and for labels outside the classes.
    """
    (_, labels), place = splits['train']
    count = int(labels.max()) + 1
    if count > MOST_CLASSES:
        raise DataError(f'{place}: a label is {count - 1:,}; labels are the numbers of classes, counted from 0')
    if len(np.unique(labels)) < 2:
        raise DataError(f'{place}: all images are of the class {labels[0]}; two classes are needed')
    for (_, labels), place in splits.values():
        if len(outside := np.flatnonzero((labels < 0) | (labels >= count))):
            raise DataError(f'{place}: image {outside[0]} has the label {labels[outside[0]]}, outside 0 to {count - 1}')
    return tuple(map(str, range(count)))

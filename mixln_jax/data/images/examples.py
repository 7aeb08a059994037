"""Images as examples: what training and evaluation see of them."""

import functools
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixln_jax import config
from mixln_jax.data.examples import Batch, Numbers
from mixln_jax.data.images import augment, decode, sources
from mixln_jax.system import console
from mixln_jax.system.errors import DataError, UsageError

AT_ONCE = 32  # files in memory


def open_examples(data: config.Data, split: str, size: int, num_classes: int | None = None) -> 'Images':
    """Returns the images of a split as `data` says, of `size` x `size` pixels.

    Raises UsageError if there are not `num_classes` classes (None: any number); UsageError and DataError as
    `sources.open_source` and `augment.Augmentation`.
    """
    augmentation = augment.Augmentation(data.images, size)
    images = Images(sources.open_source(data, split), augmentation, size, data)
    if num_classes not in (None, count := len(images.classes)):
        raise UsageError(f'config.model.num_classes={num_classes}, but the images have {count} classes')
    return images


class Images:
    """Images with labels; see `examples.Examples`.

    `classes` are the names of the classes. An image that cannot be read or decoded is replaced by the next one that
    can, with its label, up to `data.skip_bad` of them in each process; every process that meets it does the same.
    """

    def __init__(self, source: sources.Source, augmentation: augment.Augmentation, size: int, data: config.Data):
        self._source, self._augmentation, self._size = source, augmentation, size
        self._seed, self._max_pixels, self._skip_bad = data.seed, data.max_pixels, data.skip_bad
        self._bad: set[int] = set()
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != '_lock'}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return self._source.classes

    @functools.cached_property
    def fingerprint(self) -> dict[str, Any]:
        """See Examples."""
        return {'source': self._source.fingerprint, 'classes': len(self.classes), 'size': self._size}

    def __len__(self) -> int:
        return len(self._source)

    def origin(self, number: int) -> str:
        """See Examples."""
        return self._source.origin(number)

    def batch(self, numbers: Numbers, epochs: Numbers | None = None) -> Batch:
        """Returns `images` [n, S, S, 3] uint8 and `labels` [n] int32.

        With `epochs` each image is varied by random numbers that follow from data.seed, its epoch and its number;
        without them it is the central crop. See `Examples.batch`.
        """
        chosen = np.asarray(numbers).tolist()
        batch: Batch = {
            'images': np.empty((len(chosen), self._size, self._size, 3), np.uint8),
            'labels': np.empty(len(chosen), np.int32),
        }
        for start in range(0, len(chosen), AT_ONCE):
            part = chosen[start : start + AT_ONCE]
            for i, (number, (pixels, label)) in enumerate(zip(part, self._decoded(part), strict=True), start):
                if epochs is None:
                    seen = self._augmentation.evaluation(pixels)
                else:
                    random = augment.generator(self._seed, int(epochs[i]), number)
                    seen = self._augmentation.training(pixels, random)
                batch['images'][i], batch['labels'][i] = seen, label
        return batch

    def _decoded(self, numbers: Sequence[int]) -> Any:
        """Yields (pixels [H, W, 3] uint8, label) of some images, or of what replaces them."""
        try:
            found: Sequence[Any] = self._source.read(numbers)
        except DataError:
            found = [None] * len(numbers)  # read one by one, to find the image that fails
        for number, item in zip(numbers, found, strict=True):
            yield self._pixels(number, item)

    def _pixels(self, number: int, item: Any) -> tuple[np.ndarray, int]:
        for tried in range(len(self)):
            place = (number + tried) % len(self)
            try:
                image, label = item if item and not tried else self._source.read([place])[0]
                return self._rgb(image, place), label
            except DataError as error:
                self._note(place, error)
        raise DataError(f'{self.origin(number)}: no image of the data can be read')

    def _rgb(self, image: sources.Image, number: int) -> np.ndarray:
        if isinstance(image, np.ndarray):
            return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        try:
            return decode.decode(image, self._max_pixels)
        except DataError as error:
            raise DataError(f'{self.origin(number)}: {error}') from error

    def _note(self, number: int, error: DataError) -> None:
        """Counts a bad image; raises its error if it is one too many, or if no image is to blame."""
        with self._lock:
            if isinstance(error.__cause__, TimeoutError):  # a bucket does not answer
                raise error
            if number in self._bad:
                return
            if len(self._bad) >= self._skip_bad:
                more = f' ({len(self._bad)} bad images before it)' if self._bad else ''
                raise DataError(f'{error}{more}; config.data.skip_bad=N replaces N such images') from error
            self._bad.add(number)
        console.say(f'mixln_jax: warning: {error}; the next image replaces it', file=sys.stderr)

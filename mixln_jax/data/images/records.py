"""TensorFlow data sets of images as a source; TensorFlow is never imported, and files are decoded by decode.py."""

from collections.abc import Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from mixln_jax.data import datasets
from mixln_jax.data.images.sources import Image
from mixln_jax.system.errors import DataError, first_line


class Records(datasets.Records):
    """Images and labels of a data set; see datasets.Records and sources.Source."""

    def _check_fields(self, info: tfds.core.DatasetInfo) -> None:
        self._image = _field(info, 'image', tfds.features.Image)
        self._label = _field(info, 'label', tfds.features.ClassLabel)
        feature = info.features[self._label]
        if feature.num_classes is None or feature.num_classes < 2:
            raise DataError(f'{info.data_dir}: `{self._label}` has {feature.num_classes} classes; two are needed')
        self.classes = tuple(feature.names)

    def read(self, numbers: Sequence[int]) -> list[tuple[Image, int]]:
        return [self._pair(i, record) for i, record in zip(numbers, self.raw(numbers), strict=True)]

    def _pair(self, i: int, record: bytes) -> tuple[Image, int]:
        try:
            fields = tf_example_pb2.Example.FromString(record).features.feature
            [image], [label] = fields[self._image].bytes_list.value, fields[self._label].int64_list.value
        except Exception as error:  # protobuf's own errors; fields that are missing or hold several values
            raise DataError(
                f'{self.origin(i)}: no image in `{self._image}` with a `{self._label}`: {first_line(error)}'
            ) from error
        if not 0 <= label < len(self.classes):
            raise DataError(f'{self.origin(i)}: label {label} is outside 0 to {len(self.classes) - 1}')
        return image, label


def _field(info: tfds.core.DatasetInfo, preferred: str, kind: Any) -> str:
    """Returns the name of the field of a kind: `preferred`, or the only one. Raises DataError."""
    names = [name for name, feature in info.features.items() if isinstance(feature, kind)]
    if preferred in names or len(names) == 1:
        return preferred if preferred in names else names[0]
    raise DataError(f'{info.data_dir}: no field `{preferred}` (fields: {", ".join(sorted(info.features))})')

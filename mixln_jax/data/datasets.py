"""TensorFlow data sets as a source: ArrayRecord shards or parquet, local or in a bucket, read without TensorFlow."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from mixln_jax.data import text_files
from mixln_jax.system import files
from mixln_jax.system.errors import DataError, first_line, reading

TIME_OUT = 20  # seconds within which a bucket must answer while a data set is opened
PATIENCE = 60  # the same while records are read: a run that has trained can afford to wait
LAST = 1  # the same after a bucket did not answer: batches that are read ahead should not each wait as long
SLOWEST = 10**6  # bytes per second at which parquet must arrive
IN_MEMORY = 10**9  # bytes; TFDS reads parquet whole


class Records:
    """The records of one split of a data set in `data_dir`/<name>/<version>, the layout of TFDS, as bytes.

    Args:
        name: 'c4/en', or 'c4/en:3.1.0' for one version; without a version the newest.
        split: a split, or a slice of one in TFDS's notation: 'train[10%:]'.
        data_dir: folder or gs:// address; empty: TFDS's default (~/tensorflow_datasets or $TFDS_DATA_DIR).

    Raises:
        DataError: the data set, version or split does not exist; a bucket does not answer within 20 seconds; a shard is
            missing or cut short; the file format has no random access; what the fields must be is missing. The message
            names folder or file. Reading raises DataError too, and names the record; if a bucket does not answer for a
            minute, its cause is a TimeoutError.
    """

    fingerprint: str  # a digest of the shape and of 16 records spread over the data set; reading all would take hours

    def __init__(self, name: str, split: str, data_dir: str = ''):
        root = data_dir or str(tfds.core.constants.DATA_DIR)
        limit = TIME_OUT if '://' in root else None
        with reading(f'data set {name} in {root}', DataError):  # TFDS, ArrayRecord and Arrow raise many kinds of errors
            if limit:
                _check_answers(root, limit)
            parent = epath.Path(root).expanduser()
            [builder] = _ask(
                limit, lambda name: tfds.builder_from_directory(_folder(parent, name)), [name], f'{{}} in {root}'.format
            )
            info, self.folder = builder.info, str(builder.data_path)
            parts = _parts(info, split)
            self._files = [part.filename for part in parts]
            self._skipped = [part.skip for part in parts]
            self.ends = np.cumsum([part.take for part in parts])  # number of the record after each shard
            self.num_bytes = info.splits[split].num_bytes
            text_files.allow_open(2 * len(self._files))
            _check_shards(info, parts, limit)
            self._check_fields(info)
            whole = info.file_format.value == 'parquet'  # it is read completely now
            self._limit: float | None = PATIENCE if limit and not whole else None
            [records] = _ask(
                limit and limit + whole * self.num_bytes / SLOWEST,
                lambda _: builder.as_data_source(
                    split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
                ),
                [self.folder],
            )
            self._records = records.data_source  # the wrapper would read the description again in each worker
            if len(self) != self.ends[-1]:
                raise DataError(f'{self.folder}: split {split} has {len(self)} records, not {self.ends[-1]}')
            self.fingerprint = self._digest()

    def _check_fields(self, info: tfds.core.DatasetInfo) -> None:
        """Raises DataError if a record has not the fields that are needed."""
        raise NotImplementedError

    def _digest(self) -> str:
        digest = hashlib.blake2b(f'{self.ends.tolist()} {self.num_bytes}'.encode(), digest_size=16)
        for content in self._contents(np.unique(np.linspace(0, len(self) - 1, 16).astype(int)).tolist()):
            digest.update(hashlib.blake2b(content).digest())
        return digest.hexdigest()

    def _contents(self, numbers: Sequence[int]) -> Iterable[bytes]:
        """Returns what the fingerprint covers of some records."""
        return self.raw(numbers)

    def __len__(self) -> int:
        return len(self._records)

    def raw(self, indices: Sequence[int]) -> Sequence[bytes]:
        """Returns records as they are stored."""
        return self._from_bucket(indices) if self._limit else self._from_folder(indices)

    def origin(self, i: int) -> str:
        i = range(len(self))[i]
        shard = int(np.searchsorted(self.ends, i, side='right'))
        first = self.ends[shard - 1] if shard else 0
        return f'{self._files[shard]}, record {i - first + self._skipped[shard]}'

    def shares(self, other: 'Records') -> str | None:
        """Returns the name of a file from which both data sets have the same record; None if there is no such file."""
        for file, first, end in self._spans():
            if any(file == name and first < stop and start < end for name, start, stop in other._spans()):
                return file
        return None

    def _spans(self) -> Iterator[tuple[str, int, int]]:
        """Returns the records of each file: (name, first record, record after the last)."""
        return zip(self._files, self._skipped, self._skipped + np.diff(self.ends, prepend=0), strict=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        text_files.allow_open(2 * len(self._files))

    def _from_folder(self, indices: Sequence[int]) -> Sequence[bytes]:
        try:
            return self._records.__getitems__(list(indices))
        except Exception:  # read one by one, to find the record that fails
            return [self._record(i) for i in indices]

    def _from_bucket(self, indices: Sequence[int]) -> Sequence[bytes]:
        """Reads records in threads that do not keep Python from ending if they hang, as ArrayRecord's own threads
        would."""
        try:
            return _ask(self._limit, self._record, indices, self.origin)
        except DataError as error:
            if isinstance(error.__cause__, TimeoutError):
                self._limit = min(self._limit or LAST, LAST)
            raise

    def _record(self, i: int) -> bytes:
        try:
            return self._records[i]
        except Exception as error:
            raise DataError(f'{self.origin(i)}: cannot be read: {first_line(error)}') from error


class Dataset(Records):
    """The texts of a data set; see Records and sources.Source. A DataError names the record without text."""

    def _check_fields(self, info: tfds.core.DatasetInfo) -> None:
        self._field = _text_field(info)
        self._features = tfds.features.FeaturesDict({self._field: tfds.features.Text()})

    def __getitem__(self, i: int) -> str:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[str]:
        return [self._text(i, record) for i, record in zip(indices, self.raw(indices), strict=True)]

    def _contents(self, numbers: Sequence[int]) -> Iterable[bytes]:
        return (text.encode() for text in self.__getitems__(numbers))

    def _text(self, i: int, record: bytes) -> str:
        if not record:
            raise DataError(f'{self.origin(i)}: cannot be read: the record is empty')
        try:
            return self._features.deserialize_example_np(record)[self._field].decode()
        except Exception as error:  # protobuf's own errors, a missing field, bytes that are not UTF-8
            raise DataError(f'{self.origin(i)}: no text in `{self._field}`: {first_line(error)}') from error


def _folder(root: epath.Path, name: str) -> epath.Path:
    """Returns the folder of a version, of the newest if the name has no version. Raises DataError."""
    name, _, version = name.partition(':')
    folder = root / name
    versions = {}
    if folder.exists():
        for path in folder.iterdir():
            if tfds.core.Version.is_valid(path.name) and (path / 'dataset_info.json').exists():
                versions[tfds.core.Version(path.name)] = path
    if version:
        versions = {number: path for number, path in versions.items() if str(number) == version}
    if not versions:
        present = ', '.join(sorted(path.name for path in folder.iterdir())) if folder.exists() else 'nothing'
        raise DataError(
            f'there is no data set {folder / (version or "<version>")}/dataset_info.json (there is {present}); '
            'config.data.data_dir is the folder above it, python -m mixln_jax.data.prepare makes it (docs/c4.md)'
        )
    newest = versions[max(versions)]
    for file in ('dataset_info.json', 'features.json'):
        if '://' not in str(newest) and (newest / file).exists():
            files.read(newest / file, DataError)  # TFDS would wait for a pipe, and read a file of any size
    return newest


def _parts(info: tfds.core.DatasetInfo, split: str) -> list[Any]:
    """Returns TFDS's reading instructions for a split or a slice, one for each file.

    Raises DataError if the files have no random access, or the split does not exist or is empty.
    """
    kind, folder = info.file_format.value, info.data_dir
    if kind not in ('array_record', 'parquet'):
        raise DataError(
            f'{folder}: {kind} files cannot be read in any order; convert them once: '
            f'tfds convert_format --dataset_dir={folder} --out_file_format=array_record'
        )
    if kind == 'parquet' and sum(split.num_bytes for split in info.splits.values()) > IN_MEMORY:
        raise DataError(
            f'{folder}: parquet is read into memory as a whole, and this is over 1 GB; convert it to array_record'
        )
    try:
        parts = [part for part in info.splits[split].file_instructions if part.take]
    except (KeyError, ValueError) as error:
        raise DataError(f'{folder}: no split {split} (there is {", ".join(info.splits) or "none"})') from error
    if not parts:
        raise DataError(f'{folder}: split {split} has no records')
    return parts


def _text_field(info: tfds.core.DatasetInfo) -> str:
    texts = [name for name, feature in info.features.items() if isinstance(feature, tfds.features.Text)]
    if 'text' in texts or len(texts) == 1:
        return 'text' if 'text' in texts else texts[0]
    raise DataError(f'{info.data_dir}: no field `text` (fields: {", ".join(sorted(info.features))})')


def _ask(
    limit: float | None, function: Callable[[Any], Any], items: Sequence[Any], name: Callable[[Any], str] = str
) -> list[Any]:
    """Returns the result of `text_files.call_each`; raises DataError, which begins with `name(item)`, if a bucket does
    not answer for `limit` seconds."""
    try:
        return text_files.call_each(limit, function, items)
    except text_files.NoAnswer as error:
        raise DataError(f'{name(error.item)}: {error}; is there a network?') from error


def _check_shards(info: tfds.core.DatasetInfo, parts: Sequence[Any], limit: float | None) -> None:
    """Raises DataError if a shard or a record is missing; otherwise training would discover it days later."""

    def check(part: Any) -> None:
        if not epath.Path(part.filename).exists():
            raise DataError(f'{part.filename}: missing')
        if epath.Path(part.filename).parent != epath.Path(info.data_dir):
            raise DataError(f'{info.data_dir}/dataset_info.json: names {part.filename}, which is in another folder')
        if '://' not in str(part.filename):
            files.regular(part.filename, DataError)
        if info.file_format.value == 'parquet':
            return
        try:
            reader = ArrayRecordReader(str(part.filename))
            count = reader.num_records()
            reader.close()
        except Exception as error:
            raise DataError(f'{part.filename}: cut short or damaged: {first_line(error)}') from error
        if count != part.examples_in_shard:
            raise DataError(f'{part.filename}: {count} records, but dataset_info.json has {part.examples_in_shard}')

    _ask(limit, check, parts, lambda part: part.filename)


def _check_answers(root: str, limit: float | None) -> None:
    try:
        _ask(limit, lambda root: list(epath.Path(root).iterdir()), [root], 'config.data.data_dir={}'.format)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f'config.data.data_dir={root}: {first_line(error)}') from error


def write_description(
    folder: str, name: str, features: Mapping[str, Any], splits: Mapping[str, Sequence[Mapping[str, Any]]]
) -> None:
    """Writes dataset_info.json and features.json, which make a folder of ArrayRecord shards a data set.

    Args:
        folder: of the shards.
        name: of the data set.
        features: TFDS's features of a record, by the names of its fields.
        splits: {split: {'documents', 'bytes'} of every shard, in order}.
    """
    path = epath.Path(folder)
    infos = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard['documents'] for shard in shards],
            num_bytes=sum(shard['bytes'] for shard in shards),
            filename_template=tfds.core.ShardedFileTemplate(
                dataset_name=name, data_dir=path, filetype_suffix='array_record', split=split
            ),
        )
        for split, shards in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=path,
        features=tfds.features.FeaturesDict(dict(features)),
        split_infos=infos,
        version=path.name,
        check_data=False,
    )


def texts(fields: Iterable[str]) -> dict[str, Any]:
    """Returns the features of records of texts."""
    return {field: tfds.features.Text() for field in fields}


def images(classes: Sequence[str]) -> dict[str, Any]:
    """Returns the features of images with labels, those of imagenet2012 in TFDS. The files may be of any format."""
    return {
        'image': tfds.features.Image(),
        'label': tfds.features.ClassLabel(names=list(classes)),
        'file_name': tfds.features.Text(),
    }

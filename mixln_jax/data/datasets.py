"""TensorFlow data sets as a source, read without TensorFlow: ArrayRecord shards or parquet, local or in a bucket."""

import hashlib
from collections.abc import Iterable

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath

from mixln_jax.data import text_files
from mixln_jax.system import files
from mixln_jax.system.errors import DataError, first_line, reading

TIME_OUT = 20  # seconds in which a bucket must answer while a data set is opened
PATIENCE = 60  # the same while records are read: they are worth a wait to a run that has trained
LAST = 1  # the same once it was silent: batches that are read ahead need not wait as long, one after the other
SLOWEST = 10**6  # bytes a second at which parquet must come
IN_MEMORY = 10**9  # bytes; TFDS reads parquet whole


class Dataset:
    """One split of a data set that lies in `data_dir`/<name>/<version>, TFDS's own layout; see sources.Source.

    Args:
        name: 'c4/en', or 'c4/en:3.1.0' for one version; without it the newest.
        split: its split, or a slice of one as TFDS spells it: 'train[10%:]'.
        data_dir: folder or gs:// address; empty: TFDS's default (~/tensorflow_datasets or $TFDS_DATA_DIR).

    Raises DataError, naming folder or file: no such data set, version or split, a bucket that does not answer within 20
    seconds, a shard that is missing or cut short, a file format without random access, no field with text. Reading
    raises it too, naming the record; of a bucket that is silent for a minute, from TimeoutError.
    """

    def __init__(self, name: str, split: str, data_dir: str = ''):
        root = data_dir or str(tfds.core.constants.DATA_DIR)
        limit = TIME_OUT if '://' in root else None
        with reading(f'data set {name} in {root}', DataError):  # whatever TFDS, ArrayRecord or Arrow may say
            if limit:
                _check_answers(root, limit)
            above = epath.Path(root).expanduser()
            [builder] = _ask(
                limit, lambda name: tfds.builder_from_directory(_folder(above, name)), [name], f'{{}} in {root}'.format
            )
            info, self.folder = builder.info, str(builder.data_path)
            parts = _parts(info, split)
            self._files = [part.filename for part in parts]
            self._skipped = [part.skip for part in parts]
            self.ends = np.cumsum([part.take for part in parts])  # number of the record behind each shard
            self.num_bytes = info.splits[split].num_bytes
            text_files.allow_open(2 * len(self._files))
            _check_shards(info, parts, limit)
            self._field = _text_field(info)
            self._features = tfds.features.FeaturesDict({self._field: tfds.features.Text()})
            whole = info.file_format.value == 'parquet'  # is read now
            self._limit = PATIENCE if limit and not whole else None
            [records] = _ask(
                limit and limit + whole * self.num_bytes / SLOWEST,
                lambda _: builder.as_data_source(
                    split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
                ),
                [self.folder],
            )
            self._records = records.data_source  # without what reads the description again where it is unpickled
            if len(self) != self.ends[-1]:
                raise DataError(f'{self.folder}: split {split} has {len(self)} records, not {self.ends[-1]}')
            self.fingerprint = self._digest()

    def __len__(self):
        return len(self._records)

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, indices):
        records = self._from_bucket(indices) if self._limit else self._from_folder(indices)
        return [self._text(i, record) for i, record in zip(indices, records, strict=True)]

    def origin(self, i):
        i = range(len(self))[i]
        shard = int(np.searchsorted(self.ends, i, side='right'))
        first = self.ends[shard - 1] if shard else 0
        return f'{self._files[shard]}, record {i - first + self._skipped[shard]}'

    def shares(self, other) -> str | None:
        """A file of which both have a record, or None."""
        for file, first, end in self._spans():
            if any(file == also and first < stop and start < end for also, start, stop in other._spans()):
                return file
        return None

    def _spans(self):
        """What it has of each file: (name, first record, the one after the last)."""
        return zip(self._files, self._skipped, self._skipped + np.diff(self.ends, prepend=0), strict=True)

    def __setstate__(self, state):
        self.__dict__.update(state)
        text_files.allow_open(2 * len(self._files))

    def _from_folder(self, indices):
        try:
            return self._records.__getitems__(list(indices))
        except Exception:  # which of them was it?
            return [self._record(i) for i in indices]

    def _from_bucket(self, indices):
        """In threads that do not, as ArrayRecord's own would, keep Python from ending where they hang."""
        try:
            return _ask(self._limit, self._record, indices, self.origin)
        except DataError as error:
            if isinstance(error.__cause__, TimeoutError):
                self._limit = min(self._limit, LAST)
            raise

    def _record(self, i):
        try:
            return self._records[i]
        except Exception as error:
            raise DataError(f'{self.origin(i)}: cannot be read: {first_line(error)}') from error

    def _text(self, i, record):
        if not record:
            raise DataError(f'{self.origin(i)}: cannot be read: nothing is there')
        try:
            return self._features.deserialize_example_np(record)[self._field].decode()
        except Exception as error:  # protobuf's own errors, a missing field, bytes that are no UTF-8
            raise DataError(f'{self.origin(i)}: no text in `{self._field}`: {first_line(error)}') from error

    def _digest(self):
        """Of the shape and of 16 records spread over all: reading everything would take hours."""
        digest = hashlib.blake2b(f'{self.ends.tolist()} {self.num_bytes}'.encode(), digest_size=16)
        for text in self.__getitems__(np.unique(np.linspace(0, len(self) - 1, 16).astype(int)).tolist()):
            digest.update(hashlib.blake2b(text.encode()).digest())
        return digest.hexdigest()


def _folder(root, name):
    """The folder of a version, the newest if none is named."""
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
        there = ', '.join(sorted(path.name for path in folder.iterdir())) if folder.exists() else 'nothing'
        raise DataError(
            f'there is no data set {folder / (version or "<version>")}/dataset_info.json (there is {there}); '
            'config.data.data_dir is the folder above it, python -m mixln_jax.data.prepare makes it (docs/c4.md)'
        )
    found = versions[max(versions)]
    for file in ('dataset_info.json', 'features.json'):
        if '://' not in str(found) and (found / file).exists():
            files.read(found / file, DataError)  # a pipe would be waited for, a large one fill the memory
    return found


def _parts(info, split):
    """What TFDS reads for a split or a slice of one, a file each. Raises DataError for what has no random access."""
    kind, where = info.file_format.value, info.data_dir
    if kind not in ('array_record', 'parquet'):
        raise DataError(
            f'{where}: {kind} files cannot be read in any order; convert them once: '
            f'tfds convert_format --dataset_dir={where} --out_file_format=array_record'
        )
    if kind == 'parquet' and sum(split.num_bytes for split in info.splits.values()) > IN_MEMORY:
        raise DataError(f'{where}: parquet is read into memory whole, over 1 GB; convert it to array_record')
    try:
        parts = [part for part in info.splits[split].file_instructions if part.take]
    except (KeyError, ValueError) as error:
        raise DataError(f'{where}: no split {split} (there is {", ".join(info.splits) or "none"})') from error
    if not parts:
        raise DataError(f'{where}: split {split} has no records')
    return parts


def _text_field(info):
    texts = [name for name, feature in info.features.items() if isinstance(feature, tfds.features.Text)]
    if 'text' in texts or len(texts) == 1:
        return 'text' if 'text' in texts else texts[0]
    raise DataError(f'{info.data_dir}: no field `text` (fields: {", ".join(sorted(info.features))})')


def _ask(limit, function, items, name=str):
    """files.each; DataError, which begins with `name(item)`, where a bucket has not answered for `limit` seconds."""
    try:
        return text_files.each(limit, function, items)
    except text_files.NoAnswer as error:
        raise DataError(f'{name(error.item)}: {error}; is there a network?') from error


def _check_shards(info, parts, limit):
    """All shards are there with all their records; else training would find out days later."""

    def check(part):
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
            found = reader.num_records()
            reader.close()
        except Exception as error:
            raise DataError(f'{part.filename}: cut short or damaged: {first_line(error)}') from error
        if found != part.examples_in_shard:
            raise DataError(
                f'{part.filename}: {found} records, not the {part.examples_in_shard} that dataset_info.json tells of'
            )

    _ask(limit, check, parts, lambda part: part.filename)


def _check_answers(root, limit):
    try:
        _ask(limit, lambda root: list(epath.Path(root).iterdir()), [root], 'config.data.data_dir={}'.format)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f'config.data.data_dir={root}: {first_line(error)}') from error


def write_description(folder: str, name: str, fields: Iterable[str], splits: dict[str, list[dict]]):
    """Makes a folder of ArrayRecord shards a data set: writes dataset_info.json and features.json.

    `splits` holds of every shard, in order, how many `documents` and `bytes` of examples it has.
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
    features = tfds.features.FeaturesDict({field: tfds.features.Text() for field in fields})
    tfds.folder_dataset.write_metadata(
        data_dir=path, features=features, split_infos=infos, version=path.name, check_data=False
    )

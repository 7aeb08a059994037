"""The shards of `data.prepare`: how one is written so that a kill leaves it whole or absent, and how they become a data
set."""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Callable

import xxhash

from mixln_jax import config
from mixln_jax.data import layout, prepared, rows, text_files, verify
from mixln_jax.data.prepare import units
from mixln_jax.data.sources import rank
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system import files, outputs
from mixln_jax.system.errors import DataError, UsageError, reading

FIELDS = ('text', 'url', 'timestamp', 'content-type', 'content-length')  # C4's in TFDS
REPORT = 2**18  # characters between reports
AT_ONCE = 2**17  # characters that are tokenised in one go


@dataclasses.dataclass(frozen=True)
class Job:
    """What to make of units, and where. `first` is the rank from which on a document is for training."""

    data: config.Data
    format: str
    out: str
    folder: str
    tokenizer: Tokenizer | None
    seq_length: int
    first: int | None
    skip_bad: int
    max_document: int = text_files.LARGEST

    def check_plan(self, all_units):
        """Makes the folder. Raises UsageError where it holds another preparation, naming what differs, or no
        preparation but something else, or is inside of another preparation."""
        notes = pathlib.Path(self.folder, prepared.WORK)
        for above in notes.parent.parents:
            if any((above / name).is_file() for name in (prepared.DESCRIPTION, f'{prepared.WORK}/plan.json')):
                raise UsageError(f'--out {self.out}: {above} holds another preparation; take another --out')
        if not notes.exists() and os.path.isdir(self.folder) and (there := sorted(os.listdir(self.folder))):
            raise UsageError(f'{self.folder} holds what no preparation made: {there[0]}; take another --out')
        notes.mkdir(parents=True, exist_ok=True)
        plan = {
            'source': self.data.source,
            'files': [[pathlib.Path(unit.path).name, unit.split] for unit in all_units],
            'format': self.format,
            'first for training': self.first,
        }
        if self.data.source == 'tfds':
            plan['data set'] = {unit.path: units.open_dataset(self.data, unit.path).fingerprint for unit in all_units}
        if self.tokenizer:
            plan |= {'tokenizer': self.tokenizer.fingerprint, 'mode': self.data.mode, 'seq-length': self.seq_length}
        path = notes / 'plan.json'
        try:
            before = files.read_json(path, DataError)
        except FileNotFoundError:
            before = plan
        if differ := [name.replace('-', '_') for name in plan | before if plan.get(name) != before.get(name)]:
            raise UsageError(
                f'{self.folder} holds another preparation: {", ".join(differ)} differs; take another --out'
            )
        outputs.write_json(path, plan)

    def lack_notes_alone(self, pending):
        """Whether the rows of all these units are there, without their notes, or those without a seal: made before."""
        return all(self.result(unit, notes=False) for unit in pending)

    def repeats(self, pending: list[units.Unit]) -> bool:
        """Whether all these units were finished before: what is written has to be the same rows."""
        return all(self.counted(unit) for unit in pending)

    def begin(self):
        """Some shards are to be written: until `finish`, no reader takes the folder for a data set."""
        description = 'dataset_info.json' if self.format == 'tfds' else prepared.DESCRIPTION
        pathlib.Path(self.folder, description).unlink(missing_ok=True)

    @contextlib.contextmanager
    def claimed(self, wanted: list[units.Unit]):
        """Inside, no other process prepares one of these units. Raises UsageError where one has claimed any of them."""
        text_files.allow_open(len(wanted))
        with contextlib.ExitStack() as claims:
            for unit in wanted:
                path = pathlib.Path(self.folder, prepared.WORK, f'{unit.name}.lock')
                busy = f'{path}: another process prepares this shard; wait for it, or share the work by --shards'
                if not claims.enter_context(outputs.locked(path, busy)):
                    break  # this file system has no locks, which one warning has told
            yield

    def clean(self, unit):
        """Removes what a killed worker left of a unit that this process has claimed."""
        for split in unit.splits:
            for file in (self.file(unit, split), prepared.notes_file(self.file(unit, split))):
                pathlib.Path(self.folder, f'{file}.partial').unlink(missing_ok=True)

    def file(self, unit, split):
        """The name of a unit's shard of `split`."""
        shard = f'{unit.number:05}-of-{unit.count:05}'
        if self.format == 'tokens':
            return f'{split}-{shard}.bin'
        return f'{dataset_name(self.data.name)}-{split}.array_record-{shard}'

    def result(self, unit, notes=True):
        """What a finished unit counted; None where its input is another since, or a shard is not whole; without `notes`
        no matter whether it has any, or sealed ones (prepared.py)."""
        result = self.counted(unit)
        if not result or result.get('damaged'):
            return None
        sizes = {}
        for split in unit.splits:
            sizes[result[split]['file']] = result[split]['size']
            if notes and self.format == 'tokens':
                sealed = 'sealed' in result[split]
                sizes[prepared.notes_file(result[split]['file'])] = result[split].get('notes') if sealed else None
        try:
            whole = all(pathlib.Path(self.folder, file).stat().st_size == size for file, size in sizes.items())
        except OSError:
            return None
        return result if whole else None

    def counted(self, unit: units.Unit) -> dict | None:
        """What a unit counted when it was finished, whatever has become of its shards; None where its input is another
        since, or nothing readable says."""
        path = self.counts(unit)
        try:
            result = files.read_json(path, DataError)
            with reading(path, DataError):
                for split in unit.splits:
                    if result[split]['file'] != self.file(unit, split):
                        raise ValueError('another file')
                    if self.format == 'tokens':
                        prepared.check_counts(result[split])
                    int(result[split]['size'] + result[split]['documents'])  # or they are no numbers
                int(result['empty'] + result['position'] + len(result['skipped']))
                return result if result['input'] == unit.digest and result['bad'] <= self.skip_bad else None
        except (FileNotFoundError, DataError):
            return None

    def verify(self, unit: units.Unit) -> str | None:
        """Reads the rows of a finished unit. Where they are damaged, notes that it is to be written again, and returns
        what is damaged."""
        dtype = layout.dtype_for(self.tokenizer.vocab_size)
        whole, result = self.result(unit), self.result(unit, notes=False)
        for split in unit.splits:
            shard = result[split] if whole else {name: result[split][name] for name in ('rows', 'digest')}
            try:
                verify.check_shard(str(pathlib.Path(self.folder, result[split]['file'])), shard, self.seq_length, dtype)
            except DataError as error:
                outputs.write_json(self.counts(unit), result | {'damaged': True})
                return str(error)
        return None

    def counts(self, unit: units.Unit) -> pathlib.Path:
        """The file that makes a unit finished."""
        return pathlib.Path(self.folder, prepared.WORK, f'{unit.name}.json')

    def finish(self, results):
        """Writes what makes the shards a data set."""
        if self.format == 'tfds':
            from mixln_jax.data import datasets

            datasets.write_description(self.folder, dataset_name(self.data.name), FIELDS, _of_splits(results))
            return
        self.tokenizer.save(pathlib.Path(self.folder, 'tokenizer'))
        about = {
            'mode': self.data.mode,
            'seq_length': self.seq_length,
            'dtype': layout.dtype_for(self.tokenizer.vocab_size).str,
            'pad_id': self.tokenizer.pad_id,
            'eos_id': self.tokenizer.eos_id,
            'tokenizer': self.tokenizer.fingerprint,
            'vocab_size': self.tokenizer.vocab_size,
            'splits': _of_splits(results),
        }
        outputs.write_json(pathlib.Path(self.folder, prepared.DESCRIPTION), about)

    def usage(self):
        """The keys that train on the data set."""
        if self.format == 'tfds':
            return f'--config.data.source=tfds --config.data.name={self.data.name} --config.data.data_dir={self.out}'
        return (
            f'--config.data.source=tokens --config.data.path={self.out} --config.data.tokenizer={self.tokenizer.kind} '
            f'--config.data.mode={self.data.mode} --config.seq_length={self.seq_length}'
        )


def _of_splits(results):
    """{split: what is known of its shards, in order}."""
    return {split: [result[split] for result in results if split in result] for split in ('train', 'validation')}


def dataset_name(name):
    """The first part of a data set's name, which its files bear: 'c4' of 'c4/en:3.1.0'."""
    return name.partition(':')[0].partition('/')[0]


def folder(out: str, format: str, name: str) -> pathlib.Path:
    """Where the shards lie: tokens in `out`, a data set in TFDS's layout below it, as version 3.1.0 if none is named
    (C4's, under which TFDS knows it)."""
    out = outputs.place(out)
    if format == 'tfds' and not re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)?(:\d+\.\d+\.\d+)?', name):
        raise UsageError(f'--name {name!r} is not NAME, NAME/CONFIG or NAME/CONFIG:1.2.3')
    name, _, version = name.partition(':')
    return out / name / (version or '3.1.0') if format == 'tfds' else out


def write(job: Job, unit: units.Unit, report: Callable, limit: int | None = None) -> dict:
    """Writes the shards of a unit, which the process, or the one that started it, has claimed; returns what it counted.

    Every shard is written under another name, then renamed; the counts, written last, make the unit finished.

    Args:
        report: called now and then with what came since: bytes as stored, documents, bytes of text.
        limit: bytes of text after which to stop, for a sample.

    Raises:
        DataError as the source does; UsageError where the rows are others than were finished before.
    """
    documents = units.read(job.data, unit, job.skip_bad, job.max_document)
    num_documents = num_bytes = 0
    reported = 0, 0, 0

    def tell():
        nonlocal reported
        now = documents.position, num_documents, num_bytes
        report(*(a - b for a, b in zip(now, reported, strict=True)))
        reported = now

    with contextlib.ExitStack() as closing:
        there, before = job.result(unit, notes=False) or {}, job.counted(unit) or {}
        writers = {}
        for split in unit.splits:
            path = pathlib.Path(job.folder, job.file(unit, split))
            writer = _WRITERS[job.format](job, path, there.get(split), before.get(split))
            writers[split] = closing.enter_context(writer)
        for decides, document in documents:
            split = unit.split or ('validation' if rank(decides.encode()) < job.first else 'train')
            writers[split].add(document)
            num_documents += 1
            num_bytes += len(document['text'])
            if num_bytes - reported[2] >= REPORT:
                tell()
            if limit and num_bytes > limit:
                break
        result = {split: writer.finish() for split, writer in writers.items()}
    result |= {'input': unit.digest} | {
        name: getattr(documents, name) for name in ('empty', 'bad', 'skipped', 'position')
    }
    tell()
    outputs.write_json(job.counts(unit), result)
    return result


class _Shard:
    """A file that has its name only when it is whole. Of the shard of this name: `there`, what it counted if it is
    whole, and `before`, what it counted whatever has become of it."""

    def __init__(self, job, path, there, before):
        del there, before
        self._job, self._path, self._partial = job, path, path.with_name(f'{path.name}.partial')
        self._documents = 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._partial.unlink(missing_ok=True)

    def _close(self, **counts):
        size = _finish(self._partial)
        return {'file': self._path.name, 'size': size, 'documents': self._documents} | counts


def _finish(partial):
    """Gives a written file its name; returns its size."""
    descriptor = os.open(partial, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    partial.rename(partial.with_suffix(''))
    return partial.with_suffix('').stat().st_size


class _Records(_Shard):
    """An ArrayRecord shard of TFDS examples, one record a chunk as random access wants it."""

    def __init__(self, job, path, there, before):
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.proto import tf_example_pb2

        super().__init__(job, path, there, before)
        self._example = tf_example_pb2.Example
        self._writer = ArrayRecordWriter(str(self._partial), 'group_size:1')
        self._bytes = 0

    def add(self, document):
        example = self._example()
        for name in FIELDS:
            value = document.get(name)
            example.features.feature[name].bytes_list.value.append(value.encode() if isinstance(value, str) else b'')
        example = example.SerializeToString(deterministic=True)  # else the order of the fields is each process's own
        self._writer.write(example)
        self._documents += 1
        self._bytes += len(example)

    def finish(self):
        self._writer.close()
        return self._close(bytes=self._bytes)

    def __exit__(self, *error):
        if self._writer.is_open():
            self._writer.close()
        super().__exit__(*error)


class _Tokens(_Shard):
    """Rows of tokens and their notes. Rows that are there already are not written again.

    Documents wait until there are some: tokenising them in one go keeps its tables in the caches.
    """

    def __init__(self, job, path, there, before):
        super().__init__(job, path, there, before)
        tokenizer = job.tokenizer
        self._layout = layout.Layout(job.data.mode, tokenizer.pad_id, tokenizer.eos_id)
        self._fill = layout.FILL[job.data.mode](job.seq_length, self._layout, self._write)
        self._dtype = layout.dtype_for(tokenizer.vocab_size)
        self._limit = job.seq_length if job.data.mode == 'pad' else None  # one id more than a row takes: is it cut?
        self._there, self._before = there, before
        self._notes_partial = path.with_name(f'{prepared.notes_file(path.name)}.partial')
        self._files = contextlib.ExitStack()
        self._notes = self._files.enter_context(self._notes_partial.open('wb'))
        self._file = self._files.enter_context(self._partial.open('wb'))
        self._waiting, self._size = [], 0
        self._digest = xxhash.xxh3_128()
        self._rows = 0

    def add(self, document):
        self._waiting.append(document['text'])
        self._size += len(document['text'])
        self._documents += 1
        if self._size >= AT_ONCE:
            self._tokenize()

    def finish(self):
        self._tokenize()
        self._fill.close()
        self._files.close()
        digest = self._digest.hexdigest()
        if self._before and self._before['digest'] != digest:
            raise UsageError(f'{self._path} holds other rows than its text gives today; take another --out')
        noted = prepared.note(self._job.seq_length)
        prepared.add_seal(self._notes_partial, noted, prepared.seal(self._path.name, digest))
        made = {'notes': _finish(self._notes_partial), 'sealed': True}
        return self._there | made if self._there else self._close(rows=self._rows, digest=digest, **made)

    def __exit__(self, *error):
        self._files.close()
        self._notes_partial.unlink(missing_ok=True)
        super().__exit__(*error)

    def _tokenize(self):
        waiting, self._waiting, self._size = self._waiting, [], 0
        for document in [rows.tokenized(text, self._job.tokenizer, self._layout, self._limit) for text in waiting]:
            self._fill.add(document)

    def _write(self, block):
        content = block.ids.astype(self._dtype).tobytes()
        if not self._there:
            self._file.write(content)
        self._notes.write(prepared.notes(block, self._dtype).tobytes())
        self._digest.update(content)
        self._rows += len(block.ids)


_WRITERS = {'tfds': _Records, 'tokens': _Tokens}

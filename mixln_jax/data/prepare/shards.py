"""The shards of `data.prepare`: a killed process leaves a shard complete or not at all."""

import abc
import contextlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Self

import xxhash

from mixln_jax.data import layout, prepared, rows
from mixln_jax.data.prepare import units
from mixln_jax.data.prepare.job import FIELDS, Job
from mixln_jax.data.sources import rank
from mixln_jax.system import outputs
from mixln_jax.system.errors import UsageError

REPORT = 2**18  # characters between reports
AT_ONCE = 2**17  # characters that are tokenised at a time


def write(job: Job, unit: units.Unit, report: Callable, limit: int | None = None) -> dict[str, Any]:
    """Writes the shards of a unit; returns its counts.

    This process, or the one that has started it, must have claimed the unit. Every shard is written under a temporary
    name and renamed. The counts are written last; they make the unit finished.

    Args:
        job: the preparation.
        unit: to write.
        report: called from time to time with the progress since the last call: bytes as stored, documents, bytes of
        text.
        limit: bytes of text after which to stop, for a sample; None: no limit.

    Raises:
        DataError: as the source does.
        UsageError: the rows differ from those that were finished before.
    """
    documents = units.read(job.data, unit, job.skip_bad, job.max_document)
    num_documents = num_bytes = 0
    reported = 0, 0, 0

    def tell() -> None:
        nonlocal reported
        now = documents.position, num_documents, num_bytes
        report(*(a - b for a, b in zip(now, reported, strict=True)))
        reported = now

    with contextlib.ExitStack() as closing:
        complete, before = job.result(unit, notes=False) or {}, job.counted(unit) or {}
        writers = {}
        for split in unit.splits:
            path = pathlib.Path(job.folder, job.file(unit, split))
            writer = _WRITERS[job.kind](job, path, complete.get(split), before.get(split))
            writers[split] = closing.enter_context(writer)
        for decides, document in documents.pairs():
            split = unit.split or ('validation' if rank(decides.encode()) < (job.first or 0) else 'train')
            writers[split].add(document)
            num_documents += 1
            num_bytes += len(document[job.content])
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


class _Shard(abc.ABC):
    """A file that gets its name when it is complete.

    `complete` are the counts of an existing complete shard of this name, `before` the counts of a shard that was
    complete once; both may be None.
    """

    def __init__(
        self, job: Job, path: pathlib.Path, complete: Mapping[str, Any] | None, before: Mapping[str, Any] | None
    ):
        del complete, before
        self._job, self._path, self._partial = job, path, path.with_name(f'{path.name}.partial')
        self._documents = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._partial.unlink(missing_ok=True)

    @abc.abstractmethod
    def add(self, document: Mapping[str, Any]) -> None:
        """Takes a document."""

    @abc.abstractmethod
    def finish(self) -> dict[str, Any]:
        """Completes the file; returns its counts."""

    def _close(self, **counts: Any) -> dict[str, Any]:
        size = _finish(self._partial)
        return {'file': self._path.name, 'size': size, 'documents': self._documents} | counts


def _finish(partial: pathlib.Path) -> int:
    """Gives a file its final name, after its content is on disk; returns its size."""
    descriptor = os.open(partial, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    partial.rename(partial.with_suffix(''))
    return partial.with_suffix('').stat().st_size


class _Records(_Shard):
    """An ArrayRecord shard of TFDS examples, with one record in each chunk for random access."""

    def __init__(
        self, job: Job, path: pathlib.Path, complete: Mapping[str, Any] | None, before: Mapping[str, Any] | None
    ):
        from array_record.python.array_record_module import ArrayRecordWriter
        from tensorflow_datasets.proto import tf_example_pb2

        super().__init__(job, path, complete, before)
        self._example = tf_example_pb2.Example
        self._writer = ArrayRecordWriter(str(self._partial), 'group_size:1')
        self._bytes = 0

    def add(self, document: Mapping[str, Any]) -> None:
        example = self._example()
        self._fill(example.features.feature, document)
        example = example.SerializeToString(
            deterministic=True
        )  # otherwise the order of the fields differs between processes
        self._writer.write(example)
        self._documents += 1
        self._bytes += len(example)

    def _fill(self, fields: Any, document: Mapping[str, Any]) -> None:
        for name in FIELDS:
            value = document.get(name)
            fields[name].bytes_list.value.append(value.encode() if isinstance(value, str) else b'')

    def finish(self) -> dict[str, Any]:
        self._writer.close()
        return self._close(bytes=self._bytes)

    def __exit__(self, *error: object) -> None:
        if self._writer.is_open():
            self._writer.close()
        super().__exit__(*error)


class _Images(_Records):
    """An ArrayRecord shard of images with labels."""

    def _fill(self, fields: Any, document: Mapping[str, Any]) -> None:
        fields['image'].bytes_list.value.append(document['image'])
        fields['label'].int64_list.value.append(document['label'])
        fields['file_name'].bytes_list.value.append(os.fsencode(document['file_name']))


class _Tokens(_Shard):
    """Rows of tokens and their notes. Existing complete rows are not written again.

    Documents are collected and tokenised together, so that the tables of the tokenizer stay in the caches.
    """

    def __init__(
        self, job: Job, path: pathlib.Path, complete: Mapping[str, Any] | None, before: Mapping[str, Any] | None
    ):
        super().__init__(job, path, complete, before)
        tokenizer = job.row_tokenizer
        self._layout = layout.Layout(job.data.mode, tokenizer.pad_id, tokenizer.eos_id)
        self._fill: layout.Fill = layout.FILL[job.data.mode](job.seq_length, self._layout, self._write)
        self._dtype = layout.dtype_for(tokenizer.vocab_size)
        self._limit = (
            job.seq_length if job.data.mode == 'pad' else None
        )  # the ids that a row can use; `tokenized` needs it to cut
        self._complete, self._before = complete, before
        self._notes_partial = path.with_name(f'{prepared.notes_file(path.name)}.partial')
        self._files = contextlib.ExitStack()
        self._notes = self._files.enter_context(self._notes_partial.open('wb'))
        self._file = self._files.enter_context(self._partial.open('wb'))
        self._waiting: list[str] = []
        self._size = 0
        self._digest = xxhash.xxh3_128()
        self._rows = 0

    def add(self, document: Mapping[str, Any]) -> None:
        self._waiting.append(document['text'])
        self._size += len(document['text'])
        self._documents += 1
        if self._size >= AT_ONCE:
            self._tokenize()

    def finish(self) -> dict[str, Any]:
        self._tokenize()
        self._fill.close()
        self._files.close()
        digest = self._digest.hexdigest()
        if self._before and self._before['digest'] != digest:
            raise UsageError(f'{self._path} holds other rows than its text gives now; give another --out')
        noted = prepared.note(self._job.seq_length)
        prepared.add_seal(self._notes_partial, noted, prepared.seal(self._path.name, digest))
        notes = {'notes': _finish(self._notes_partial), 'sealed': True}
        return {**self._complete, **notes} if self._complete else self._close(rows=self._rows, digest=digest, **notes)

    def __exit__(self, *error: object) -> None:
        self._files.close()
        self._notes_partial.unlink(missing_ok=True)
        super().__exit__(*error)

    def _tokenize(self) -> None:
        waiting, self._waiting, self._size = self._waiting, [], 0
        for document in [rows.tokenized(text, self._job.row_tokenizer, self._layout, self._limit) for text in waiting]:
            self._fill.add(document)

    def _write(self, block: layout.Block) -> None:
        content = block.ids.astype(self._dtype).tobytes()
        if not self._complete:
            self._file.write(content)
        self._notes.write(prepared.notes(block, self._dtype).tobytes())
        self._digest.update(content)
        self._rows += len(block.ids)


_WRITERS: dict[str, type[_Records | _Tokens]] = {'tfds': _Records, 'tokens': _Tokens, 'images': _Images}

"""A job of `data.prepare`: the plan of a folder, the state of its shards, and how they become a data set."""

import contextlib
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixln_jax import config
from mixln_jax.data import layout, prepared, text_files, verify
from mixln_jax.data.prepare import units
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system import files, outputs
from mixln_jax.system.errors import DataError, UsageError, reading

FIELDS = ('text', 'url', 'timestamp', 'content-type', 'content-length')  # of C4 in TFDS


@dataclasses.dataclass(frozen=True)
class Job:
    """The preparation of units into a folder."""

    data: config.Data
    format: str  # 'tfds' or 'tokens'
    out: str  # as the user gave it
    folder: str  # of the shards
    tokenizer: Tokenizer | None
    seq_length: int
    first: int | None  # the lowest rank of a document for training; None: units have their splits
    skip_bad: int
    max_document: int = text_files.LARGEST

    @property
    def row_tokenizer(self) -> Tokenizer:
        """The tokenizer of rows; a data set of texts has none."""
        assert self.tokenizer is not None, 'only rows of tokens have a tokenizer'
        return self.tokenizer

    @property
    def kind(self) -> str:
        """What the records are: tfds (texts), tokens or images."""
        return 'images' if self.data.source == 'images' else self.format

    @property
    def content(self) -> str:
        """The field of a document whose size counts."""
        return 'image' if self.data.source == 'images' else 'text'

    def check_plan(self, all_units: Sequence[units.Unit]) -> None:
        """Creates the folder and writes the plan into it.

        Raises:
            UsageError: the folder holds another preparation (the message names the differences) or anything else, or is
                inside another preparation.
        """
        work = pathlib.Path(self.folder, prepared.WORK)
        for parent in work.parent.parents:
            if any((parent / name).is_file() for name in (prepared.DESCRIPTION, f'{prepared.WORK}/plan.json')):
                raise UsageError(f'--out {self.out}: {parent} holds another preparation; give another --out')
        if not work.exists() and os.path.isdir(self.folder) and (present := sorted(os.listdir(self.folder))):
            raise UsageError(
                f'{self.folder} holds a file that no preparation has made: {present[0]}; give another --out'
            )
        work.mkdir(parents=True, exist_ok=True)
        plan: dict[str, Any] = {
            'source': self.data.source,
            'files': [[pathlib.Path(unit.path).name, unit.split] for unit in all_units],
            'format': self.format,
            'first for training': self.first,
        }
        if self.data.source == 'tfds':
            plan['data set'] = {unit.path: units.open_dataset(self.data, unit.path).fingerprint for unit in all_units}
        if self.data.source == 'images':
            plan['images'] = {unit.split: unit.digest for unit in all_units}
        if self.tokenizer:
            plan |= {'tokenizer': self.tokenizer.fingerprint, 'mode': self.data.mode, 'seq-length': self.seq_length}
        path = work / 'plan.json'
        try:
            before = files.read_json(path, DataError)
        except FileNotFoundError:
            before = plan
        if differ := [name.replace('-', '_') for name in plan | before if plan.get(name) != before.get(name)]:
            raise UsageError(
                f'{self.folder} holds another preparation: {", ".join(differ)} differs; give another --out'
            )
        outputs.write_json(path, plan)

    def lack_notes_alone(self, pending: Sequence[units.Unit]) -> bool:
        """Returns whether all these units have their rows and lack only notes or seals, as in folders of old
        versions."""
        return all(self.result(unit, notes=False) for unit in pending)

    def repeats(self, pending: list[units.Unit]) -> bool:
        """Returns whether all these units were finished before; their rows then have to be the same again."""
        return all(self.counted(unit) for unit in pending)

    def begin(self) -> None:
        """Removes the description, so that the folder is not a data set until `finish`."""
        description = 'dataset_info.json' if self.format == 'tfds' else prepared.DESCRIPTION
        pathlib.Path(self.folder, description).unlink(missing_ok=True)

    @contextlib.contextmanager
    def claimed(self, wanted: Sequence[units.Unit]) -> Iterator[None]:
        """Inside this context no other process prepares these units. Raises UsageError if one has claimed any of
        them."""
        text_files.allow_open(len(wanted))
        with contextlib.ExitStack() as claims:
            for unit in wanted:
                path = pathlib.Path(self.folder, prepared.WORK, f'{unit.name}.lock')
                busy = f'{path}: another process prepares this shard; wait for it, or share the work by --shards'
                if not claims.enter_context(outputs.locked(path, busy)):
                    break  # this file system has no locks; a warning has said so
            yield

    def clean(self, unit: units.Unit) -> None:
        """Removes the partial files that a killed worker has left of a unit that this process has claimed."""
        for split in unit.splits:
            for file in (self.file(unit, split), prepared.notes_file(self.file(unit, split))):
                pathlib.Path(self.folder, f'{file}.partial').unlink(missing_ok=True)

    def file(self, unit: units.Unit, split: str) -> str:
        """Returns the name of a unit's shard of `split`."""
        shard = f'{unit.number:05}-of-{unit.count:05}'
        if self.format == 'tokens':
            return f'{split}-{shard}.bin'
        return f'{dataset_name(self.data.name)}-{split}.array_record-{shard}'

    def result(self, unit: units.Unit, notes: bool = True) -> dict[str, Any] | None:
        """Returns the counts of a finished unit; None if its input has changed or a shard is not complete.

        With `notes`, a shard without notes, or with notes that are not sealed (prepared.py), is not complete either.
        """
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

    def counted(self, unit: units.Unit) -> dict[str, Any] | None:
        """Returns the counts of a unit that was finished, even if its shards are damaged now.

        None if its input has changed since, or if the counts are missing or unreadable.
        """
        path = self.counts(unit)
        try:
            result = files.read_json(path, DataError)
            with reading(path, DataError):
                for split in unit.splits:
                    if result[split]['file'] != self.file(unit, split):
                        raise ValueError('another file')
                    if self.format == 'tokens':
                        prepared.check_counts(result[split])
                    int(result[split]['size'] + result[split]['documents'])  # fails if these are not numbers
                int(result['empty'] + result['position'] + len(result['skipped']))
                return result if result['input'] == unit.digest and result['bad'] <= self.skip_bad else None
        except (FileNotFoundError, DataError):
            return None

    def verify(self, unit: units.Unit) -> str | None:
        """Reads the rows of a finished unit; returns a description of the damage, or None.

        A damaged unit is marked, so that it is written again.
        """
        dtype = layout.dtype_for(self.row_tokenizer.vocab_size)
        whole, result = self.result(unit), self.result(unit, notes=False)
        if result is None:
            raise ValueError(f'{unit.name} is not finished')
        for split in unit.splits:
            shard = result[split] if whole else {name: result[split][name] for name in ('rows', 'digest')}
            try:
                verify.check_shard(str(pathlib.Path(self.folder, result[split]['file'])), shard, self.seq_length, dtype)
            except DataError as error:
                outputs.write_json(self.counts(unit), result | {'damaged': True})
                return str(error)
        return None

    def counts(self, unit: units.Unit) -> pathlib.Path:
        """Returns the file with the counts of a unit; it is written when the unit is finished."""
        return pathlib.Path(self.folder, prepared.WORK, f'{unit.name}.json')

    def finish(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Writes the description that makes the shards a data set; `results` are the counts of all units."""
        if self.format == 'tfds':
            from mixln_jax.data import datasets

            features = datasets.texts(FIELDS)
            if self.kind == 'images':
                from mixln_jax.data.prepare import images

                features = datasets.images(images.open_source(self.data, 'train').classes)
            name = dataset_name(self.data.name)
            datasets.write_description(self.folder, name, features, _shards_by_split(results))
            return
        tokenizer = self.row_tokenizer
        tokenizer.save(pathlib.Path(self.folder, 'tokenizer'))
        about = {
            'mode': self.data.mode,
            'seq_length': self.seq_length,
            'dtype': layout.dtype_for(tokenizer.vocab_size).str,
            'pad_id': tokenizer.pad_id,
            'eos_id': tokenizer.eos_id,
            'tokenizer': tokenizer.fingerprint,
            'vocab_size': tokenizer.vocab_size,
            'splits': _shards_by_split(results),
        }
        outputs.write_json(pathlib.Path(self.folder, prepared.DESCRIPTION), about)

    def usage(self) -> str:
        """Returns the command-line words with which a run trains on the data set."""
        if self.format == 'tfds':
            return f'--config.data.source=tfds --config.data.name={self.data.name} --config.data.data_dir={self.out}'
        return (
            f'--config.data.source=tokens --config.data.path={self.out} '
            f'--config.data.tokenizer={self.row_tokenizer.kind} '
            f'--config.data.mode={self.data.mode} --config.seq_length={self.seq_length}'
        )


def _shards_by_split(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Returns {split: the counts of its shards, in order}."""
    return {split: [result[split] for result in results if split in result] for split in ('train', 'validation')}


def dataset_name(name: str) -> str:
    """Returns the first part of a data set's name, which is part of its files' names: 'c4' for 'c4/en:3.1.0'."""
    return name.partition(':')[0].partition('/')[0]


def folder(out: str, format: str, name: str) -> pathlib.Path:
    """Returns the folder of the shards.

    For rows of tokens it is `out`. For a data set it is a folder below `out` in the layout of TFDS; without a version
    in `name` the version is 3.1.0, under which TFDS knows C4.

    Raises:
        UsageError: `name` is malformed, or `out` is not a path of this machine.
    """
    root = outputs.resolve(out)
    if format == 'tfds' and not re.fullmatch(r'\w[\w.-]*(/\w[\w.-]*)?(:\d+\.\d+\.\d+)?', name):
        raise UsageError(f'--name {name!r} is not NAME, NAME/CONFIG or NAME/CONFIG:1.2.3')
    name, _, version = name.partition(':')
    return root / name / (version or '3.1.0') if format == 'tfds' else root

"""Checks that prepared rows are what `data.prepare` wrote: every row, its note, and tokens.json."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xxhash

from mixln_jax.data import prepared
from mixln_jax.system import files
from mixln_jax.system.errors import DataError, reading

AT_ONCE = 2**20  # bytes


def check_shard(file: str, shard: Mapping[str, Any], seq_length: int, dtype: np.dtype) -> None:
    """Reads a whole shard and compares its digest and, if it has notes, the checksum of each row.

    Args:
        file: the path of the shard.
        shard: its description in tokens.json.
        seq_length: T; a row has T+1 ids.
        dtype: of the ids.

    Raises:
        DataError: a file is damaged; the message names the file and, if it is known, the row.
    """
    size, digest, bad = (seq_length + 1) * dtype.itemsize, xxhash.xxh3_128(), None
    noted = prepared.note(seq_length) if 'notes' in shard else None
    sealed, seal = prepared.check_sizes(file, shard, size, noted), prepared.seal(file, shard['digest'])
    with contextlib.ExitStack() as opened, reading(file, DataError):
        rows = opened.enter_context(open(file, 'rb'))
        notes = opened.enter_context(open(prepared.notes_file(file), 'rb')) if noted else None
        step = max(1, AT_ONCE // size)
        for first in range(0, shard['rows'], step):
            block = rows.read(step * size)
            digest.update(block)
            if notes and noted and bad is None:
                numbers = np.arange(first, min(first + step, shard['rows']))
                row_notes = _cut(notes.read(len(numbers) * noted.itemsize), noted.itemsize)
                salts = prepared.shard_salts(seal, numbers) * np.uint32(sealed)
                damaged = prepared.damaged_rows(_cut(block, size), row_notes, noted, salts)
                bad = first + damaged[0] if len(damaged) else None
        ends_well = not sealed or bad is not None or (notes is not None and notes.read() == seal)
    same = digest.hexdigest() == shard['digest']
    if bad is not None or not same:
        name = prepared.notes_file(file) if same else file
        problem = (
            ': damaged: its digest is another' if bad is None else f', row {bad}: damaged: its checksum is another'
        )
        raise DataError(f'{name}{problem}')
    if not ends_well:
        raise DataError(f'{prepared.notes_file(file)}: {prepared.NOT_THIS_SHARD}')


def _cut(content: bytes, size: int) -> list[bytes]:
    """Returns the pieces of `size` bytes of a content."""
    return [content[start : start + size] for start in range(0, len(content), size)]


def damages(folder: str) -> Iterator[tuple[str, int, list[str]]]:
    """Reads all rows of a folder of prepared rows; yields (name, number of rows, list of damages) of every split.

    Raises:
        DataError: tokens.json, or the tokenizer in the folder, is not what `data.prepare` wrote.
    """
    about, path = prepared.description(folder), files.local(folder, 'config.data.path')
    prepared.open_tokenizer(folder)
    _compare(path, about)
    for split, shards in about['splits'].items():
        damaged = []
        for shard in shards:
            try:
                check_shard(str(path / shard['file']), shard, about['seq_length'], np.dtype(about['dtype']))
            except DataError as error:
                damaged.append(str(error))
        yield split, sum(shard['rows'] for shard in shards), damaged


def _compare(folder: pathlib.Path, about: dict) -> None:
    """Raises DataError if tokens.json differs from the records of `data.prepare` in the folder, if these exist."""
    plan, *counts = folder / prepared.WORK / 'plan.json', *sorted((folder / prepared.WORK).glob('*-*.json'))
    if not plan.exists():
        return
    path = folder / prepared.DESCRIPTION
    planned = files.read_json(plan, DataError)
    for key, name in (('mode', 'mode'), ('seq_length', 'seq-length'), ('tokenizer', 'tokenizer')):
        if about[key] != planned.get(name):
            raise DataError(f'{path}: {key} is {about[key]!r}, {plan} has {planned.get(name)!r}')
    for file in counts:
        counts_of_unit = files.read_json(file, DataError)
        for split in about['splits'].keys() & counts_of_unit.keys():
            if _without_notes(counts_of_unit[split]) not in map(_without_notes, about['splits'][split]):
                raise DataError(f'{path}: the shards of {split} do not include the one that {file} describes')


def _without_notes(shard: Any) -> Any:
    """Returns the description of a shard without its notes, which `data.prepare` may have added since."""
    if not isinstance(shard, dict):
        return shard
    return {name: value for name, value in shard.items() if name not in ('notes', 'sealed')}

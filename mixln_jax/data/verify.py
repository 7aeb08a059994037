"""Whether prepared rows are still what `data.prepare` wrote: every row, its notes, what tokens.json says of them."""

import contextlib
import pathlib
from collections.abc import Iterator

import numpy as np
import xxhash

from mixln_jax.data import prepared
from mixln_jax.system import files
from mixln_jax.system.errors import DataError, reading

AT_ONCE = 2**20  # bytes


def check_shard(file: str, shard: dict, seq_length: int, dtype: np.dtype):
    """Reads a shard whole and compares its digest, and the checksum of each row where there are notes.

    Args:
        file: its path.
        shard: what tokens.json says of it.

    Raises DataError, naming the file that is damaged and, where that is known, the row.
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
                said = _cut(notes.read(len(numbers) * noted.itemsize), noted.itemsize)
                salts = prepared.shard_salts(seal, numbers) * np.uint32(sealed)
                bad = next((first + row for row in prepared.wrong(_cut(block, size), said, noted, salts)), None)
        ends_well = not sealed or bad is not None or (notes is not None and notes.read() == seal)
    same = digest.hexdigest() == shard['digest']
    if bad is not None or not same:
        name = prepared.notes_file(file) if same else file
        what = 'damaged: its digest is another' if bad is None else f'row {bad}: damaged: its checksum is another'
        raise DataError(f'{name}{": " if bad is None else ", "}{what}')
    if not ends_well:
        raise DataError(f'{prepared.notes_file(file)}: {prepared.NOT_THIS_SHARD}')


def _cut(content, size):
    """Returns pieces of `size` bytes."""
    return [content[start : start + size] for start in range(0, len(content), size)]


def damages(folder: str) -> Iterator[tuple[str, int, list[str]]]:
    """Reads all rows of a folder of prepared rows: of every split its name, the number of its rows, what is damaged.

    Raises DataError where tokens.json, or the tokenizer in the folder, is not what `data.prepare` wrote.
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


def _compare(folder: pathlib.Path, about: dict):
    """Raises DataError where tokens.json differs from the notes that `data.prepare` has made of its work, if there."""
    plan, *counts = folder / prepared.WORK / 'plan.json', *sorted((folder / prepared.WORK).glob('*-*.json'))
    if not plan.exists():
        return
    path = folder / prepared.DESCRIPTION
    says = files.read_json(plan, DataError)
    for key, name in (('mode', 'mode'), ('seq_length', 'seq-length'), ('tokenizer', 'tokenizer')):
        if about[key] != says.get(name):
            raise DataError(f'{path}: {key} is {about[key]!r}, {plan} says {says.get(name)!r}')
    for file in counts:
        found = files.read_json(file, DataError)
        for split in about['splits'].keys() & found.keys():
            if _rows_of(found[split]) not in map(_rows_of, about['splits'][split]):
                raise DataError(f'{path}: a shard of {split} is not what {file} says of it')


def _rows_of(shard):
    """What is said of a shard but for its notes: those that `data.prepare` has added are in tokens.json in the end."""
    if not isinstance(shard, dict):
        return shard
    return {name: value for name, value in shard.items() if name not in ('notes', 'sealed')}

"""A folder of prepared rows: what `data.prepare --format tokens` writes and `data.source=tokens` reads.

    tokens.json                 a description of the rows, and of every shard: its number of rows, a digest of its bytes
    train-00000-of-00008.bin    rows of T+1 ids, uint16 or uint32 little-endian, nothing else
    train-00000-of-00008.rows   a note on each row (see `note`), then the seal of the shard (see `seal`)
    validation-...
    tokenizer/                  the tokenizer that made the ids

tokens.json is written last: without it a folder is not a data set. Folders of version 0.1 have no .rows files. Their
rows can be read if the ids alone tell which of them are real; the bytes of text are then unknown. The .rows files of
later folders may have no seal. data.prepare adds whatever is missing.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xxhash
from isal import isal_zlib

from mixln_jax import config
from mixln_jax.data import layout, text_files, tokenizers
from mixln_jax.data.examples import Numbers, Rows
from mixln_jax.data.layout import Block, Layout
from mixln_jax.system import console, files
from mixln_jax.system.errors import DataError, reading

DESCRIPTION = 'tokens.json'
WORK = '.prepare'  # folder with the plan of data.prepare and one file for each finished shard
NOT_OURS = 'not what data.prepare writes'
NOT_THIS_SHARD = 'damaged, or the notes of another shard: its seal is another'
WRITE_AGAIN = 'run the command that made the folder again: it writes such shards anew'
SEAL = 16  # bytes
AT_ONCE = 2**14  # notes that are sealed at a time


def note(seq_length: int) -> np.dtype:
    """Returns the type of a note: what a .rows file records of each row.

    `ends`: where documents end, a bit for each of T+1 ids. `num_bytes`: the bytes of text for which the targets stand.
    `crc`: the CRC-32 of the ids and of the fields before, combined with the row's salt if the file has a seal
    (`salts`).
    """
    return np.dtype([('ends', 'u1', -(-(seq_length + 1) // 8)), ('num_bytes', '<u4'), ('crc', '<u4')])


def notes(block: Block, dtype: np.dtype) -> np.ndarray:
    """Returns the notes [n], not yet sealed, on rows whose ids are stored as `dtype`."""
    records = np.zeros(len(block.ids), note(block.ids.shape[1] - 1))
    records['ends'], records['num_bytes'] = np.packbits(block.ends, axis=1), block.num_bytes
    rows = [ids.tobytes() for ids in block.ids.astype(dtype)]
    records['crc'] = _checksums(rows, [record.tobytes() for record in records])
    return records


def _checksums(
    rows: Sequence[bytes], notes: Sequence[bytes], crc32: Callable[[bytes], int] = isal_zlib.crc32
) -> np.ndarray:  # an argument, because local names are faster in a loop
    """Returns the CRC-32 [n] of rows and their notes, both lists of bytes; a seal is not applied."""
    return np.array([crc32(ids + record[:-4]) for ids, record in zip(rows, notes, strict=True)], np.uint32)


def damaged_rows(rows: Sequence[bytes], notes: Sequence[bytes], noted: np.dtype, salts: np.ndarray) -> np.ndarray:
    """Returns the indices of rows that are damaged, whose notes are damaged, or that belong to another place.

    Args:
        rows: the bytes of each row.
        notes: the bytes of the note on each row.
        noted: the type of the notes.
        salts: uint32 [n], of the places from which the rows were read; 0 for notes without a seal.
    """
    return np.flatnonzero(_checksums(rows, notes) ^ salts != np.frombuffer(b''.join(notes), noted)['crc'])


def seal(file: str, digest: str) -> bytes:
    """Returns the seal of a shard, SEAL bytes that follow from its name and the digest of its content.

    A .rows file ends with it, and its checksums are salted with it: notes and rows of another shard are recognised.
    """
    return xxhash.xxh3_128(f'{pathlib.PurePath(file).name} {digest}'.encode(errors='backslashreplace')).digest()


def salts(seeds: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Returns the salts of rows, uint32 [n]; their checksums are combined with these by exclusive or.

    A row then passes the check only in its own place; elsewhere the chance is 2^-32. A salt is the upper half of
    SplitMix64 (Steele, Lea and Flood 2014).

    Args:
        seeds: uint64 [n], the first eight bytes of the seals of the rows' shards.
        numbers: [n], the numbers of the rows in their shards.
    """
    mixed = seeds + (np.asarray(numbers).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ mixed >> np.uint64(31)) >> np.uint64(32)).astype(np.uint32)


def shard_salts(seal: bytes, numbers: np.ndarray) -> np.ndarray:
    """Returns the `salts` [n] of rows of one shard, given its seal."""
    return salts(np.frombuffer(seal, '<u8', 1), numbers)


def add_seal(path: str | os.PathLike, noted: np.dtype, seal: bytes) -> None:
    """Seals a .rows file that has a note on each row, and no seal yet."""
    with open(path, 'r+b') as file:
        first = 0
        while content := file.read(AT_ONCE * noted.itemsize):
            records = np.frombuffer(content, noted).copy()
            records['crc'] ^= shard_salts(seal, first + np.arange(len(records)))
            file.seek(first * noted.itemsize)
            file.write(records.tobytes())
            first += len(records)
        file.write(seal)


def notes_file(shard: str) -> str:
    """Returns the name of the .rows file of a shard."""
    return f'{shard.removesuffix(".bin")}.rows'


class Prepared(Rows):
    """The prepared rows of one split."""

    def __init__(self, folder: str | pathlib.Path, split: str):
        """Opens the split of a folder. Raises DataError, which names the file, if a file is missing or cut short."""
        about = description(folder)
        folder = files.local(folder, 'config.data.path')
        self.layout = Layout(about['mode'], about['pad_id'], about['eos_id'])
        self._vocab_size = about['vocab_size']
        self._dtype, self._width = np.dtype(about['dtype']), about['seq_length'] + 1
        shards = about['splits'].get(split)
        if shards is None:
            raise DataError(f'{folder}: no split {split} (there is {", ".join(about["splits"])})')
        self._files = [str(folder / shard['file']) for shard in shards]
        self._notes = [notes_file(file) for file in self._files]
        self._ends = np.cumsum([0, *(shard['rows'] for shard in shards)])[1:]
        digest = hashlib.blake2b(json.dumps([shard['digest'] for shard in shards]).encode(), digest_size=16)
        self.fingerprint = {
            'source': digest.hexdigest(),
            'tokenizer': about['tokenizer'],
            'mode': about['mode'],
            'seq_length': about['seq_length'],
        }
        self._note = note(self._width - 1) if all('notes' in shard for shard in shards) else None
        self._rows = [shard['rows'] for shard in shards]
        self._seals = [seal(shard['file'], shard['digest']) for shard in shards]
        self._seeds = np.frombuffer(b''.join(self._seals), '<u8')[::2]
        self._sealed = np.array(
            [
                check_sizes(file, shard, self._width * self._dtype.itemsize, self._note)
                for file, shard in zip(self._files, shards, strict=True)
            ],
            bool,
        )
        if not len(self):
            raise DataError(f'{folder}: no rows in split {split}')
        if not self._note:
            _check_ids_tell(folder, self.layout)
        self._handles: dict[Any, Any] = {}
        text_files.allow_open(4 * len(self._files))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices: Numbers, sized: bool = False) -> Block:
        shards = np.searchsorted(self._ends, indices, side='right')
        numbers = np.asarray(indices) - np.concatenate([[0], self._ends])[shards]
        wanted = list(zip(indices, shards.tolist(), numbers.tolist(), strict=True))
        rows = self._read(wanted, self._files, self._width * self._dtype.itemsize)
        ids = np.frombuffer(b''.join(rows), self._dtype).reshape(len(rows), self._width)
        if ids.max(initial=0) >= self._vocab_size:
            bad = next(i for i, row in zip(indices, ids, strict=True) if row.max() >= self._vocab_size)
            raise DataError(f'{self.origin(bad)}: an id is not below the vocabulary size {self._vocab_size}')
        if not self._note:
            return Block(ids, _ends_by_ids(ids, self.layout), None)
        read_notes = self._read(wanted, self._notes, self._note.itemsize)
        salted = salts(self._seeds[shards], numbers) * self._sealed[shards]
        for bad in damaged_rows(rows, read_notes, self._note, salted)[:1]:
            raise DataError(
                f'{self.origin(indices[bad])}: damaged, or the row of another place: its checksum is another; '
                f'{WRITE_AGAIN}'
            )
        records = np.frombuffer(b''.join(read_notes), self._note)
        ends = np.unpackbits(records['ends'], axis=1, count=self._width).view(bool)
        return Block(ids, ends, records['num_bytes'].astype(np.int64))

    def _read(self, wanted: Sequence[tuple[int, int, int]], names: Sequence[str], size: int) -> list[bytes]:
        """Returns `size` bytes of each wanted row (number, shard, row in the shard), from the files of these names."""
        # Not memory-mapped: a file that is cut short while it is used then gives an error, not a dead process.
        contents = []
        for i, shard, row in wanted:
            try:
                content = os.pread(self._handles.get(names[shard]) or self._open(names, shard), size, row * size)
            except OSError as error:
                raise DataError(f'{self.origin(i)}: cannot be read: {error.strerror}') from error
            if len(content) != size:
                raise DataError(f'{self.origin(i)}: cut short')
            contents.append(content)
        return contents

    def _open(self, names: Sequence[str], shard: int) -> int:
        file = names[shard]
        handle = os.open(file, os.O_RDONLY)
        if names is self._notes:
            self._check_seal(shard, handle)
        if self._handles.setdefault(file, handle) != handle:  # another thread was faster
            os.close(handle)
        return self._handles[file]

    def _check_seal(self, shard: int, handle: int) -> None:
        """Raises DataError if a .rows file belongs to another shard."""
        assert self._note is not None
        content = os.pread(handle, SEAL, self._rows[shard] * self._note.itemsize)
        if content or self._sealed[shard]:  # data.prepare may have added the seal after the folder was opened
            self._sealed[shard] = True
            if content != self._seals[shard]:
                os.close(handle)
                raise DataError(f'{self._notes[shard]}: {NOT_THIS_SHARD}; {WRITE_AGAIN}')

    def origin(self, i: int) -> str:
        i = range(len(self))[i]
        shard = int(np.searchsorted(self._ends, i, side='right'))
        return f'{self._files[shard]}, row {i - (self._ends[shard - 1] if shard else 0)}'

    def __del__(
        self, close: Callable[[int], None] = os.close
    ) -> None:  # an argument, because `os` may be gone when Python ends
        for handle in getattr(self, '_handles', {}).values():
            close(handle)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {'_handles': {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        text_files.allow_open(4 * len(self._files))


def check_sizes(file: str, shard: Mapping[str, Any], size: int, noted: np.dtype | None) -> bool:
    """Checks the sizes of a shard and its notes; returns whether the notes are sealed.

    Args:
        file: the path of the shard.
        shard: its description in tokens.json.
        size: bytes of a row.
        noted: the type of its notes; None: it has no notes.

    Raises:
        DataError: a file is missing or has another size.
    """
    _check_size(file, [shard['rows'] * size])
    if not noted:
        return False
    sealed = shard['rows'] * noted.itemsize + SEAL
    # While data.prepare adds seals to a folder, tokens.json does not mention them yet.
    return _check_size(notes_file(file), [sealed] if 'sealed' in shard else [sealed - SEAL, sealed]) == sealed


def _check_size(file: str, wanted: Sequence[int]) -> int:
    try:
        size = files.regular(file, DataError).st_size
    except FileNotFoundError:
        raise DataError(f'{file}: missing') from None
    if size not in wanted:
        raise DataError(f'{file}: {size} bytes, not {wanted[0]}')
    return size


def _check_ids_tell(folder: str | pathlib.Path, layout: Layout) -> None:
    """Raises DataError if rows without notes cannot be read, because text can have the id of padding or of an end."""
    tokenizer = open_tokenizer(folder)
    if layout.mode != 'concat' and any(map(tokenizer.can_yield, (layout.pad_id, layout.eos_id))):
        raise DataError(
            f'{folder}: text can have the id of padding or of an end, so the rows do not tell which ids are real; '
            f'run the command that made the folder again (python -m mixln_jax.data.prepare ... --out {folder}): '
            'it adds what is missing and leaves the rows as they are'
        )
    console.say(f'{folder}: made by version 0.1, so bits per byte are not known; run data.prepare again to add them')


def _ends_by_ids(ids: np.ndarray, layout: Layout) -> np.ndarray:
    """Returns where documents end, [n, T+1] bool, in rows whose text never has the id of eos or padding."""
    ends = ids == layout.eos_id
    if layout.mode == 'pad':
        return ends & (ends.cumsum(1) == 1)
    follows_real = np.zeros_like(ends)
    follows_real[:, 1:] = ((ids != layout.eos_id) & (ids != layout.pad_id))[:, :-1]
    return ends & follows_real


def description(folder: str | pathlib.Path) -> dict[str, Any]:
    """Returns the content of a folder's tokens.json.

    Raises:
        DataError: the file does not exist, so the folder is not prepared, or not completely; or the value of a key,
        which
            is named, is impossible.
    """
    path = files.local(folder, 'config.data.path') / DESCRIPTION
    try:
        about = files.read_json(path, DataError, NOT_OURS)
    except FileNotFoundError:
        raise DataError(
            f'config.data.path={folder}: no {DESCRIPTION}; python -m mixln_jax.data.prepare --format tokens makes such '
            'a folder, and writes this file last'
        ) from None
    with reading(path, DataError, NOT_OURS):
        _check(about)
    return about


def _check(about: dict[str, Any]) -> None:
    """Raises ValueError, which names the key, if a value in tokens.json is impossible."""
    _need(about, 'mode', lambda value: value in [*layout.FILL])
    _need(about, 'seq_length', _whole(2, config.LONGEST + 1))
    _need(about, 'vocab_size', _whole(1, config.LARGEST_VOCABULARY + 1))
    _need(about, 'dtype', lambda value: value == layout.dtype_for(about['vocab_size']).str)
    for name in ('pad_id', 'eos_id'):
        _need(about, name, _whole(0, about['vocab_size']))
    _need(about, 'tokenizer', lambda value: isinstance(value, str))
    _need(about, 'splits', lambda value: isinstance(value, dict))
    for split in about['splits']:
        _need(about['splits'], split, lambda value: isinstance(value, list), 'splits.')
    shards = [shard for shards in about['splits'].values() for shard in shards]
    for shard in shards:
        if not isinstance(shard, dict):
            raise ValueError(f'a shard is {shard!r:.80}')
        check_counts(shard)
    if len({shard['file'] for shard in shards}) != len(shards):
        raise ValueError('it names a file twice')
    for split, split_shards in about['splits'].items():
        for shard in split_shards:
            if not shard['file'].startswith(f'{split}-'):
                raise ValueError(f'splits.{split} names {shard["file"]}, which belongs to another split')


def check_counts(shard: Mapping[str, Any]) -> None:
    """Raises ValueError, which names the key, if a value in the description of a shard is impossible."""
    # The name must not be a path: a description from elsewhere must not open files outside its folder.
    _need(shard, 'file', lambda name: isinstance(name, str) and name == pathlib.PurePath(name).name not in ('', '..'))
    _need(shard, 'rows', _whole(0, 2**40))
    _need(shard, 'digest', lambda value: isinstance(value, str))
    if 'notes' in shard:
        _need(shard, 'notes', _whole(0, 2**60))
    if 'sealed' in shard:
        _need(shard, 'sealed', lambda value: value is True)


def _need(group: Mapping[str, Any], key: str, good: Callable[[Any], bool], above: str = '') -> None:
    if key not in group:
        raise ValueError(f'{above}{key} is missing')
    if not good(group[key]):
        raise ValueError(f'{above}{key} is {group[key]!r:.80}')


def _whole(least: int, below: int) -> Callable[[Any], bool]:
    """Returns a function that tells whether a value is an integer in this range; True is not an integer."""
    return lambda value: type(value) is int and least <= value < below


def open_tokenizer(folder: str | pathlib.Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer that made the rows. Raises DataError if it is missing or is another tokenizer."""
    about = description(folder)
    tokenizer = tokenizers.load(files.local(folder, 'config.data.path') / 'tokenizer')
    if tokenizer.fingerprint != about.get('tokenizer'):
        raise DataError(f'{folder}/tokenizer is not the tokenizer that made the rows')
    for name in ('vocab_size', 'pad_id', 'eos_id'):
        if about[name] != (value := getattr(tokenizer, name)):
            raise DataError(f'{folder}/{DESCRIPTION}: {NOT_OURS}: {name} is {about[name]}, its tokenizer has {value}')
    return tokenizer

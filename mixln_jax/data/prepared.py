"""A folder of prepared rows: what `data.prepare --format tokens` writes and `data.source=tokens` reads.

    tokens.json                 what the rows are, and every shard with its rows and a digest of its bytes
    train-00000-of-00008.bin    rows of T+1 ids, uint16 or uint32 little-endian, nothing else
    train-00000-of-00008.rows   a NOTE of each row, see `note`
    validation-...
    tokenizer/                  the tokenizer that made the ids

tokens.json is written last: without it a folder is not a data set. Folders of version 0.1 have no .rows: theirs can be
read where the ids alone say which of them are real, without bytes of text, and data.prepare adds what is missing.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np
from isal import isal_zlib

from mixln_jax import config
from mixln_jax.data import layout, text_files, tokenizers
from mixln_jax.data.layout import Block, Layout
from mixln_jax.system import console, files
from mixln_jax.system.errors import DataError, reading

DESCRIPTION = 'tokens.json'
WORK = '.prepare'  # folder with the plan of data.prepare and one file a finished shard
NOT_OURS = 'not what data.prepare writes'


def note(seq_length: int) -> np.dtype:
    """Returns the type of what a .rows file holds of each row: where documents end (a bit for each of T+1 ids), the
    bytes of text that its targets stand for, and a checksum (CRC-32) of the row's ids and these."""
    return np.dtype([('ends', 'u1', -(-(seq_length + 1) // 8)), ('num_bytes', '<u4'), ('crc', '<u4')])


def notes(block: Block, dtype: np.dtype) -> np.ndarray:
    """Returns the notes [n] on rows whose ids are kept as `dtype`."""
    made = np.zeros(len(block.ids), note(block.ids.shape[1] - 1))
    made['ends'], made['num_bytes'] = np.packbits(block.ends, axis=1), block.num_bytes
    rows = zip(block.ids.astype(dtype), made, strict=True)
    made['crc'] = [_checksum(ids.tobytes(), of_row.tobytes()) for ids, of_row in rows]
    return made


def _checksum(ids, of_row):
    """The checksum that the note of a row should have, both as bytes."""
    return isal_zlib.crc32(ids + of_row[:-4])


def _is_whole(ids, of_row, crc32=isal_zlib.crc32, number=int.from_bytes):  # as locals: it is called for every row
    return crc32(ids + of_row[:-4]) == number(of_row[-4:], 'little')


def wrong(rows: bytes, size: int, said: bytes, size_of_note: int) -> Iterator[int]:
    """Which of these rows of `size` bytes are damaged, or their notes are."""
    notes = [said[start : start + size_of_note] for start in range(0, len(said), size_of_note)]
    for i, of_row in enumerate(notes):
        if not _is_whole(rows[i * size : (i + 1) * size], of_row):
            yield i


def notes_file(shard: str) -> str:
    """The name of the .rows file that goes with a shard."""
    return f'{shard.removesuffix(".bin")}.rows'


class Prepared:
    """The rows of one split; see rows.Rows. Raises DataError, naming the file, for what is missing or cut short."""

    def __init__(self, folder: str, split: str):
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
        for file, shard in zip(self._files, shards, strict=True):
            check_sizes(file, shard['rows'], self._width * self._dtype.itemsize, self._note)
        if not len(self):
            raise DataError(f'{folder}: no rows in split {split}')
        if not self._note:
            _check_ids_tell(folder, self.layout)
        self._handles = {}
        text_files.allow_open(4 * len(self._files))

    def __len__(self):
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, indices, sized=False):
        shards = np.searchsorted(self._ends, indices, side='right')
        at = (np.asarray(indices) - np.concatenate([[0], self._ends])[shards]).tolist()
        wanted = list(zip(indices, shards.tolist(), at, strict=True))
        rows = self._read(wanted, self._files, self._width * self._dtype.itemsize)
        ids = np.frombuffer(b''.join(rows), self._dtype).reshape(len(rows), self._width)
        if ids.max(initial=0) >= self._vocab_size:
            bad = next(i for i, row in zip(indices, ids, strict=True) if row.max() >= self._vocab_size)
            raise DataError(f'{self.origin(bad)}: an id is not below the vocabulary size {self._vocab_size}')
        if not self._note:
            return Block(ids, _ends_by_ids(ids, self.layout), None)
        said = self._read(wanted, self._notes, self._note.itemsize)
        for i, row, of_row in zip(indices, rows, said, strict=True):
            if not _is_whole(row, of_row):
                raise DataError(
                    f'{self.origin(i)}: damaged: its checksum is another; the command that made the folder, run once '
                    'more, writes damaged shards again'
                )
        said = np.frombuffer(b''.join(said), self._note)
        ends = np.unpackbits(said['ends'], axis=1, count=self._width).view(bool)
        return Block(ids, ends, said['num_bytes'].astype(np.int64))

    def _read(self, wanted, names, size):
        """What `size` bytes each the rows (number, shard, row in it) have in files of these names."""
        # Read, not mapped: a file that someone cuts short is an error with a name, not a dead process.
        found = []
        for i, shard, row in wanted:
            try:
                content = os.pread(self._handles.get(names[shard]) or self._open(names[shard]), size, row * size)
            except OSError as error:
                raise DataError(f'{self.origin(i)}: cannot be read: {error.strerror}') from error
            if len(content) != size:
                raise DataError(f'{self.origin(i)}: cut short')
            found.append(content)
        return found

    def _open(self, file):
        handle = os.open(file, os.O_RDONLY)
        if self._handles.setdefault(file, handle) != handle:  # another thread was faster
            os.close(handle)
        return self._handles[file]

    def origin(self, i):
        i = range(len(self))[i]
        shard = int(np.searchsorted(self._ends, i, side='right'))
        return f'{self._files[shard]}, row {i - (self._ends[shard - 1] if shard else 0)}'

    def __del__(self, close=os.close):  # Python's end takes `os` apart
        for handle in getattr(self, '_handles', {}).values():
            close(handle)

    def __getstate__(self):
        return self.__dict__ | {'_handles': {}}

    def __setstate__(self, state):
        self.__dict__.update(state)
        text_files.allow_open(4 * len(self._files))


def check_sizes(file: str, rows: int, size: int, noted: np.dtype | None):
    """Raises DataError where a shard of so many rows of `size` bytes, or its notes, are missing or cut short."""
    _check_size(file, rows * size)
    if noted:
        _check_size(notes_file(file), rows * noted.itemsize)


def _check_size(file, wanted):
    try:
        found = files.regular(file, DataError).st_size
    except FileNotFoundError:
        found = None
    if found != wanted:
        raise DataError(f'{file}: {"missing" if found is None else f"{found} bytes, not {wanted}"}')


def _check_ids_tell(folder, layout):
    """Raises DataError where rows without notes cannot be read: text may have the id of padding or of an end."""
    tokenizer = open_tokenizer(folder)
    if layout.mode != 'concat' and any(map(tokenizer.can_yield, (layout.pad_id, layout.eos_id))):
        raise DataError(
            f'{folder}: text may have the id of padding or of an end, so the rows do not tell which ids are real; '
            f'run the command that made the folder once more (python -m mixln_jax.data.prepare ... --out {folder}): '
            'it adds what is missing and leaves the rows as they are'
        )
    console.say(f'{folder}: made by version 0.1, bits per byte are not known; data.prepare, run once more, adds them')


def _ends_by_ids(ids, layout):
    """[n, T+1] bool: where documents end in rows in which eos and padding are no text."""
    ends = ids == layout.eos_id
    if layout.mode == 'pad':
        return ends & (ends.cumsum(1) == 1)
    follows_real = np.zeros_like(ends)
    follows_real[:, 1:] = ((ids != layout.eos_id) & (ids != layout.pad_id))[:, :-1]
    return ends & follows_real


def description(folder: str) -> dict:
    """tokens.json of a folder. Raises DataError where there is none: not prepared, or not to the end; naming the key,
    where it says what no folder of rows has."""
    path = files.local(folder, 'config.data.path') / DESCRIPTION
    try:
        about = files.read_json(path, DataError, NOT_OURS)
    except FileNotFoundError:
        raise DataError(
            f'config.data.path={folder}: no {DESCRIPTION}; python -m mixln_jax.data.prepare --format tokens makes such '
            'a folder, and writes that file last'
        ) from None
    with reading(path, DataError, NOT_OURS):
        _check(about)
    return about


def _check(about):
    """Raises ValueError, naming the key, for a value in tokens.json that cannot be."""
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


def check_counts(shard: dict):
    """Raises ValueError, naming the key, where a shard's counts cannot be."""
    # Also no absolute path: a description from elsewhere must not open files outside its folder.
    _need(shard, 'file', lambda name: isinstance(name, str) and name == pathlib.PurePath(name).name not in ('', '..'))
    _need(shard, 'rows', _whole(0, 2**40))
    _need(shard, 'digest', lambda value: isinstance(value, str))
    if 'notes' in shard:
        _need(shard, 'notes', _whole(0, 2**60))


def _need(group, key, good, above=''):
    if key not in group:
        raise ValueError(f'{above}{key} is missing')
    if not good(group[key]):
        raise ValueError(f'{above}{key} is {group[key]!r:.80}')


def _whole(least, below):
    """Whether a value is an integer in this range; True is none."""
    return lambda value: type(value) is int and least <= value < below


def open_tokenizer(folder: str) -> tokenizers.Tokenizer:
    """The tokenizer that made the rows. Raises DataError where it is missing or another one."""
    about = description(folder)
    tokenizer = tokenizers.load(files.local(folder, 'config.data.path') / 'tokenizer')
    if tokenizer.fingerprint != about.get('tokenizer'):
        raise DataError(f'{folder}/tokenizer is not the tokenizer that made the rows')
    for name in ('vocab_size', 'pad_id', 'eos_id'):
        if (said := about[name]) != (value := getattr(tokenizer, name)):
            raise DataError(f'{folder}/{DESCRIPTION}: {NOT_OURS}: {name} is {said}, its tokenizer has {value}')
    return tokenizer

"""A folder of prepared rows: what `data.prepare --format tokens` writes and `data.source=tokens` reads.

    tokens.json                 what the rows are, and every shard with its rows and a digest of its bytes
    train-00000-of-00008.bin    rows of T+1 ids, uint16 or uint32 little-endian, nothing else
    validation-...
    tokenizer/                  the tokenizer that made the ids

tokens.json is written last: without it a folder is not a data set.
"""

import hashlib
import json
import os
import pathlib

import numpy as np

from mixln_jax.data import files, tokenizers
from mixln_jax.data.layout import Layout
from mixln_jax.exits import DataError

DESCRIPTION = 'tokens.json'


class Prepared:
    """The rows of one split; see rows.Rows. Raises DataError, naming the file, for what is missing or cut short."""

    def __init__(self, folder: str, split: str):
        about = description(folder)
        folder = pathlib.Path(folder).expanduser()
        try:
            self.layout = Layout(about['mode'], about['pad_id'], about['eos_id'])
            self._vocab_size = about['vocab_size']
            self._dtype, self._width = np.dtype(about['dtype']), about['seq_length'] + 1
            shards = about['splits'].get(split)
            if shards is None:
                raise DataError(f'{folder}: no split {split} (there is {", ".join(about["splits"])})')
            self._files = [str(folder / shard['file']) for shard in shards]
            self._ends = np.cumsum([0, *(shard['rows'] for shard in shards)])[1:]
            digest = hashlib.blake2b(json.dumps([shard['digest'] for shard in shards]).encode(), digest_size=16)
            self.fingerprint = {
                'source': digest.hexdigest(),
                'tokenizer': about['tokenizer'],
                'mode': about['mode'],
                'seq_length': about['seq_length'],
            }
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f'{folder / DESCRIPTION}: not what data.prepare writes: {error!r}') from error
        for file, shard in zip(self._files, shards, strict=True):
            wanted = shard['rows'] * self._width * self._dtype.itemsize
            found = os.path.getsize(file) if os.path.exists(file) else None
            if found != wanted:
                raise DataError(f'{file}: {"missing" if found is None else f"{found} bytes, not {wanted}"}')
        if not len(self):
            raise DataError(f'{folder}: no rows in split {split}')
        self._handles = {}
        files.allow_open(2 * len(self._files))

    def __len__(self):
        return int(self._ends[-1]) if len(self._ends) else 0

    def tokens(self, indices):
        size = self._width * self._dtype.itemsize
        shards = np.searchsorted(self._ends, indices, side='right')
        starts = np.concatenate([[0], self._ends])[shards]
        # Read, not mapped: a file that someone cuts short is an error with a name, not a dead process.
        rows = [
            self._read(i, shard, size, int(at) * size)
            for i, shard, at in zip(indices, shards.tolist(), np.asarray(indices) - starts, strict=True)
        ]
        tokens = np.frombuffer(b''.join(rows), self._dtype).reshape(len(rows), self._width)
        if tokens.max(initial=0) >= self._vocab_size:
            bad = next(i for i, row in zip(indices, tokens, strict=True) if row.max() >= self._vocab_size)
            raise DataError(f'{self.origin(bad)}: an id is not below the vocabulary size {self._vocab_size}')
        return tokens

    def origin(self, i):
        i = range(len(self))[i]
        shard = int(np.searchsorted(self._ends, i, side='right'))
        return f'{self._files[shard]}, row {i - (self._ends[shard - 1] if shard else 0)}'

    def _read(self, i, shard, size, at):
        try:
            if shard not in self._handles:
                handle = os.open(self._files[shard], os.O_RDONLY)
                if self._handles.setdefault(shard, handle) != handle:  # another thread was faster
                    os.close(handle)
            row = os.pread(self._handles[shard], size, at)
        except OSError as error:
            raise DataError(f'{self.origin(i)}: cannot be read: {error.strerror}') from error
        if len(row) != size:
            raise DataError(f'{self.origin(i)}: cut short')
        return row

    def __del__(self):
        for handle in getattr(self, '_handles', {}).values():
            os.close(handle)

    def __getstate__(self):
        return self.__dict__ | {'_handles': {}}

    def __setstate__(self, state):
        self.__dict__.update(state)
        files.allow_open(2 * len(self._files))


def description(folder: str) -> dict:
    """tokens.json of a folder. Raises DataError where there is none: not prepared, or not to the end."""
    path = pathlib.Path(folder).expanduser() / DESCRIPTION
    try:
        about = json.loads(path.read_text())
        about['splits'].items()
        return about
    except FileNotFoundError:
        raise DataError(
            f'config.data.path={folder}: no {DESCRIPTION}; python -m mixln_jax.data.prepare --format tokens makes such '
            'a folder, and writes that file last'
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path}: not what data.prepare writes: {error!r}') from error


def open_tokenizer(folder: str) -> tokenizers.Tokenizer:
    """The tokenizer that made the rows. Raises DataError where it is missing or another one."""
    tokenizer = tokenizers.load(pathlib.Path(folder).expanduser() / 'tokenizer')
    if tokenizer.fingerprint != description(folder).get('tokenizer'):
        raise DataError(f'{folder}/tokenizer is not the tokenizer that made the rows')
    return tokenizer

"""Rows of tokens by number: a document each, made when asked for, or made at the start, or made beforehand."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mixln_jax import config, record
from mixln_jax.data import layout, prepared, tokenizers
from mixln_jax.data.layout import Layout
from mixln_jax.data.sources import Source, open_source
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.exits import DataError, UsageError


class Rows(Protocol):
    """Rows by number. `fingerprint` says what they follow from, part by part; `layout` how to read them."""

    fingerprint: dict
    layout: Layout

    def __len__(self) -> int: ...

    def tokens(self, indices: Sequence[int]) -> np.ndarray:
        """[n, T+1]. Raises DataError, naming the record, for a row that cannot be read."""

    def origin(self, i: int) -> str:
        """Where a row comes from, for people."""


class Documents:
    """pad: row i is document i, made when asked for, so of any source."""

    def __init__(self, source: Source, tokenizer: Tokenizer, seq_length: int):
        self.layout = Layout('pad', tokenizer.pad_id, tokenizer.eos_id)
        self.fingerprint = _fingerprint(source, tokenizer, 'pad', seq_length)
        self._source, self._tokenizer, self._length = source, tokenizer, seq_length

    def __len__(self):
        return len(self._source)

    def tokens(self, indices):
        texts = self._source.__getitems__(indices)
        rows = np.empty((len(texts), self._length + 1), np.int32)
        for row, text in zip(rows, texts, strict=True):
            layout.pad(row, self._tokenizer.encode(text, self._length - 1), self.layout)
        return rows

    def origin(self, i):
        return self._source.origin(i)


class InMemory:
    """pack and concat: a source of up to 1 GB, tokenised at the start.

    Raises DataError where the text does not fill one row.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, mode: str, seq_length: int):
        self.layout = Layout(mode, tokenizer.pad_id, tokenizer.eos_id)
        self.fingerprint = _fingerprint(source, tokenizer, mode, seq_length)
        rows = bytearray()
        dtype = layout.dtype_for(tokenizer.vocab_size)
        fill = layout.FILL[mode](seq_length, self.layout, lambda block: rows.extend(block.astype(dtype).tobytes()))
        for i in range(len(source)):
            fill.add(tokenizer.encode(source[i]))
        fill.close()
        self._rows = np.frombuffer(rows, dtype).reshape(-1, seq_length + 1)
        if not len(self):
            raise DataError(f'the text is not enough for one row of config.seq_length={seq_length}')

    def __len__(self):
        return len(self._rows)

    def tokens(self, indices):
        return self._rows[np.asarray(indices)]

    def origin(self, i):
        return f'row {range(len(self))[i]}'


def open_tokenizer(data: config.Data) -> Tokenizer:
    """The tokenizer of a run: the one that prepared tokens come with, else that of the config.

    Raises DataError; UsageError where prepared tokens and the config disagree.
    """
    if data.source != 'tokens':
        return tokenizers.open_tokenizer(data)
    tokenizer = prepared.open_tokenizer(data.path)
    if tokenizer.kind != data.tokenizer:
        raise UsageError(
            f'{data.path} was prepared with --config.data.tokenizer={tokenizer.kind}, not {data.tokenizer}'
        )
    if data.tokenizer_path and tokenizers.open_tokenizer(data).fingerprint != tokenizer.fingerprint:
        raise UsageError(f'{data.path} was prepared with another tokenizer than config.data.tokenizer_path')
    return tokenizer


def open_rows(data: config.Data, split: str, tokenizer: Tokenizer, seq_length: int, vocab_size: int) -> Rows:
    """The rows of a split, as `data.mode` makes them; `vocab_size` is the model's.

    Raises UsageError where the tokenizer has more ids than the model or prepared rows are of another length or mode;
    DataError as `open_source` and the kinds of rows do.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UsageError(
            f'config.data.tokenizer={data.tokenizer} has {tokenizer.vocab_size} ids, '
            f'more than config.model.vocab_size={vocab_size}'
        )
    if data.source == 'tokens':
        rows = prepared.Prepared(data.path, split)
        for name, asked in (('mode', data.mode), ('seq_length', seq_length)):
            if rows.fingerprint[name] != asked:
                key = 'seq_length' if name == 'seq_length' else f'data.{name}'
                raise UsageError(f'{data.path} holds rows of config.{key}={rows.fingerprint[name]}, not {asked}')
        return rows
    if data.mode == 'pad':
        return Documents(open_source(data, split), tokenizer, seq_length)
    if data.source == 'tfds':
        raise DataError(
            f'data.mode={data.mode} of a tfds data set needs rows made beforehand: python -m mixln_jax.data.prepare '
            f'--source tfds --name {data.name} --mode {data.mode} --seq-length {seq_length} --format tokens --out DIR'
        )
    source = open_source(data, split)
    record.say(f'{data.mode}: tokenises {len(source):,} documents of {split}')
    return InMemory(source, tokenizer, data.mode, seq_length)


def _fingerprint(source, tokenizer, mode, seq_length):
    return {
        'source': source.fingerprint,
        'tokenizer': tokenizer.fingerprint,
        'mode': mode,
        'seq_length': seq_length,
    }

"""Sources of documents: plain text, by number, in memory.

Every source has a train and a validation split. A document's side follows from a hash of its text (stdlib: of the name
of its module), never from the order of files: 1 % (stdlib: 5 %) goes to validation, but at least 20 texts, or half of
fewer than 40. So equal texts are on the same side, and adding files to a large source moves no document.
"""

import array
import dataclasses
import glob
import gzip
import hashlib
import json
import os
import platform
import zlib
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from mixln_jax import config
from mixln_jax.data import stdlib
from mixln_jax.exits import DataError

LARGEST = 10**9  # bytes of text
PIECE = 2000  # characters of a text document, at least


class Source(Protocol):
    """Documents by number. `fingerprint` names their content: equal fingerprints, equal documents in equal order."""

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> str: ...


def open_source(data: config.Data, split: str) -> Source:
    """The documents of `data.source` in `split`, 'train' or 'validation'.

    stdlib is the embedded corpus. jsonl reads one JSON object a line with a field `text`, as C4's own files are; text
    cuts each file at blank lines into documents of at least 2,000 characters that, put together, are the file. Files
    come from `data.path`, in sorted order, through gzip if they end in .gz. Documents without text are left out.

    Raises DataError, naming file and line, for what is missing, unreadable or malformed; for more than 1 GB of text;
    and for fewer than two different documents, which cannot be split.
    """
    if data.source == 'tfds':
        raise DataError(
            "data.source=tfds is not readable yet; C4's own files are: "
            '--config.data.source=jsonl --config.data.path=c4-train.00000-of-01024.json.gz'
        )
    if data.source == 'stdlib':
        documents = ((name.encode(), text.encode()) for name, text in stdlib.gather())
        source = _split(documents, split, one_in=20)
        return dataclasses.replace(source, fingerprint=f'python-{platform.python_version()}-{source.fingerprint}')
    read = {'text': _text, 'jsonl': _jsonl}[data.source]
    texts = (text.encode() for path in _paths(data) for text in _not_empty(path, read(path)))
    return _split(((text, text) for text in texts), split, one_in=100)


@dataclasses.dataclass(frozen=True)
class _Texts:
    """Documents as one blob of UTF-8, so that each costs little more than its bytes."""

    blob: bytearray
    spans: np.ndarray  # [documents, 2] int64: first byte and end of each
    fingerprint: str

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        start, end = self.spans[i]
        return self.blob[start:end].decode()


def _split(documents: Iterable[tuple[bytes, bytes]], split, one_in) -> _Texts:
    """The texts of `documents`, pairs (unit, text), whose unit falls into `split`."""
    blob, ends, ranks = bytearray(), array.array('q', [0]), array.array('Q')
    for unit, text in documents:
        blob += text
        ends.append(len(blob))
        ranks.append(int.from_bytes(hashlib.blake2b(unit, digest_size=8).digest(), 'big'))
        if len(blob) > LARGEST:
            raise DataError(f'config.data.path holds more than {LARGEST / 1e9:g} GB of text; name fewer files')
    ranks = np.array(ranks, np.uint64)
    distinct = np.unique(ranks)
    if len(distinct) < 2:
        raise DataError(
            'config.data.path holds one document only: nothing to validate on; two different ones are needed'
        )
    held_out = max(np.searchsorted(distinct, np.uint64(2**64 // one_in)), min(20, len(distinct) // 2))
    last = distinct[min(held_out, len(distinct) - 1) - 1]  # both sides get a document, however the hashes fall
    spans = np.stack([ends[:-1], ends[1:]], axis=1)[(ranks <= last) == (split == 'validation')]
    digest = hashlib.blake2b(np.diff(spans).tobytes(), digest_size=16)
    for start, end in spans:
        digest.update(blob[start:end])
    return _Texts(blob, spans, digest.hexdigest())


def _paths(data):
    patterns = [os.path.expanduser(part.strip()) for part in data.path.split(',') if part.strip()]
    if not patterns:
        raise DataError(f'config.data.path is empty; data.source={data.source} needs files')
    paths = set()
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not found:
            raise DataError(f'config.data.path: there is no file {pattern}')
        for path in found:
            if os.path.isdir(path):
                raise DataError(f'config.data.path: {path} is a folder; name its files, for instance {path}/*')
        paths.update(found)
    return sorted(paths)


def _not_empty(path, texts):
    empty = True
    for text in texts:
        if text.strip():
            empty = False
            yield text
    if empty:
        raise DataError(f'{path}: no text in this file')


def _lines(path):
    """Pairs (line number from 1, line with its end)."""
    number = 0
    try:
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f'{path}:{number}: not UTF-8: {error.reason} at byte {error.start} of the line') from error
    except (OSError, EOFError, zlib.error) as error:
        where = f'{path}:{number + 1}' if number else path
        raise DataError(f'{where}: cannot be read: {error}') from error


def _text(path):
    """Pieces of a file; the last, shorter than the others, joins the one before it."""
    before, piece = '', ''
    for _, line in _lines(path):
        piece += line
        if (len(piece) >= PIECE and not line.strip()) or len(piece) > LARGEST:  # the latter ends in an error
            if before:
                yield before
            before, piece = piece, ''
    yield before + piece


def _jsonl(path):
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f'{path}:{number}'
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{where}: not JSON: {str(error).partition(":")[0]}') from error
        if not isinstance(record, dict):
            raise DataError(f'{where}: a JSON object with a field `text` is needed, not {type(record).__name__}')
        if not isinstance(record.get('text'), str):
            raise DataError(f'{where}: no field `text` that is a string (fields: {", ".join(record) or "none"})')
        try:
            record['text'].encode()
        except UnicodeEncodeError as error:
            raise DataError(f'{where}: `text` is not valid Unicode: {error.reason}') from error
        yield record['text']

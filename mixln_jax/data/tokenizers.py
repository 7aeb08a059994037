"""Text to token ids and back: sentencepiece models, Hugging Face tokenizer.json files, bytes."""

import contextlib
import hashlib
import json
import pathlib
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from mixln_jax import config
from mixln_jax.data import download, saved_tokenizer, tokenizer_json
from mixln_jax.data.hugging_face_tokenizer import HuggingFace
from mixln_jax.data.sentencepiece_tokenizer import SentencePiece
from mixln_jax.system import console, files
from mixln_jax.system.errors import DataError, UsageError, reading

T5 = 'gs://t5-data/vocabs/cc_all.32000/sentencepiece.model'


class Tokenizer(Protocol):
    """The interface of every kind of tokenizer.

    Tokenizers with equal `fingerprint`s give equal ids for every text. All ids, the three special ids included, are in
    0..vocab_size - 1. A vocabulary without a token for padding or for the beginning of a text uses `eos_id` instead. A
    pickle contains the files from which the tokenizer was opened.
    """

    kind: str  # the value of config.data.tokenizer that opens it
    origin: str  # what it was opened from, for messages
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    chat_template: str  # Jinja (chat.py); empty: it has none
    special_names: Mapping[str, str]  # what a chat template may call by name, such as `eos_token`
    special_tokens: Sequence[str]  # names that `read_specials` reads as tokens

    @property
    def fingerprint(self) -> str:
        """A digest of all that decides ids, hexadecimal."""

    def encode(self, text: str, limit: int | None = None) -> np.ndarray:
        """Returns the ids of a text, [n] int32, possibly read-only, without special ids; at most the first `limit`.

        A text that spells a special token gets the ids of its letters. A text of more than 10,000 characters is encoded
        in pieces that end before a space or the end of a line. This gives the ids of the whole text, with two
        exceptions: the text has no such place, or two ways to split a word are equally likely and the sum over a long
        text is rounded differently.

        Raises:
            DataError: the tokenizer cannot encode the text.
        """

    def spans(self, text: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids that `encode` returns, and the byte of the text at which each of them ends, [n] int64.

        The ends never decrease. If several ids stand for one character, all its bytes may belong to the first of them
        or to the last. This takes longer than `encode`.
        """

    def read_specials(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns what `spans` does of a text in which names of special tokens stand for these tokens."""

    def decode(self, ids: ArrayLike) -> str:
        """Returns the text of ids [n]; special tokens are dropped, broken characters become U+FFFD."""

    def can_yield(self, i: int) -> bool:
        """Returns whether the id of some text can be `i`, or this is unknown; it is False for special tokens only."""

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes the tokenizer for `load` into a folder, which is created if missing."""

    def export(self, folder: str | pathlib.Path) -> bool:
        """Writes the files that transformers opens, if these give the same ids; returns whether (tokenizer_json.py)."""


class Bytes:
    """UTF-8 bytes as ids 0..255."""

    kind = origin = 'bytes'
    vocab_size, pad_id, bos_id, eos_id = 259, 256, 257, 258
    chat_template = ''
    special_names: Mapping[str, str] = {}
    special_tokens: Sequence[str] = ()

    @property
    def fingerprint(self) -> str:
        """A digest of the ids, hexadecimal."""
        return hashlib.blake2b(json.dumps(self._description()).encode(), digest_size=16).hexdigest()

    def encode(self, text: str, limit: int | None = None) -> np.ndarray:
        return np.frombuffer(text[:limit].encode()[:limit], np.uint8).astype(np.int32)

    def spans(self, text: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text, limit)
        return ids, np.arange(1, len(ids) + 1)

    def read_specials(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        return self.spans(text)

    def can_yield(self, i: int) -> bool:
        return i < 256

    def decode(self, ids: ArrayLike) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors='replace')

    def save(self, folder: str | pathlib.Path) -> None:
        body = json.dumps(self._description(), indent=2).encode() + b'\n'
        saved_tokenizer.write(self, folder, {'tokenizer.json': body})

    def export(self, folder: str | pathlib.Path) -> bool:
        return tokenizer_json.write(self, folder)

    def _description(self) -> dict[str, Any]:
        names = ('vocab_size', 'pad_id', 'bos_id', 'eos_id')
        return {'kind': 'bytes'} | {name: getattr(self, name) for name in names}


KINDS: dict[str, type[SentencePiece] | type[HuggingFace]] = {kind.kind: kind for kind in (SentencePiece, HuggingFace)}


def open_tokenizer(data: config.Data) -> Tokenizer:
    """Returns the tokenizer of `data.tokenizer` and `data.tokenizer_path`.

    The file behind a URL (https, gs, or http, which gives a warning) is fetched once and kept in
    $XDG_CACHE_HOME/mixln_jax/tokenizers (or ~/.cache/mixln_jax/tokenizers).

    Raises:
        UsageError: a huggingface tokenizer has no path.
        DataError: the file or URL, which is named, is missing, cannot be fetched, or is not a whole tokenizer with a
            token for the end of a document.
    """
    if data.tokenizer == 'bytes':
        return Bytes()
    if data.tokenizer == 'huggingface' and not data.tokenizer_path:
        raise UsageError('config.data.tokenizer_path is empty; data.tokenizer=huggingface needs a tokenizer.json')
    kind, path = KINDS[data.tokenizer], data.tokenizer_path or T5
    if path.startswith('gs://'):
        path = f'https://storage.googleapis.com/{urllib.parse.quote(path.removeprefix("gs://"))}'
    if path.startswith(('http://', 'https://')):
        return _fetch(kind, path)
    file = files.local(path, 'config.data.tokenizer_path')
    first, *others = kind.FILES
    try:
        contents = {first: files.read(file, DataError)}
    except FileNotFoundError as error:
        raise DataError(f'config.data.tokenizer_path: there is no file {file}') from error
    for name in others:
        try:
            contents[name] = files.read(file.with_name(name), DataError)
        except FileNotFoundError:
            contents[name] = b'{}'
    return kind(contents | _files_next_to(file.parent, kind.EXTRA), str(file))


def _files_next_to(folder: pathlib.Path, names: Sequence[str]) -> dict[str, bytes]:
    """Returns the contents of those files that a folder has."""
    return {name: files.read(folder / name, DataError) for name in names if (folder / name).exists()}


def check_fits(tokenizer: Tokenizer, vocab_size: int, limit: str) -> None:
    """Raises UsageError if rows of text can contain ids that are not below `vocab_size`.

    Larger ids of special tokens that are never used do no harm.

    Args:
        tokenizer: makes the rows; the message names its file.
        vocab_size: the number of ids that are allowed.
        limit: a description of this number for the message, such as `the 32000 of the network`.
    """
    used = {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id}
    beyond = (i for i in range(vocab_size, tokenizer.vocab_size) if i in used or tokenizer.can_yield(i))
    with reading(tokenizer.origin, DataError):
        i = next(beyond, None)
    if i is not None:
        raise UsageError(
            f'the tokenizer {tokenizer.origin} has {tokenizer.vocab_size} ids, more than {limit}: rows may have id {i}'
        )


def load(folder: str | pathlib.Path, fingerprint: str | None = None) -> Tokenizer:
    """Returns the tokenizer that `save(folder)` wrote.

    Args:
        folder: of the saved tokenizer.
        fingerprint: of the tokenizer that some weights were trained with; None: it is not known.

    Raises:
        DataError: the folder, which is named, has no whole tokenizer, or one with another fingerprint.
    """
    folder = pathlib.Path(folder)
    with reading(folder, DataError, 'no tokenizer is saved here, or not whole'):
        saved = files.read_json(folder / saved_tokenizer.FINGERPRINT, DataError)
        kind = KINDS.get(saved['kind'])
        contents = {name: files.read(folder / name, DataError) for name in kind.FILES} if kind else {}
        contents |= _files_next_to(folder, kind.EXTRA) if kind else {}
    tokenizer = kind(contents, str(folder)) if kind else Bytes()
    if saved != saved_tokenizer.summary(tokenizer):
        raise DataError(f'{folder}: the saved tokenizer is damaged: its content has another fingerprint')
    if fingerprint not in (None, tokenizer.fingerprint):
        raise DataError(f'{folder} is not the tokenizer that the weights were trained with: put that one back')
    return tokenizer


def _fetch(kind: Any, url: str) -> Tokenizer:
    """Returns the tokenizer at a URL. The cache keeps only files that can be opened, so never a login page that a
    server sends in their place."""
    name = ' '.join([kind.kind, url, *kind.EXTRA])
    cache = files.cache_folder() / 'tokenizers' / hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    with contextlib.suppress(DataError):  # missing or damaged: it is fetched again
        return load(cache)
    if url.startswith('http:'):
        console.say(f'mixln_jax: warning: {url} is not https: the file may have been changed on the way')
    first, *others = kind.FILES
    contents = {first: download.fetch(url)}
    contents |= {name: download.fetch(urllib.parse.urljoin(url, name), absent=b'{}') for name in others}
    extra = {name: download.fetch(urllib.parse.urljoin(url, name), absent=b'') for name in kind.EXTRA}
    contents |= {name: content for name, content in extra.items() if content}
    tokenizer = kind(contents, url)
    with contextlib.suppress(OSError):  # the home folder cannot be written to: the file is fetched again next time
        tokenizer.save(cache)
    return tokenizer

"""The common part of tokenizers whose vocabulary was learned from text."""

import abc
import functools
import hashlib
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mixln_jax import config
from mixln_jax.data import saved_tokenizer, tokenizer_json
from mixln_jax.system import console
from mixln_jax.system.errors import DataError, reading

LONGEST = 10_000  # characters that are encoded at once: this bounds the memory, and the time until a limit is reached
NOTHING = b'\xff'  # the surface of a token that spells no text, or stands for any word: no UTF-8 contains this byte
BLANKS = bytes.maketrans(b'\t\n\r\x0b\x0c', b'     ')


class Learned(abc.ABC):
    """A vocabulary learned from text; see tokenizers.Tokenizer.

    A subclass has the class attributes `kind`, `FORM` (for error messages), `FILES`, which decide ids, and `EXTRA`,
    files that may come with them, and everything that is abstract here.
    """

    kind: str
    FORM: str
    FILES: tuple[str, ...]
    EXTRA: tuple[str, ...] = ()
    vocab_size: int
    chat_template = ''
    special_names: Mapping[str, str] = {}
    special_tokens: Sequence[str] = ()

    def __init__(self, contents: dict[str, bytes], origin: str):
        """Opens a tokenizer.

        Args:
            contents: {name: content} of the files in FILES and EXTRA.
            origin: the name of these files in messages.

        Raises:
            DataError: the files are not a whole tokenizer with a token for the end of a document.
        """
        self.contents, self.origin = contents, origin
        with reading(origin, DataError, f'not {self.FORM}, or not whole'), console.quiet():
            self._open()
            self._find_cuts()
            for text in tokenizer_json.PROBES:  # a tokenizer that fails on any text should fail now
                self._ids(text)

    @abc.abstractmethod
    def _open(self) -> None:
        """Reads `contents` and calls `_set_specials`."""

    @abc.abstractmethod
    def _ids(self, text: str) -> np.ndarray:
        """Returns the ids [n] int32 of a text, encoded at once."""

    @abc.abstractmethod
    def _offsets(self, text: str) -> np.ndarray:
        """Returns the byte of the text at which each id ends, [n] int64, as the library tells it."""

    @property
    @abc.abstractmethod
    def _surfaces(self) -> list[bytes]:
        """The bytes of text that each id spells."""

    @abc.abstractmethod
    def decode(self, ids: ArrayLike) -> str:
        """See tokenizers.Tokenizer."""

    @abc.abstractmethod
    def can_yield(self, i: int) -> bool:
        """See tokenizers.Tokenizer."""

    def _find_cuts(self) -> None:
        # Most tokens begin with their space, so a text is cut before a space. Some models (LLaMA's sentencepiece model)
        # put a space before every text that they encode. They fail the trial, and the space at the cut is dropped.
        trials = {space: [*self._ids('one'), *self._ids(f'{space}two')] for space in ' \n'}
        cuts = ''.join(space for space, ids in trials.items() if ids == [*self._ids(f'one{space}two')])
        self._dropped = 0 if cuts else 1
        self._cut = re.compile(rf'.*\w(?=[{cuts or " "}])', re.DOTALL)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.contents, self.origin)

    @property
    def fingerprint(self) -> str:
        """A digest of kind and contents that decide ids, hexadecimal."""
        digest = hashlib.blake2b(self.kind.encode(), digest_size=16)
        for name in self.FILES:
            digest.update(hashlib.blake2b(self.contents[name]).digest())
        return digest.hexdigest()

    def encode(self, text: str, limit: int | None = None) -> np.ndarray:
        with reading(self.origin, DataError, 'cannot encode a text'):
            return self._encode(text, limit)

    def spans(self, text: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        with reading(self.origin, DataError, 'cannot encode a text'):
            return self._all_spans(text, limit)

    def read_specials(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        return self.spans(text)

    def _encode(self, text: str, limit: int | None) -> np.ndarray:
        if len(text) <= LONGEST:
            return self._ids(text)[:limit]
        parts, count = [], 0
        for _, piece in self._pieces(text):
            parts.append(self._ids(piece))
            count += len(parts[-1])
            if limit is not None and count >= limit:
                break
        return np.concatenate(parts)[:limit]

    def _all_spans(self, text: str, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
        ids, ends, count, num_bytes, position = [], [], 0, 0, 0
        for start, piece in self._pieces(text):
            num_bytes, position = num_bytes + len(text[position:start].encode()), start
            piece_ids, piece_ends = self._spans(piece)
            ids.append(piece_ids)
            ends.append(num_bytes + piece_ends)
            count += len(piece_ids)
            if limit is not None and count >= limit:
                break
        return np.concatenate(ids)[:limit], np.concatenate(ends)[:limit]

    def _spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the spans of a text that is encoded at once.

        The tokens usually spell the text, or the text with every run of blanks reduced to one, perhaps after a blank.
        Only otherwise (a normaliser has changed letters, or words are unknown) are the libraries asked for offsets,
        which takes them several times as long as the ids.
        """
        ids, body = self._ids(text), text.encode()
        spelled, ends = self._spell(ids)
        for same in (body, blanks := body.translate(BLANKS)):
            if (before := _blanks_before(spelled, same)) is not None:
                return ids, ends - before
        single = b' '.join(body.split())
        if single and (before := _blanks_before(spelled, single)) is not None:
            kept = np.frombuffer(blanks, np.uint8) != 32
            kept[1:] |= kept[:-1]  # the first blank of a run too
            return ids, np.append(np.flatnonzero(kept), len(body.rstrip()))[ends - before]
        return ids, np.maximum.accumulate(self._offsets(text))

    def _spell(self, ids: np.ndarray) -> tuple[bytes, np.ndarray]:
        """Returns the bytes that ids [n] spell, and the position in them at which each id ends, [n]."""
        flat, starts, sizes = self._table
        ends = sizes[ids].cumsum(dtype=np.int32)
        positions = np.repeat(starts[ids] - np.append(np.int32(0), ends[:-1]), sizes[ids])
        positions += np.arange(len(positions), dtype=np.int32)
        return flat[positions].tobytes(), ends.astype(np.int64)

    @functools.cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All surfaces end to end, where each begins, and their sizes.

        It is small because it shares the caches with encoding; a list of surfaces would slow encoding down by a fifth.
        """
        sizes = np.array([len(surface) for surface in self._surfaces], np.int32)
        return np.frombuffer(b''.join(self._surfaces), np.uint8), sizes.cumsum(dtype=np.int32) - sizes, sizes

    def save(self, folder: str | pathlib.Path) -> None:
        saved_tokenizer.write(self, folder, self.contents)

    def export(self, folder: str | pathlib.Path) -> bool:
        return tokenizer_json.write(self, folder)

    def _pieces(self, text: str) -> Iterator[tuple[int, str]]:
        """Yields pairs (character at which a piece starts, piece)."""
        start = 0
        while len(text) - start > LONGEST:
            match = self._cut.match(text, start, start + LONGEST)
            end = match.end() if match else start + LONGEST
            yield start, text[start:end]
            start = end + (self._dropped if match else 0)
        yield start, text[start:]

    def _set_specials(self, pad: Any, bos: Any, eos: Any, missing: str) -> None:
        """Sets the special ids; -1 stands for no such token. Raises DataError, which tells what is `missing`."""
        if eos < 0:
            raise DataError(f'{self.origin}: no token for the end of a document: {missing}')
        self.pad_id, self.bos_id, self.eos_id = (eos if number < 0 else number for number in (pad, bos, eos))
        if self.vocab_size > config.LARGEST_VOCABULARY:
            raise DataError(f'{self.origin}: {self.vocab_size} ids, more than {config.LARGEST_VOCABULARY}')
        if not max(self.pad_id, self.bos_id, self.eos_id) < self.vocab_size:
            raise DataError(f'{self.origin}: a special id is not below the vocabulary size {self.vocab_size}')


def _blanks_before(spelled: bytes, text: bytes) -> int | None:
    """Returns 1 if `spelled` is a text after a blank, 0 if it is the text, else None."""
    before = len(spelled) - len(text)
    return before if before in (0, 1) and spelled.endswith(text) and not spelled[:before].strip(b' ') else None

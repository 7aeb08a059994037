"""Text to token ids and back."""

import hashlib
import json
import pathlib
from typing import Protocol

import numpy as np

from mixln_jax import config
from mixln_jax.exits import DataError


class Tokenizer(Protocol):
    """What every kind of tokenizer offers.

    `byte_lengths` [vocab_size] int32 is how many bytes of text each id stands for (0 for specials): with it a loss in
    nats a token becomes bits a byte. Equal `fingerprint`s (hex), equal ids for every text.
    """

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    byte_lengths: np.ndarray
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, [n] int32, without specials."""

    def decode(self, ids) -> str:
        """The text of ids [n]; specials are dropped, broken characters become U+FFFD."""

    def save(self, folder):
        """Writes the tokenizer into `folder`, which is made if need be."""


class Bytes:
    """UTF-8 bytes as ids 0..255."""

    vocab_size, pad_id, bos_id, eos_id = 259, 256, 257, 258
    byte_lengths = np.array([1] * 256 + [0] * 3, np.int32)

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(json.dumps(self._description()).encode(), digest_size=16).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        ids = np.asarray(ids)
        return ids[ids < 256].astype(np.uint8).tobytes().decode(errors='replace')

    def save(self, folder):
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'tokenizer.json').write_text(json.dumps(self._description(), indent=2) + '\n')

    def _description(self):
        names = ('vocab_size', 'pad_id', 'bos_id', 'eos_id')
        return {'kind': 'bytes'} | {name: getattr(self, name) for name in names}


def open_tokenizer(data: config.Data) -> Tokenizer:
    """The tokenizer of `data.tokenizer`; DataError for a kind that this version cannot read."""
    if data.tokenizer == 'sentencepiece':
        raise DataError('data.tokenizer=sentencepiece is not readable yet; use --config.data.tokenizer=bytes')
    return Bytes()

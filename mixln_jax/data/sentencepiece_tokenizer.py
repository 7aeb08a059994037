"""Tokenizers that are sentencepiece models."""

import functools

import numpy as np
import sentencepiece
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import ArrayLike

from mixln_jax.data.learned_tokenizer import NOTHING, Learned


class SentencePiece(Learned):
    """A sentencepiece model, such as those of T5, LLaMA 2 and Gemma."""

    kind = 'sentencepiece'
    FORM, FILES = 'a sentencepiece model', ('tokenizer.model',)

    def _open(self) -> None:
        model = self.contents['tokenizer.model']
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        # Pieces, trainer and normaliser follow each other; a file that is cut between two of them loads without an
        # error.
        if not {field.field_number for field in UnknownFieldSet(Empty.FromString(model))} >= {1, 2, 3}:
            raise ValueError('cut short')
        self.vocab_size = self._processor.vocab_size()
        pad, bos, eos = self._processor.pad_id(), self._processor.bos_id(), self._processor.eos_id()
        self._set_specials(pad, bos, eos, missing='the model has no eos piece')

    @functools.cached_property
    def _surfaces(self) -> list[bytes]:
        """The bytes of text that each id spells."""
        return [self._bytes(i) for i in range(self.vocab_size)]

    def decode(self, ids: ArrayLike) -> str:
        ids = np.asarray(ids)
        return self._processor.decode(ids[ids < self.vocab_size].tolist())

    def can_yield(self, i: int) -> bool:
        return not (self._processor.is_control(i) or self._processor.is_unused(i))

    def _offsets(self, text: str) -> np.ndarray:
        encoded = self._processor.encode(text, return_type='offset_mapping', return_bytes=True)
        return np.array([end for _, end in encoded['offsets']], np.int64)

    def _ids(self, text: str) -> np.ndarray:
        return self._processor.encode(text, return_type='numpy')

    def _bytes(self, i: int) -> bytes:
        piece = self._processor.id_to_piece(i)
        if self._processor.is_unknown(i) or not self.can_yield(i):
            return NOTHING
        return bytes([int(piece[1:-1], 16)]) if self._processor.is_byte(i) else piece.replace('▁', ' ').encode()

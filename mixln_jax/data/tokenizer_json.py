"""Tokenizers as files that transformers opens, if these give the same ids."""

import pathlib
from typing import Any

import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mixln_jax.system import outputs

PROBES = (
    'The quick brown fox, 3.14 times.',
    ' two  spaces,\ttab\n\nlines \r\n',
    'Ünïcödé ﬁ ½ … “quoted” 日本語 🙂',
    'def f(x):\n    return {x: "</a>"}',
    'a\u00a0b\u200bc',
)


def write(tokenizer: Any, folder: str | pathlib.Path) -> bool:
    """Writes tokenizer.json, tokenizer_config.json and the chat template, if the files give the same ids for PROBES;
    returns whether they do.

    There is one difference: transformers reads a text that spells a special token as that token, a `tokenizer` of ours
    as letters.

    Args:
        tokenizer: a tokenizers.Tokenizer.
        folder: for the two files.
    """
    converted = _CONVERTERS[tokenizer.kind](tokenizer)
    if converted is None or any(
        converted.encode(text, add_special_tokens=False).ids != tokenizer.encode(text).tolist() for text in PROBES
    ):
        return False
    roles = {'pad': tokenizer.pad_id, 'bos': tokenizer.bos_id, 'eos': tokenizer.eos_id}
    # Without the class, transformers would open any tokenizer as LLaMA's own, with other ids and without a warning.
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    settings |= {f'{role}_token': converted.id_to_token(number) for role, number in roles.items()}
    outputs.write(pathlib.Path(folder, 'tokenizer.json'), converted.to_str(pretty=True).encode() + b'\n')
    outputs.write_json(pathlib.Path(folder, 'tokenizer_config.json'), settings)
    if tokenizer.chat_template:
        outputs.write(pathlib.Path(folder, 'chat_template.jinja'), tokenizer.chat_template.encode())
    return True


def _alphabet() -> dict[str, int]:
    """Returns {character: byte}: since GPT-2 a printable character stands for each byte."""
    shown, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    return {chr(byte if byte in shown else next(others)): byte for byte in range(256)}


ALPHABET = _alphabet()


def _from_bytes(tokenizer: Any) -> library.Tokenizer:
    """Returns a BPE without merges: every byte is a token, named by its character."""
    specials = {'<pad>': tokenizer.pad_id, '<s>': tokenizer.bos_id, '</s>': tokenizer.eos_id}
    converted = library.Tokenizer(models.BPE(ALPHABET | specials, []))
    converted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    converted.decoder = decoders.ByteLevel()
    converted.add_special_tokens(list(specials))
    return converted


def _from_sentencepiece(tokenizer: Any) -> library.Tokenizer | None:
    """Returns the conversion of a unigram model (T5's, for example); None for other models."""
    # Imported here: a process that has loaded transformers' own copy of these messages cannot register them again.
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # its classes are made when it is imported
    model = messages.ModelProto.FromString(tokenizer.contents['tokenizer.model'])
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        return None
    vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
    unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == piece.UNKNOWN)
    converted = library.Tokenizer(models.Unigram(vocabulary, unknown, model.trainer_spec.byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)]
    if model.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(library.Regex(' {2,}'), ' ')]
    converted.normalizer = normalizers.Sequence(steps)
    prepend = 'always' if model.normalizer_spec.add_dummy_prefix else 'never'
    converted.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    converted.decoder = decoders.Metaspace(prepend_scheme=prepend)
    converted.add_special_tokens([piece.piece for piece in model.pieces if piece.type == piece.CONTROL])
    return converted


def _from_hugging_face(tokenizer: Any) -> library.Tokenizer:
    converted = library.Tokenizer.from_buffer(tokenizer.contents['tokenizer.json'])
    converted.no_truncation()
    converted.no_padding()
    return converted


_CONVERTERS = {
    'bytes': _from_bytes,
    'sentencepiece': _from_sentencepiece,
    'huggingface': _from_hugging_face,
}

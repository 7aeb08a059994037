"""A tokenizer as the files that transformers opens, where these give the same ids."""

import pathlib

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


def write(tokenizer, folder):
    """Writes tokenizer.json and tokenizer_config.json; returns whether there are such that give the ids of PROBES.

    Texts that spell a special token are read as that token by transformers, as letters here.
    """
    made = _MADE[tokenizer.kind](tokenizer)
    if made is None or any(
        made.encode(text, add_special_tokens=False).ids != tokenizer.encode(text).tolist() for text in PROBES
    ):
        return False
    roles = {'pad': tokenizer.pad_id, 'bos': tokenizer.bos_id, 'eos': tokenizer.eos_id}
    # By its model_type alone, transformers would open any tokenizer as LLaMA's own, with other ids and no word.
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    settings |= {f'{role}_token': made.id_to_token(number) for role, number in roles.items()}
    outputs.write(pathlib.Path(folder, 'tokenizer.json'), made.to_str(pretty=True).encode() + b'\n')
    outputs.write_json(pathlib.Path(folder, 'tokenizer_config.json'), settings)
    return True


def _alphabet():
    shown, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, iter(range(256, 512))
    return {chr(byte if byte in shown else next(others)): byte for byte in range(256)}


ALPHABET = _alphabet()  # {character: the byte that it stands for since GPT-2}


def _from_bytes(tokenizer):
    """Every byte is a token, under its character."""
    specials = {'<pad>': tokenizer.pad_id, '<s>': tokenizer.bos_id, '</s>': tokenizer.eos_id}
    made = library.Tokenizer(models.BPE(ALPHABET | specials, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(specials))
    return made


def _from_sentencepiece(tokenizer):
    """Of the unigram model (T5's); for others None."""
    # Not above: a process that has transformers' own copy of these messages cannot register them again.
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.contents['tokenizer.model'])
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        return None
    vocabulary = [(piece.piece, piece.score) for piece in model.pieces]
    unknown = next(number for number, piece in enumerate(model.pieces) if piece.type == piece.UNKNOWN)
    made = library.Tokenizer(models.Unigram(vocabulary, unknown, model.trainer_spec.byte_fallback))
    steps = [normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)]
    if model.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(library.Regex(' {2,}'), ' ')]
    made.normalizer = normalizers.Sequence(steps)
    prepend = 'always' if model.normalizer_spec.add_dummy_prefix else 'never'
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    made.decoder = decoders.Metaspace(prepend_scheme=prepend)
    made.add_special_tokens([piece.piece for piece in model.pieces if piece.type == piece.CONTROL])
    return made


def _from_hugging_face(tokenizer):
    made = library.Tokenizer.from_buffer(tokenizer.contents['tokenizer.json'])
    made.no_truncation()
    made.no_padding()
    return made


_MADE = {
    'bytes': _from_bytes,
    'sentencepiece': _from_sentencepiece,
    'huggingface': _from_hugging_face,
}

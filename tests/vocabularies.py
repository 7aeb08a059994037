"""Small vocabularies of every kind, made here, and how tests open them."""

import functools
import io
import json
import random

import sentencepiece
import tokenizers as library
from tokenizers import decoders, models, normalizers, pre_tokenizers

from mixln_jax import config
from mixln_jax.data import tokenizers, train_tokenizer

T5 = {'pad_id': 0, 'eos_id': 1, 'unk_id': 2, 'bos_id': -1, 'model_type': 'unigram'}
LLAMA = {
    'model_type': 'bpe',
    'byte_fallback': True,
    'normalization_rule_name': 'identity',
    'remove_extra_whitespaces': False,
}
KINDS = 't5', 'llama', 'byte_level', 'unigram', 'wordpiece'


@functools.cache
def words():
    rng = random.Random(0)
    syllables = [a + b for a in 'bdfgklmnprstvz' for b in 'aeiou']
    return [''.join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(400)]


def prose(lines, seed=0):
    """Lines of invented words, punctuation and numbers."""
    rng, made = random.Random(seed), []
    for _ in range(lines):
        line = [rng.choice(words()) + rng.choice(['', '', '', ',', '. ', '\t', '!', f' {rng.randrange(999)}'])]
        made.append(' '.join(line + rng.choices(words(), k=rng.randint(3, 14))))
    return made


@functools.cache
def sentencepiece_model(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(400)), model_writer=model, vocab_size=320, minloglevel=2, **options
    )
    return model.getvalue()


@functools.cache
def byte_level():
    return train_tokenizer.train(prose(400), 400)


@functools.cache
def unigram():
    """As T5's tokenizer.json: the specials are pieces of the model too, where they have the best score of all."""
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(**T5))
    vocabulary = [(model.id_to_piece(i), model.get_score(i)) for i in range(model.vocab_size())]
    tokenizer = library.Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(['<pad>', '</s>', '<unk>'])
    return tokenizer.to_str().encode()


def wordpiece():
    pieces = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', *'abcdefghijklmnopqrstuvwxyz0123456789', '##ab', 'ba']
    pieces += [f'##{letter}' for letter in 'abcdefghijklmnopqrstuvwxyz0123456789']
    tokenizer = library.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token='[UNK]'))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.add_special_tokens(['[PAD]', '[UNK]', '[CLS]', '[SEP]'])
    return tokenizer.to_str().encode()


def content(name):
    """The file of one of KINDS."""
    if name in ('t5', 'llama'):
        return sentencepiece_model(**(T5 if name == 't5' else LLAMA))
    return {'byte_level': byte_level, 'unigram': unigram, 'wordpiece': wordpiece}[name]()


def kind_of(name):
    return 'sentencepiece' if name in ('t5', 'llama') else 'huggingface'


def open_file(path, kind='huggingface'):
    return tokenizers.open_tokenizer(config.Data(tokenizer=kind, tokenizer_path=str(path)))


def open_named(name, folder):
    """Opens one of KINDS, or bytes."""
    if name == 'bytes':
        return tokenizers.open_tokenizer(config.Data(tokenizer='bytes'))
    path = folder / name
    path.write_bytes(content(name))
    return open_file(path, kind_of(name))


def specials(tokenizer):
    return tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id


def with_settings(tmp_path, body, settings):
    tmp_path.joinpath('tokenizer.json').write_bytes(body)
    tmp_path.joinpath('tokenizer_config.json').write_text(json.dumps(settings))
    return open_file(tmp_path / 'tokenizer.json')


def changed(body, **values):
    """A tokenizer.json with other values at its top."""
    return json.dumps(json.loads(body) | values).encode()


# A chat template without {% generation %}, as most tokenizers have it; the end of a turn is a special token.
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def with_chat_template(folder, template=CHAT, name='byte_level', **settings):
    """A tokenizer with a chat template and the tokens of chatml."""
    spec = json.loads(content(name))
    top = 1 + max(token['id'] for token in spec['added_tokens'])
    size = max(top, len(spec['model']['vocab']))
    for number, token in enumerate(('<|im_start|>', '<|im_end|>')):
        of = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        spec['added_tokens'].append({'id': size + number, 'content': token} | of)
    (folder / 'tokenizer.json').write_text(json.dumps(spec))
    settings = {'eos_token': '</s>', 'bos_token': '<s>', 'chat_template': template} | settings
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    return open_file(folder / 'tokenizer.json')

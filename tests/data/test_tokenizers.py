"""Tokenizers: ids, specials, long texts, wrong files."""

import json
import os
import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from tokenizers import decoders, models
from vocabularies import (
    KINDS,
    T5,
    byte_level,
    changed,
    content,
    kind_of,
    open_file,
    prose,
    sentencepiece_model,
    specials,
    unigram,
    with_settings,
    words,
)

from mixln_jax import config
from mixln_jax.data import learned_tokenizer, tokenizers
from mixln_jax.system.errors import DataError, UsageError

TEXTS = '', 'plain', 'one  two\n three', 'nul\0nul', 'größer 日本語', '🙂👩\u200d🚀', '</s> <pad><s>'


# bytes


@pytest.mark.parametrize('text', ['', 'plain', 'größer\r\n\0', '日本語', '🙂👩\u200d🚀'])
def test_bytes_round_trip(text, opened):
    tokenizer = opened('bytes')
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([257, *ids, 258, 256]) == text


def test_bytes():
    tokenizer = tokenizers.Bytes()
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (259, 256, 257, 258)
    assert tokenizer.decode([0xE2, 0x82, ord('a')]) == '\ufffda'
    assert tokenizer.fingerprint == 'fda23d4b1b73fbd6e0f44f47ed887757'  # prepared rows and runs hold it


def test_bytes_save(tmp_path):
    tokenizers.Bytes().save(tmp_path / 'run/tokenizer')
    saved = json.loads((tmp_path / 'run/tokenizer/tokenizer.json').read_text())
    assert saved == {'kind': 'bytes', 'vocab_size': 259, 'pad_id': 256, 'bos_id': 257, 'eos_id': 258}


# every kind


@pytest.mark.parametrize('name', ['bytes', *KINDS])
def test_encode(name, opened):
    tokenizer = opened(name)
    special = {*specials(tokenizer)}
    assert tokenizer.kind == ('bytes' if name == 'bytes' else kind_of(name))
    assert all(0 <= i < tokenizer.vocab_size for i in special)
    for text in [*TEXTS, *prose(20, seed=1)]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1 and bool(len(ids)) == bool(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids) and not special & set(ids.tolist())
        for limit in (0, 1, 3, 1000):
            assert tokenizer.encode(text, limit).tolist() == ids[:limit].tolist()
            found, ends = tokenizer.spans(text, limit)
            assert found.tolist() == ids[:limit].tolist() and len(ends) == len(found)


@pytest.mark.parametrize('name', ['llama', 'byte_level'])
@pytest.mark.parametrize('text', TEXTS)
def test_nothing_is_lost(name, text, opened):
    tokenizer = opened(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.eos_id, *ids, tokenizer.eos_id]) == text


@pytest.mark.parametrize('name', KINDS)
def test_decode(name, opened):
    tokenizer = opened(name)
    text = ' '.join(words()[:20])
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode([tokenizer.pad_id, *ids, tokenizer.eos_id, tokenizer.vocab_size + 5]) == text
    assert tokenizer.decode([]) == ''


@pytest.mark.parametrize('name', KINDS)
def test_pickle(name, opened):
    tokenizer = opened(name)
    tokenizer.encode('a'), tokenizer.spans('a')  # what they keep is not sent along
    text = '\n'.join(prose(300))
    body = pickle.dumps(tokenizer)
    assert len(body) < len(content(name)) + 1000
    again = pickle.loads(body)
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert again.fingerprint == tokenizer.fingerprint and again.eos_id == tokenizer.eos_id


# long texts


def whole(tokenizer, text):
    """The ids of a text that is not cut."""
    if tokenizer.kind == 'sentencepiece':
        return sentencepiece.SentencePieceProcessor(model_proto=content_of(tokenizer)).encode(text)
    bare = library.Tokenizer.from_buffer(content_of(tokenizer))
    return bare.encode(text, add_special_tokens=False).ids


def content_of(tokenizer):
    [body, *_] = tokenizer.contents.values()
    return body


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize('joint', [' ', '\n', '\n\n  ', '. '])
def test_long_texts_have_the_same_ids(name, joint, opened, monkeypatch):
    monkeypatch.setattr(learned_tokenizer, 'LONGEST', 200)
    tokenizer = opened(name)
    text = joint.join(prose(60, seed=2))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == whole(tokenizer, text)
    for limit in (0, 1, 100, 777):
        assert tokenizer.encode(text, limit).tolist() == ids[:limit].tolist()
    assert len(text) > 15 * learned_tokenizer.LONGEST


@pytest.mark.parametrize('name', ['t5', 'byte_level', 'wordpiece'])
def test_long_texts_of_lines_have_the_same_ids(name, opened, monkeypatch):
    monkeypatch.setattr(learned_tokenizer, 'LONGEST', 50)
    tokenizer, text = opened(name), '\n'.join(words())
    assert tokenizer.encode(text).tolist() == whole(tokenizer, text)


@pytest.mark.parametrize('name', ['llama', 'byte_level'])
@pytest.mark.parametrize('text', ['x' * 25_000, 'ab\tcd' * 6000, 'a ' + 'b' * 30_000 + ' c'])
def test_long_texts_without_spaces(name, text, opened, monkeypatch):
    tokenizer = opened(name)
    sizes, encode = [], tokenizer._ids
    monkeypatch.setattr(tokenizer, '_ids', lambda piece: sizes.append(len(piece)) or encode(piece))
    ids = tokenizer.encode(text)
    assert max(sizes) <= learned_tokenizer.LONGEST and len(sizes) >= 3
    if name == 'byte_level':
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, 5).tolist() == ids[:5].tolist()


def test_a_limit_saves_work(opened, monkeypatch):
    tokenizer = opened('t5')
    sizes, encode = [], tokenizer._ids
    monkeypatch.setattr(tokenizer, '_ids', lambda piece: sizes.append(len(piece)) or encode(piece))
    text = '\n'.join(prose(2000))
    tokenizer.encode(text, 256)
    assert len(sizes) == 1 and len(text) > 10 * learned_tokenizer.LONGEST
    tokenizer.encode(text)
    assert len(text) - 100 < sum(sizes[1:]) <= len(text)


# sentencepiece


def test_sentencepiece_specials(opened):
    t5, llama = opened('t5'), opened('llama')
    assert (t5.vocab_size, t5.pad_id, t5.bos_id, t5.eos_id) == (320, 0, 1, 1)  # no bos: eos
    assert (llama.vocab_size, llama.pad_id, llama.bos_id, llama.eos_id) == (320, 2, 1, 2)  # no pad: eos
    bare = sentencepiece.SentencePieceProcessor(model_proto=content('t5'))
    assert t5.encode('bade kilo').tolist() == bare.encode('bade kilo')


def test_sentencepiece_without_end(tmp_path):
    (tmp_path / 'a.model').write_bytes(sentencepiece_model(**(T5 | {'eos_id': -1})))
    with pytest.raises(DataError, match=r'a\.model: no token for the end .* no eos piece'):
        open_file(tmp_path / 'a.model', 'sentencepiece')


def test_sentencepiece_cut_off(tmp_path):
    """Wherever it ends: between two pieces the library itself notices nothing."""
    model, loaded = content('t5'), 0
    for size in [*range(0, 5000, 3), *range(5000, 5060)]:  # pieces end at 5,008, the trainer at 5,036
        with pytest.raises(DataError, match='where: not a'):
            tokenizers.SentencePiece({'tokenizer.model': model[:size]}, 'where')
        try:
            sentencepiece.SentencePieceProcessor(model_proto=model[:size])
            loaded += size > 0
        except RuntimeError:
            pass
    assert loaded


def test_a_special_id_beyond_the_vocabulary(opened):
    tokenizer = opened('t5')
    tokenizer._set_specials(319, -1, 1, '')
    for ids in ((320, -1, 1), (-1, 320, 1), (-1, -1, 320)):
        with pytest.raises(DataError, match='t5: a special id is not below the vocabulary size 320'):
            tokenizer._set_specials(*ids, '')


# wrong files


@pytest.mark.parametrize('kind', ['sentencepiece', 'huggingface'])
def test_wrong_files(kind, tmp_path):
    whole_file = content('t5' if kind == 'sentencepiece' else 'byte_level')
    other = content('byte_level' if kind == 'sentencepiece' else 't5')
    html = b'<!DOCTYPE html><html><body>404</body></html>'
    for body in (b'', html, whole_file[: len(whole_file) // 2], other, b'{}', b'null', b'\0' * 100):
        (tmp_path / 'a.file').write_bytes(body)
        with pytest.raises(DataError, match=r'a\.file: not a '):
            open_file(tmp_path / 'a.file', kind)
    with pytest.raises(DataError, match=r'tokenizer_path: there is no file .*b\.file'):
        open_file(tmp_path / 'b.file', kind)
    (tmp_path / 'folder').mkdir()
    with pytest.raises(DataError, match='folder: cannot be read: it is a folder'):
        open_file(tmp_path / 'folder', kind)


PANICS = {  # parts of a tokenizer.json over which the library's Rust panics
    'normalizer': {'type': 'Precompiled', 'precompiled_charsmap': 'AAEC'},
    'pre_tokenizer': {'type': 'FixedLength', 'length': 0},
}


@pytest.mark.parametrize('part', PANICS)
def test_panics_are_one_line(part, tmp_path, capfd):
    (tmp_path / 'a.json').write_text(json.dumps(json.loads(byte_level()) | {part: PANICS[part]}))
    with pytest.raises(DataError, match=r'a\.json: not a tokenizer\.json, or not whole: .*PanicException'):
        open_file(tmp_path / 'a.json')
    assert capfd.readouterr().err == ''


def test_a_text_without_any_token(tmp_path):
    """Of a vocabulary that has no token for what it does not know."""
    spec = json.loads(byte_level())
    spec['model'] |= {'vocab': {'</s>': 0, 'a': 1, 'aa': 2}, 'merges': [['a', 'a']]}
    (tmp_path / 'a.json').write_text(json.dumps(spec))
    assert [values.tolist() for values in open_file(tmp_path / 'a.json').spans('q')] == [[], []]


def test_ids_beyond_any_vocabulary(tmp_path):
    spec = json.loads(byte_level())
    spec['model']['vocab']['far'] = 2**32 - 1
    (tmp_path / 'a.json').write_text(json.dumps(spec))
    with pytest.raises(DataError, match=r'a\.json: 4294967296 ids, more than 16777216'):
        open_file(tmp_path / 'a.json')


def test_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    os.mkfifo(tmp_path / 'tokenizer_config.json')
    (tmp_path / 'tokenizer.json').write_bytes(byte_level())
    for path, what in ((tmp_path / 'pipe', 'pipe'), ('/dev/zero', 'device'), (tmp_path / 'tokenizer.json', 'pipe')):
        with pytest.raises(DataError, match=f'cannot be read: it is a {what}, not a file'):
            open_file(path)


def test_huggingface_needs_a_path():
    with pytest.raises(UsageError, match=r'config\.data\.tokenizer_path is empty'):
        tokenizers.open_tokenizer(config.Data(tokenizer='huggingface'))


# huggingface


def test_huggingface_specials(tmp_path, opened):
    assert specials(opened('byte_level')) == (0, 2, 1)
    assert specials(opened('unigram')) == (0, 1, 1)
    assert specials(opened('wordpiece')) == (0, 2, 3)
    settings = {'eos_token': {'content': '<s>', 'lstrip': False}, 'pad_token': '</s>', 'bos_token': None}
    assert specials(with_settings(tmp_path, byte_level(), settings)) == (1, 2, 2)


def test_huggingface_other_settings(tmp_path):
    named = r'tokenizer\.json: the tokenizer_config\.json next to it'
    for eos in ('<end>', {'content': '<end>'}, {'other': 1}, 7):
        if eos == {'other': 1}:  # as if it were not there
            assert specials(with_settings(tmp_path, byte_level(), {'eos_token': eos}))[2] == 1
            continue
        with pytest.raises(DataError, match=f'{named} names eos_token .*, which the vocabulary lacks'):
            with_settings(tmp_path, byte_level(), {'eos_token': eos})
    with pytest.raises(DataError, match=f'{named} is not a JSON object'):
        with_settings(tmp_path, byte_level(), ['</s>'])
    (tmp_path / 'tokenizer_config.json').write_text('<html>')
    with pytest.raises(DataError, match=f'{named} is not a JSON object'):
        open_file(tmp_path / 'tokenizer.json')


def test_huggingface_without_end(tmp_path):
    tokenizer = library.Tokenizer(models.BPE({'a': 0, '<pad>': 1}, []))
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    with pytest.raises(DataError, match=r'tokenizer\.json: no token for the end .*tokenizer_config\.json.*</s>'):
        open_file(tmp_path / 'tokenizer.json')


def test_huggingface_neither_cuts_nor_pads_nor_drops(tmp_path, opened):
    plain = opened('byte_level')
    body = json.loads(byte_level())
    truncation = {'direction': 'Right', 'max_length': 4, 'strategy': 'LongestFirst', 'stride': 0}
    padding = {'strategy': {'Fixed': 64}, 'direction': 'Right', 'pad_to_multiple_of': None}
    padding |= {'pad_id': 0, 'pad_type_id': 0, 'pad_token': '<pad>'}
    body['model']['dropout'] = 0.5
    (tmp_path / 'tokenizer.json').write_bytes(changed(json.dumps(body), truncation=truncation, padding=padding))
    tokenizer = open_file(tmp_path / 'tokenizer.json')
    for text in ('a', *prose(5)):
        assert tokenizer.encode(text).tolist() == plain.encode(text).tolist()


@pytest.mark.parametrize('name', ['byte_level', 'unigram', 'wordpiece'])
def test_spelled_specials_are_text(name, tmp_path, opened):
    tokenizer = opened(name)
    bare = library.Tokenizer.from_buffer(content(name))
    token = bare.id_to_token(tokenizer.eos_id)
    assert tokenizer.eos_id in bare.encode(f'ba {token} ba').ids  # what would happen
    for text in (token, f'ba {token} ba', f'ba{token}{token}ba', f'ba {bare.id_to_token(tokenizer.pad_id)}'):
        assert not {tokenizer.eos_id, tokenizer.pad_id} & set(tokenizer.encode(text).tolist())
    if name == 'byte_level':
        assert tokenizer.decode(tokenizer.encode(f'ba {token} ba')) == f'ba {token} ba'


def test_specials_that_the_file_calls_ordinary(tmp_path):
    added = [entry | {'special': False} for entry in json.loads(byte_level())['added_tokens']]
    (tmp_path / 'tokenizer.json').write_bytes(changed(byte_level(), added_tokens=added))
    tokenizer = open_file(tmp_path / 'tokenizer.json')
    ids = tokenizer.encode('ba</s>')
    assert tokenizer.eos_id not in ids and tokenizer.decode([*ids, tokenizer.eos_id]) == 'ba</s>'


def test_an_end_that_is_ordinary_text(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json: a text that spells 'a' cannot be told"):
        with_settings(tmp_path, unigram(), {'eos_token': 'a'})


def test_byte_pieces(tmp_path):
    vocabulary = {'</s>': 0, '<0xE2>': 1, '▁': 2, '▁é': 3, '<0x82>': 4, '<0xAC>': 5, '<unk>': 6, 'x': 9}
    tokenizer = library.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token='<unk>'))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(['</s>', '<unk>'])
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    tokenizer = open_file(tmp_path / 'tokenizer.json')
    assert tokenizer.encode('€').tolist() == [1, 4, 5] and tokenizer.decode([1, 4, 5]) == '€'

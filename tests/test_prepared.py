"""Prepared rows: those of the text they were made of, and what their files may do."""

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
import tokenizers as library
from corpora import T, all_tokens, open_, prepare_to, two_files, write
from tokenizers import models, pre_tokenizers

from mixln_jax import config
from mixln_jax.data import layout, prepared
from mixln_jax.exits import DataError


@pytest.fixture
def data(tmp_path):
    return two_files(tmp_path)


@pytest.fixture
def folder(tmp_path, data):
    prepare_to(tmp_path / 'out', data)
    return tmp_path / 'out'


def describe(folder, **changes):
    path = folder / 'tokens.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize('mode', layout.FILL)
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_rows_are_those_of_the_text(tmp_path, data, mode, split):
    data = dataclasses.replace(data, mode=mode, path=f'{tmp_path}/a.jsonl')
    made, wanted = open_(prepare_to(tmp_path / 'out', data, mode), split), open_(data, split)
    np.testing.assert_array_equal(all_tokens(made), all_tokens(wanted))
    assert made.layout == wanted.layout
    assert made.fingerprint == wanted.fingerprint | {'source': made.fingerprint['source']}


@pytest.mark.parametrize('mode', layout.FILL)
def test_large_vocabularies_take_four_bytes(tmp_path, mode):
    """A word an id; the ends of documents lie beyond two bytes, as do some words."""
    words = {f'w{i}': i for i in range(70_000)} | {'</s>': 70_000, '?': 70_001}
    tokenizer = library.Tokenizer(models.WordLevel(words, unk_token='?'))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / 'tokenizer.json'))
    numbers = np.random.default_rng(0).integers(60_000, 70_000, (60, 11))
    texts = [' '.join(f'w{number}' for number in row) for row in numbers]
    data = config.Data('jsonl', str(write(tmp_path / 'a.jsonl', texts)), mode=mode, tokenizer='huggingface')
    data = dataclasses.replace(data, tokenizer_path=str(tmp_path / 'tokenizer.json'))
    read = prepare_to(tmp_path / 'out', data, mode)
    for split in ('train', 'validation'):
        made, wanted = open_(read, split, vocab_size=70_002), open_(data, split, vocab_size=70_002)
        np.testing.assert_array_equal(all_tokens(made), all_tokens(wanted))
        large = {*all_tokens(made).ravel().tolist()} - {*range(2**16)}
        assert all_tokens(made).dtype == np.uint32 and len(large) > 9


def test_origin(tmp_path, data, folder):
    made = prepared.Prepared(str(folder), 'train')
    shards = sorted(folder.glob('train-*.bin'))
    found = np.concatenate([np.fromfile(shard, '<u2').reshape(-1, T + 1) for shard in shards])
    np.testing.assert_array_equal(all_tokens(made), found)
    count = os.path.getsize(shards[0]) // (2 * (T + 1))
    assert made.origin(count - 1) == f'{shards[0]}, row {count - 1}'
    assert made.origin(count) == f'{shards[1]}, row 0'
    with pytest.raises(IndexError):
        made.origin(len(made))


def test_pickle(folder):
    made = prepared.Prepared(str(folder), 'train')
    wanted = all_tokens(made)
    copy = pickle.loads(pickle.dumps(made))
    np.testing.assert_array_equal(all_tokens(copy), wanted)
    assert copy.fingerprint == made.fingerprint
    copy = pickle.loads(pickle.dumps(made))
    for shard in folder.glob('*.bin'):
        shard.unlink()
    with pytest.raises(DataError, match='cannot be read'):  # in its process it opens the files itself
        copy.read([0])


def test_fingerprint(tmp_path, data, folder):
    def fingerprint(name, split='train'):
        return prepared.Prepared(str(tmp_path / name), split).fingerprint['source']

    prepare_to(tmp_path / 'again', data)
    (tmp_path / 'b.jsonl').write_text((tmp_path / 'b.jsonl').read_text().replace('b1 ', 'c1 '))
    prepare_to(tmp_path / 'other', data)
    assert fingerprint('again') == fingerprint('out') != fingerprint('other')
    assert fingerprint('out', 'validation') != fingerprint('out')


def test_home(tmp_path, monkeypatch, folder):
    monkeypatch.setenv('HOME', str(tmp_path))
    data = config.Data(source='tokens', path='~/out', tokenizer='bytes')
    assert len(open_(data)) == len(prepared.Prepared(str(folder), 'train'))


def test_no_description(folder):
    (folder / 'tokens.json').unlink()
    for open_it in (lambda: prepared.Prepared(str(folder), 'train'), lambda: prepared.open_tokenizer(str(folder))):
        with pytest.raises(DataError, match=f'config.data.path={folder}: no tokens.json; .*data.prepare'):
            open_it()


@pytest.mark.parametrize('content', [b'', b'{"mode": "pad", ', b'\xff', b'[]', b'{}', b'{"splits": {}}'])
def test_bad_description(folder, content):
    (folder / 'tokens.json').write_bytes(content)
    with pytest.raises(DataError, match=f'{folder}/tokens.json: not what data.prepare writes'):
        prepared.Prepared(str(folder), 'train')


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'dtype': 'x'}, '/tokens.json: not what data.prepare writes: TypeError'),
        ({'seq_length': None}, '/tokens.json: not what data.prepare writes: TypeError'),
        ({'splits': {'train': [{'file': 'a'}]}}, "/tokens.json: not what data.prepare writes: KeyError.*'rows'"),
        ({'splits': {'train': []}}, ': no rows in split train'),
        ({'splits': {'test': []}}, r': no split train \(there is test\)'),
    ],
)
def test_bad_values(folder, changes, message):
    describe(folder, **changes)
    with pytest.raises(DataError, match=f'^{folder}{message}'):
        prepared.Prepared(str(folder), 'train')


def test_no_rows(tmp_path, data):
    short = write(tmp_path / 'short.json', ['a'])
    data = prepare_to(tmp_path / 'out', data, 'concat', validation=str(short))
    assert len(open_(data)) > 0
    with pytest.raises(DataError, match='out: no rows in split validation'):
        open_(data, 'validation')


@pytest.mark.parametrize('size', [0, 1000])
def test_shard_of_another_size(folder, size):
    shard = folder / 'train-00001-of-00002.bin'
    wanted = shard.stat().st_size
    os.truncate(shard, size)
    with pytest.raises(DataError, match=f'^{shard}: {size} bytes, not {wanted}$'):
        prepared.Prepared(str(folder), 'train')
    shard.unlink()
    with pytest.raises(DataError, match=f'^{shard}: missing$'):
        prepared.Prepared(str(folder), 'train')


def test_shard_that_is_cut_short_while_open(folder):
    made = prepared.Prepared(str(folder), 'train')
    last = len(made) - 1
    made.read([last])
    shard = folder / 'train-00001-of-00002.bin'
    os.truncate(shard, shard.stat().st_size - 1)
    made.read([0, last - 1])
    with pytest.raises(DataError, match=rf'^{made.origin(last)}: cut short$'):
        made.read([0, last, 1])


def test_shard_that_goes_away(folder):
    made = prepared.Prepared(str(folder), 'train')
    (folder / 'train-00001-of-00002.bin').unlink()
    made.read([0])
    with pytest.raises(DataError, match='train-00001-of-00002.bin, row .*: cannot be read: No such file'):
        made.read([0, len(made) - 1])


def test_disk_that_fails(folder, monkeypatch):
    made = prepared.Prepared(str(folder), 'train')

    def fail(*args):
        raise OSError(5, 'Input/output error')

    monkeypatch.setattr(prepared.os, 'pread', fail)
    with pytest.raises(DataError, match='train-00000-of-00002.bin'):
        made.read([0])


def test_an_id_beyond_the_vocabulary(folder):
    made, shard = prepared.Prepared(str(folder), 'train'), folder / 'train-00000-of-00002.bin'
    with shard.open('r+b') as file:
        file.seek(2 * (2 * (T + 1) + 3))
        file.write(np.uint16(259).tobytes())
    made.read([0, 1, 3])
    with pytest.raises(DataError, match=f'^{shard}, row 2: an id is not below the vocabulary size 259$'):
        made.read([0, 2, 1])
    describe(folder, vocab_size=100)
    with pytest.raises(DataError, match=f'^{shard}, row 0: an id is not below the vocabulary size 100$'):
        prepared.Prepared(str(folder), 'train').read([0])


def test_many_shards_may_be_open(folder, open_files):
    made = prepared.Prepared(str(folder), 'train')
    assert open_files() > 256
    pickle.loads(pickle.dumps(made))
    assert open_files() > 256


def test_other_tokenizer(folder):
    assert prepared.open_tokenizer(str(folder)).kind == 'bytes'
    describe(folder, tokenizer='another')
    with pytest.raises(DataError, match=f'{folder}/tokenizer is not the tokenizer that made the rows'):
        prepared.open_tokenizer(str(folder))
    (folder / 'tokenizer/fingerprint.json').unlink()
    with pytest.raises(DataError, match=f'{folder}/tokenizer'):
        prepared.open_tokenizer(str(folder))

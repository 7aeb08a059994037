"""Prepared rows: those of the text they were made of, and what their files may do."""

import dataclasses
import json
import math
import os
import pickle
import re

import numpy as np
import pytest
import tokenizers as library
from corpora import T, all_tokens, open_, prepare_to, two_files, write
from tokenizers import models, pre_tokenizers

from mixln_jax import config
from mixln_jax.data import inspect, layout, prepared, tokenizers, verify
from mixln_jax.system.errors import DataError, UsageError


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


NOT, SHARD = '/tokens.json: not what data.prepare writes: ', {'file': 'a.bin', 'rows': 0, 'digest': 'a'}


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'mode': 'heap'}, f"{NOT}mode is 'heap'"),
        ({'mode': ['pad']}, f'{NOT}mode is '),
        ({'dtype': '<f4'}, f"{NOT}dtype is '<f4'"),
        ({'dtype': '<u4'}, f"{NOT}dtype is '<u4'"),
        ({'seq_length': None}, f'{NOT}seq_length is None'),
        ({'seq_length': 10**30}, f'{NOT}seq_length is 1000'),
        ({'seq_length': True}, f'{NOT}seq_length is True'),
        ({'vocab_size': math.nan}, f'{NOT}vocab_size is nan'),
        ({'vocab_size': -1}, f'{NOT}vocab_size is -1'),
        ({'vocab_size': 10**12}, f'{NOT}vocab_size is 1000000000000'),
        ({'pad_id': 259}, f'{NOT}pad_id is 259'),
        ({'eos_id': 258.0}, f'{NOT}eos_id is 258.0'),
        ({'tokenizer': 3}, f'{NOT}tokenizer is 3'),
        ({'splits': [1]}, rf'{NOT}splits is \[1\]'),
        ({'splits': {'train': {}}}, rf'{NOT}splits.train is \{{\}}'),
        ({'splits': {'train': [7]}}, f'{NOT}a shard is 7'),
        ({'splits': {'train': [{'file': 'a'}]}}, f'{NOT}rows is missing'),
        ({'splits': {'train': [SHARD | {'rows': 1.5}]}}, f'{NOT}rows is 1.5'),
        ({'splits': {'train': [SHARD | {'rows': -1}]}}, f'{NOT}rows is -1'),
        ({'splits': {'train': [SHARD | {'notes': 'x'}]}}, f"{NOT}notes is 'x'"),
        ({'splits': {'train': [SHARD | {'digest': None}]}}, f'{NOT}digest is None'),
        ({'splits': {'train': [SHARD | {'file': '../a.bin'}]}}, f"{NOT}file is '../a.bin'"),
        ({'splits': {'train': [SHARD | {'file': '/etc/passwd'}]}}, f"{NOT}file is '/etc/passwd'"),
        ({'splits': {'train': [SHARD | {'file': '..'}]}}, f"{NOT}file is '..'"),
        ({'splits': {'train': [SHARD], 'validation': [SHARD]}}, f'{NOT}it names a file twice'),
        ({'splits': {'train': []}}, ': no rows in split train'),
        ({'splits': {'test': []}}, r': no split train \(there is test\)'),
    ],
)
def test_bad_values(tmp_path, changes, message):
    about = {'mode': 'pad', 'seq_length': 32, 'dtype': '<u2', 'vocab_size': 259, 'pad_id': 256, 'eos_id': 258}
    (tmp_path / 'tokens.json').write_text(json.dumps(about | {'tokenizer': 'a', 'splits': {'train': []}} | changes))
    with pytest.raises(DataError, match=f'^{tmp_path}{message}'):
        prepared.Prepared(str(tmp_path), 'train')


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
    describe(folder, tokenizer=tokenizers.Bytes().fingerprint, eos_id=9)
    with pytest.raises(DataError, match=f'{folder}/tokens.json: .*: eos_id is 9, its tokenizer has 258'):
        prepared.open_tokenizer(str(folder))
    (folder / 'tokenizer/fingerprint.json').unlink()
    with pytest.raises(DataError, match=f'{folder}/tokenizer'):
        prepared.open_tokenizer(str(folder))


# verified


FLIPS = ['train-00000-of-00002.bin', 'train-00001-of-00002.rows', 'validation-00001-of-00002.bin']


def flip(path, place=-1):
    """Changes one bit; from the end it counts before the seal."""
    content = bytearray(path.read_bytes())
    content[place - prepared.SEAL * (path.suffix == '.rows' and place < 0)] ^= 1
    path.write_bytes(content)


def damages(folder):
    return {split: found for split, _, found in verify.damages(str(folder))}


@pytest.mark.parametrize('name', FLIPS)
@pytest.mark.parametrize('place', [0, -1])
def test_a_bit_is_found_wherever_it_is(folder, name, place):
    assert not any(damages(folder).values())
    flip(folder / name, place)
    split = name.partition('-')[0]
    [said] = damages(folder)[split]
    assert re.fullmatch(rf'{folder}/{name}, row \d+: damaged: its checksum is another', said)
    assert sum(map(len, damages(folder).values())) == 1


def test_without_notes_the_digest_is_compared(folder):
    """Version 0.1."""
    about = json.loads((folder / 'tokens.json').read_text())
    for file in folder.glob('*.rows'):
        file.unlink()
    for shard in [shard for shards in about['splits'].values() for shard in shards]:
        del shard['notes']
    describe(folder, splits=about['splits'])
    for file in (folder / prepared.WORK).iterdir():
        file.unlink()
    (folder / prepared.WORK).rmdir()
    assert not any(damages(folder).values())
    flip(folder / FLIPS[0])
    assert damages(folder)['train'] == [f'{folder}/{FLIPS[0]}: damaged: its digest is another']


@pytest.mark.parametrize('changes', [{'mode': 'concat'}, {'seq_length': 33}, {'splits': {'train': [SHARD]}}])
def test_a_description_that_is_not_of_these_rows(folder, changes):
    describe(folder, **changes)
    with pytest.raises(DataError, match=f'^{folder}/tokens.json: '):
        damages(folder)


@pytest.mark.parametrize('name', [*FLIPS, 'cut', 'tokens.json'])
def test_prepare_writes_damaged_shards_again(folder, data, name, capsys):
    path = folder / (name if name != 'cut' else FLIPS[0])
    good = {file: file.read_bytes() for file in folder.glob('*.*') if file.is_file()}
    others = {file: file.stat().st_mtime_ns for file in good if file.suffix == '.bin' and file.stem != path.stem}
    if name == 'cut':
        os.truncate(path, 100)
    else:
        flip(path, 20)
    prepare_to(folder, data)
    said = capsys.readouterr().out
    assert (f'{path}, row' in said and 'the shard is written again' in said) == (name in FLIPS)
    assert {file: file.read_bytes() for file in good} == good
    of_unit = path.stem.partition('-')[2]  # both splits of one file
    assert all(file.stat().st_mtime_ns == time for file, time in others.items() if of_unit not in file.stem)
    assert not any(damages(folder).values())


def test_a_damaged_shard_whose_text_is_another_stays(folder, data, tmp_path):
    text, ends = (tmp_path / 'a.jsonl'), 2 * 2**16
    assert text.stat().st_size < ends  # so that the plan takes it for another input
    shard = folder / FLIPS[0]
    flip(shard)
    job_counts = folder / prepared.WORK / 'both-00000.json'
    counts = json.loads(job_counts.read_text())
    counts['train']['digest'] = '0' * 32
    job_counts.write_text(json.dumps(counts))
    before = shard.read_bytes()
    with pytest.raises(UsageError, match=f'{shard} holds other rows than its text gives now'):
        prepare_to(folder, data)
    assert shard.read_bytes() == before and (folder / 'tokens.json').exists()


def test_inspect_verifies(folder, capsys):
    words = ['--verify', '--data_path', str(folder)]
    assert inspect.main(words) == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r'train: [\d,]+ rows are whole\nvalidation: [\d,]+ rows are whole\n', said)
    for name in FLIPS:
        flip(folder / name)
    assert inspect.main(words) == 4
    said = capsys.readouterr()
    assert all(f'{folder}/{name}, row ' in said.out for name in FLIPS)
    assert said.err.startswith(f'mixln_jax: {folder}: 3 shards are damaged') and said.err.count('\n') == 1
    assert 'data.prepare' in said.err


@pytest.mark.parametrize('words', [['--verify'], ['--step', '1'], ['--verify', '--step', '1', '--data_path', 'x']])
def test_what_inspect_needs(words, capsys):
    assert inspect.main(words) == 2 and capsys.readouterr().err.count('\n') == 1

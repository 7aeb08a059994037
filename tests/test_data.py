"""Data: sources, tokenizers, rows and their order."""

import dataclasses
import gzip
import itertools
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import sysconfig
import time

import numpy as np
import pytest

from mixln_jax import config
from mixln_jax.data import batches, sources, stdlib, tokenizers
from mixln_jax.exits import DataError, UsageError

PAD, EOS = 256, 258


class Texts(list):
    """The simplest source."""

    fingerprint = '0'


def jsonl(path, texts, opener=open):
    with opener(path, 'wt', encoding='utf-8') as file:
        file.writelines(json.dumps({'text': text, 'url': 'https://example.org'}) + '\n' for text in texts)
    return path


def options(path, source='jsonl', **values):
    return config.Data(source=source, path=str(path), tokenizer='bytes', **values)


def documents(data, split):
    source = sources.open_source(data, split)
    return [source[i] for i in range(len(source))]


def both(data):
    return documents(data, 'train') + documents(data, 'validation')


def row(inputs, targets, weights):
    return {'inputs': inputs, 'targets': targets, 'weights': weights}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library, and an empty cache."""
    root = tmp_path / 'library'
    for folder in ('package/test', 'site-packages', 'config-3', 'pydoc_data'):
        (root / folder).mkdir(parents=True)
    for i in range(60):
        long = f'Does {i}. ' * 100
        (root / f'module{i}.py').write_text(f'"""About {i}."""\ndef f():\n  """{long}"""\ndef g():\n  """{long}"""\n')
    (root / 'package/__init__.py').write_text(
        '"""Pack."""\n'
        'class A:\n    """An A.\n\n      Indented.\n    Not.\n    """\n    async def go(self):\n        "Goes."\n'
        'def silent(): "\\d"\nraise RuntimeError("imported")\n'
    )
    for hidden in ('package/test/hidden.py', 'site-packages/hidden.py', 'config-3/hidden.py'):
        (root / hidden).write_text('"""Hidden."""')
    (root / 'template.py').write_text('"""Hidden."""\nclass $name:\n')
    (root / 'pydoc_data/topics.py').write_text(
        "# by Sphinx\ntopics = {'if': 'If.', 'assert': 'The \"assert\" '\n 'statement.'}\n"
    )
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(root))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return root


# sources


@pytest.mark.parametrize('name, opener', [('a.jsonl', open), ('a.json', open), ('c4-train.00000.json.gz', gzip.open)])
def test_jsonl(tmp_path, name, opener):
    texts = [f'Text {i}, größer 🙂\n' for i in range(50)]
    path = jsonl(tmp_path / name, texts, opener)
    assert sorted(both(options(path))) == sorted(texts)
    assert len(documents(options(path), 'validation')) >= 20


def test_documents_without_text_are_left_out(tmp_path):
    assert sorted(both(options(jsonl(tmp_path / 'a.jsonl', ['a', '', ' \n', 'b'])))) == ['a', 'b']


def test_text_loses_nothing(tmp_path):
    paragraphs = [f'{i} é\r\n' * (200 + i) + ' \n\n' for i in range(12)] + ['end']
    (tmp_path / 'a.txt').write_bytes(''.join(paragraphs).encode())
    pieces = sorted(both(options(tmp_path / 'a.txt', 'text')), key=lambda piece: int(piece.split()[0]))
    assert ''.join(pieces) == ''.join(paragraphs)
    assert len(pieces) > 3 and all(len(piece) >= 2000 for piece in pieces)


def test_paths(tmp_path, monkeypatch):
    for name in 'bac':
        jsonl(tmp_path / f'{name}.jsonl', [f'{name}{i}' for i in range(100)])
    monkeypatch.setenv('HOME', str(tmp_path))
    wanted = documents(options(f'{tmp_path}/[abc].jsonl'), 'train')
    assert [text[0] for text in wanted] == sorted(text[0] for text in wanted)
    assert documents(options('~/c.jsonl, ~/a.jsonl,~/*.jsonl'), 'train') == wanted


@pytest.mark.parametrize('count', [2, 3, 39, 40, 5000])
def test_split(tmp_path, count):
    data = options(jsonl(tmp_path / 'a.jsonl', map(str, range(count))))
    train, validation = documents(data, 'train'), documents(data, 'validation')
    assert sorted(train + validation) == sorted(map(str, range(count)))
    assert (len(validation) == min(20, count // 2)) if count <= 40 else 30 < len(validation) < 70


def test_split_depends_neither_on_order_nor_on_other_files(tmp_path):
    texts = [str(i) for i in range(4000)]
    data = options(jsonl(tmp_path / 'a.jsonl', texts))
    reverse = options(jsonl(tmp_path / 'b.jsonl', texts[::-1]))
    more = options(jsonl(tmp_path / 'c.jsonl', [f'{i}' for i in range(9000)]))
    validation = documents(data, 'validation')
    assert documents(reverse, 'validation') == validation[::-1]
    assert set(documents(more, 'validation')) & set(texts) == set(validation)


def test_equal_texts_are_on_one_side(tmp_path):
    data = options(jsonl(tmp_path / 'a.jsonl', [str(i % 10) for i in range(100)]))
    train, validation = documents(data, 'train'), documents(data, 'validation')
    assert not set(train) & set(validation) and len(train) == len(validation) == 50


def test_source_fingerprint(tmp_path):
    def fingerprint(name, texts, split='train'):
        return sources.open_source(options(jsonl(tmp_path / name, texts)), split).fingerprint

    texts = [f'text {i}' for i in range(50)]
    first = fingerprint('a.jsonl', texts)
    assert int(first, 16) and first == fingerprint('b.jsonl', texts)
    others = [
        fingerprint('a.jsonl', texts, 'validation'),
        fingerprint('c.jsonl', texts[::-1]),
        fingerprint('d.jsonl', [text + ' ' for text in texts]),
        fingerprint('e.jsonl', texts + ['one more']),
    ]
    assert len({first, *others}) == 5


def test_source_fingerprint_sees_where_documents_end(library):
    def fingerprint(assertion, if_):
        topics = {'assert': assertion, 'if': if_}
        (library / 'pydoc_data/topics.py').write_text(f'topics = {topics}\n')
        return [
            sources.open_source(config.Data(source='stdlib'), split).fingerprint for split in ('train', 'validation')
        ]

    assert fingerprint('ab', 'c') != fingerprint('a', 'bc')


GOOD = b'{"text": "good"}\n'
BAD = {
    'not JSON': (GOOD + b'{"text": \n', ':2: not JSON'),
    'nested too deep': (GOOD + b'[' * 100_000, ':2: not JSON'),
    'not an object': (GOOD + b'["text"]\n', ':2: .*list'),
    'no text': (GOOD + b'\n{"texts": "x"}\n', ':3: .*texts'),
    'text not a string': (GOOD + b'{"text": 7}\n', ':2: no field `text` that is a string'),
    'half a character': (GOOD + b'{"text": "\\ud800"}\n', ':2: .*Unicode'),
    'not UTF-8': (GOOD + GOOD + b'{"text": "\xff"}\n', ':3: not UTF-8'),
    'empty': (b'', ': no text'),
    'blank': (b'\n \n', ': no text'),
    'empty texts': (b'{"text": ""}\n', ': no text'),
}


@pytest.mark.parametrize('content, message', BAD.values(), ids=BAD)
def test_bad_jsonl(tmp_path, content, message):
    (tmp_path / 'bad.jsonl').write_bytes(content)
    with pytest.raises(DataError, match=f'bad.jsonl{message}') as caught:
        sources.open_source(options(tmp_path / 'bad.jsonl'), 'train')
    assert '\n' not in str(caught.value)


RANDOM = np.random.default_rng(0).integers(97, 123, 100_000, np.uint8).tobytes()
WHOLE = gzip.compress(GOOD * 2 + b'{"text": "%s"}\n' % RANDOM)
BAD_GZIP = {
    'truncated': (WHOLE[:-20], ':3'),
    'no gzip': (GOOD, ''),
    'bad deflate': (WHOLE[:10] + b'\xff' * 1000, ''),  # zlib.error
    'bad checksum': (WHOLE[:-8] + b'\0' * 8, ':?[0-9]*'),
}


@pytest.mark.parametrize('content, line', BAD_GZIP.values(), ids=BAD_GZIP)
def test_bad_gzip(tmp_path, content, line):
    (tmp_path / 'bad.json.gz').write_bytes(content)
    with pytest.raises(DataError, match=f'bad.json.gz{line}: cannot be read'):
        sources.open_source(options(tmp_path / 'bad.json.gz'), 'train')


def test_bad_text(tmp_path):
    (tmp_path / 'bad.txt').write_bytes(b'good\n' * 6 + b'caf\xe9\n')
    with pytest.raises(DataError, match=r'bad.txt:7: not UTF-8.* byte 3 '):
        sources.open_source(options(tmp_path / 'bad.txt', 'text'), 'train')


@pytest.mark.parametrize(
    'path, message',
    [
        ('', 'config.data.path is empty'),
        (' , ', 'config.data.path is empty'),
        ('{}/good.jsonl,{}/none.jsonl', 'no file .*none.jsonl'),
        ('{}/none*.jsonl', r'no file .*none\*.jsonl'),
        ('{}', 'is a folder'),
        ('{}/*', 'folder is a folder'),
        ('{}/good.jsonl', 'one document only'),
    ],
)
@pytest.mark.parametrize('kind', ['jsonl', 'text'])
def test_bad_path(tmp_path, path, message, kind):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'good.jsonl').write_bytes(GOOD)
    with pytest.raises(DataError, match=message):
        sources.open_source(options(path.replace('{}', str(tmp_path)), kind), 'train')


@pytest.mark.skipif(not pathlib.Path('/proc/self/mem').exists(), reason='needs a file that opens and cannot be read')
def test_unreadable_file():
    with pytest.raises(DataError, match='/proc/self/mem: cannot be read'):
        sources.open_source(options('/proc/self/mem', 'text'), 'train')


def test_equal_documents_cannot_be_split(tmp_path):
    with pytest.raises(DataError, match='one document only'):
        sources.open_source(options(jsonl(tmp_path / 'a.jsonl', ['same', 'same'])), 'train')


@pytest.mark.parametrize('kind, content', [('jsonl', GOOD * 5), ('text', b'no blank line\n' * 5)])
def test_too_much_text(tmp_path, monkeypatch, kind, content):
    (tmp_path / 'large').write_bytes(content)
    monkeypatch.setattr(sources, 'LARGEST', 15)
    with pytest.raises(DataError, match=r'more than .* GB of text'):
        sources.open_source(options(tmp_path / 'large', kind), 'train')


def test_what_this_version_cannot_read():
    with pytest.raises(DataError, match=r'data.source=tfds .*jsonl'):
        sources.open_source(config.Data(), 'train')
    with pytest.raises(DataError, match=r'data.tokenizer=sentencepiece .*bytes'):
        tokenizers.open_tokenizer(config.Data())


# the embedded corpus


def test_gather(library):
    gathered = stdlib.gather()
    assert [name for name, _ in gathered] == sorted(name for name, _ in gathered)
    texts = {name: [text for other, text in gathered if other == name] for name, _ in gathered}
    a = 'package.A\n\nAn A.\n\n  Indented.\nNot.\n\npackage.A.go\n\nGoes.'
    assert texts['package'] == [f'package\n\nPack.\n\n{a}\n\npackage.silent\n\n\\d']
    assert texts['pydoc_data.topics.assert'] == ['The "assert" statement.']
    assert [text[:20] for text in texts['module7']] == ['module7\n\nAbout 7.\n\nm', 'module7.g\n\nDoes 7. D']
    assert not any('Hidden' in text for _, text in gathered)


@pytest.mark.filterwarnings('error')
def test_gathering_warns_of_nothing(library):
    assert 'package' in dict(stdlib.gather())


def test_stdlib_keeps_a_module_on_one_side(library):
    data = config.Data(source='stdlib')
    modules = [{text.split()[0].split('.')[0] for text in documents(data, split)} for split in ('train', 'validation')]
    assert not modules[0] & modules[1] and len(modules[0]) + len(modules[1]) == 63
    assert len(both(data)) == len(stdlib.gather())
    assert platform.python_version() in sources.open_source(data, 'train').fingerprint


def damage_nothing(path):
    pass


def damage_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_length(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_all(path):
    path.write_bytes(b'\xff')


@pytest.mark.parametrize('damage', [damage_nothing, damage_bit, damage_length, damage_all])
def test_cache(library, tmp_path, monkeypatch, damage):
    parsed = []
    read = stdlib._documents
    monkeypatch.setattr(stdlib, '_documents', lambda *args: parsed.append(args) or read(*args))
    gathered = stdlib.gather()
    (cache,) = (tmp_path / 'cache/mixln_jax').iterdir()
    assert platform.python_version() in cache.name
    whole = cache.read_bytes()
    damage(cache)
    del parsed[:]
    assert stdlib.gather() == gathered
    assert bool(parsed) == (damage is not damage_nothing)
    assert cache.read_bytes() == whole


def test_cache_sees_another_library(library):
    assert not any('Changed' in text for _, text in stdlib.gather())
    (library / 'module0.py').write_text('"""Changed."""')
    assert any('Changed' in text for _, text in stdlib.gather())


def test_no_cache_folder(library, tmp_path):
    (tmp_path / 'cache').write_text('a file, not a folder')
    assert stdlib.gather() == stdlib.gather() != []


def test_no_library(library, monkeypatch):
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: '/none')
    with pytest.raises(DataError, match='/none'):
        stdlib.gather()


def test_this_library():
    gathered = stdlib.gather()
    lengths = [len(text) for _, text in gathered]
    assert sum(lengths) > 1e6
    assert np.mean(np.array(lengths) >= 200) > 0.7
    validation = sources.open_source(config.Data(source='stdlib'), 'validation')
    assert 20 <= len(validation) < 0.15 * len(gathered)
    assert {'json', 'asyncio.base_events', 'pydoc_data.topics.assert'} <= {name for name, _ in gathered}


# tokenizers


@pytest.mark.parametrize('text', ['', 'plain', 'größer\r\n\0', '日本語', '🙂👩\u200d🚀'])
def test_bytes_round_trip(text):
    tokenizer = tokenizers.open_tokenizer(config.Data(tokenizer='bytes'))
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([257, *ids, 258, 256]) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_bytes():
    tokenizer = tokenizers.Bytes()
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (259, 256, 257, 258)
    assert tokenizer.byte_lengths.dtype == np.int32 and tokenizer.byte_lengths.tolist() == [1] * 256 + [0] * 3
    assert tokenizer.decode([0xE2, 0x82, ord('a')]) == '\ufffda'
    assert int(tokenizer.fingerprint, 16)


def test_save(tmp_path):
    tokenizers.Bytes().save(tmp_path / 'run/tokenizer')
    saved = json.loads((tmp_path / 'run/tokenizer/tokenizer.json').read_text())
    assert saved == {'kind': 'bytes', 'vocab_size': 259, 'pad_id': 256, 'bos_id': 257, 'eos_id': 258}


# rows


def test_pad():
    rows = batches.Pad(Texts(['ab', 'abc', 'abcdef', 'é']), tokenizers.Bytes(), 4)
    a, b, c = b'abc'
    assert len(rows) == 4
    assert_same(rows[0], row([a, b, EOS, PAD], [b, EOS, PAD, PAD], [1, 1, 0, 0]))
    assert_same(rows[1], row([a, b, c, EOS], [b, c, EOS, PAD], [1, 1, 1, 0]))
    assert_same(rows[2], rows[1])
    assert_same(rows[3], row([0xC3, 0xA9, EOS, PAD], [0xA9, EOS, PAD, PAD], [1, 1, 0, 0]))


@pytest.mark.parametrize('rows', [batches.Pad, batches.Concat])
def test_rows_are_a_sequence(rows):
    rows = rows(Texts(['abcd', 'efgh']), tokenizers.Bytes(), 3)
    assert len(rows) > 1
    with pytest.raises(IndexError):
        rows[len(rows)]
    assert_same(rows[-1], rows[len(rows) - 1])
    types = {name: (values.dtype, values.shape) for name, values in rows[0].items()}
    assert types == row((np.int32, (3,)), (np.int32, (3,)), (np.float32, (3,)))


def test_concat():
    rows = batches.Concat(Texts(['ab', 'cdef', 'g']), tokenizers.Bytes(), 3)  # a b . c d e f . g .
    a, b, c, d, e, f, g = b'abcdefg'
    assert len(rows) == 3
    assert_same(rows[0], row([a, b, EOS], [b, EOS, c], [1, 1, 1]))
    assert_same(rows[1], row([c, d, e], [d, e, f], [1, 1, 1]))
    assert_same(rows[2], row([f, EOS, g], [EOS, g, EOS], [1, 1, 1]))


def test_concat_drops_what_has_no_target():
    assert len(batches.Concat(Texts(['ab', 'cde']), tokenizers.Bytes(), 3)) == 2  # 7 tokens
    assert len(batches.Concat(Texts(['ab', 'cd']), tokenizers.Bytes(), 3)) == 1  # 6 tokens
    with pytest.raises(DataError, match=r'3 tokens .*seq_length=3'):
        batches.Concat(Texts(['ab']), tokenizers.Bytes(), 3)


def test_row_fingerprint():
    def source(fingerprint):
        texts = Texts(['some text', 'and more'])
        texts.fingerprint = fingerprint
        return texts

    class Other(tokenizers.Bytes):
        fingerprint = 'other'

    made = [
        kind(source(fingerprint), tokenizer, seq_length).fingerprint
        for kind in (batches.Pad, batches.Concat)
        for fingerprint in ('a', 'b')
        for tokenizer in (tokenizers.Bytes(), Other())
        for seq_length in (4, 5)
    ]
    assert len(set(made)) == 16
    assert made[0] == batches.Pad(source('a'), tokenizers.Bytes(), 4).fingerprint and int(made[0], 16)


def test_open_rows(tmp_path):
    data = options(jsonl(tmp_path / 'a.jsonl', [f'text {i}' for i in range(100)]))
    tokenizer = tokenizers.open_tokenizer(data)
    pad = batches.open_rows(data, 'validation', tokenizer, 64, 259)
    assert len(pad) == 20 and pad[0]['inputs'].shape == (64,) and 0 in pad[0]['weights']
    concat = batches.open_rows(dataclasses.replace(data, mode='concat'), 'train', tokenizer, 64, 259)
    assert len(concat) > 1 and 0 not in concat[0]['weights']
    with pytest.raises(UsageError, match=r'config.data.tokenizer=bytes .*259.*config.model.vocab_size=258'):
        batches.open_rows(data, 'train', tokenizer, 64, 258)


# batches


def numbered(count):
    """Rows whose first input is their number."""
    return batches.Pad(Texts(chr(i) for i in range(count)), tokenizers.Bytes(), 4)


def order(dataset, steps):
    return [int(number) for s in range(steps) for number in dataset[s]['inputs'][:, 0]]


@pytest.mark.parametrize('batch_size', [1, 3, 7, 20])
def test_every_row_once_an_epoch(batch_size):
    dataset = batches.training(numbered(10), seed=0, batch_size=batch_size)
    assert {values.shape for values in dataset[0].values()} == {(batch_size, 4)}
    read = order(dataset, -(-50 // batch_size))[:50]
    epochs = [tuple(read[start : start + 10]) for start in range(0, 50, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 5


def test_the_order_follows_from_the_seed():
    made = {seed: order(batches.training(numbered(100), seed=seed, batch_size=5), 20) for seed in range(4)}
    assert len({tuple(numbers) for numbers in made.values()}) == 4
    assert made[3] == order(batches.training(numbered(100), seed=3, batch_size=10), 10)
    assert order(batches.training(numbered(100), seed=2**32 - 1, batch_size=10), 10) != made[0]


@pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize('start, batch_size', [(0, 1), (5, 3), (10**12, 3)])
def test_read(workers, start, batch_size):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    dataset = batches.training(numbered(10), seed=1, batch_size=batch_size)
    iterator = batches.read(dataset, start, workers)
    for s, batch in enumerate(itertools.islice(iterator, 7), start):
        assert_same(batch, dataset[s])
        assert {type(values) for values in batch.values()} == {np.ndarray}
    iterator.close()
    assert next(iterator, None) is None
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


SCRIPT = """
import multiprocessing, os, signal, sys, threading, time
from mixln_jax.data import batches, tokenizers

class Texts(list):
    fingerprint = '0'

def interrupt_all():
    while True:
        time.sleep(0.1)
        os.killpg(0, signal.SIGINT)
        os.killpg(0, signal.SIGTERM)

if __name__ == '__main__':
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    if sys.argv[2] == 'interrupt':
        threading.Thread(target=interrupt_all, daemon=True).start()
    rows = batches.Pad(Texts('abc'), tokenizers.Bytes(), 4)
    iterator = batches.read(batches.training(rows, seed=0, batch_size=1), 0, int(sys.argv[1]))
    for _ in range(1 if sys.argv[2] == 'leave' else 50):
        next(iterator)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[2] == 'interrupt':
        assert set(signals) == {signal.SIGINT, signal.SIGTERM}
        iterator.close()
    if sys.argv[2] == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run(tmp_path, *args):
    """Exit code, worker ids and errors of SCRIPT in a session of its own."""
    (tmp_path / 'script.py').write_text(SCRIPT)
    environment = os.environ | {'PYTHONPATH': str(pathlib.Path(batches.__file__).parents[2])}
    command = [sys.executable, str(tmp_path / 'script.py'), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, start_new_session=True)
    return done.returncode, [int(pid) for pid in done.stdout.split()], done.stderr


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_an_open_iterator_ends_with_python(tmp_path, workers):
    code, pids, errors = run(tmp_path, str(workers), 'leave')
    assert (code, len(pids), errors) == (0, workers, '')
    assert not any(map(alive, pids))


@pytest.mark.slow
def test_workers_leave_signals_to_the_parent(tmp_path):
    code, pids, errors = run(tmp_path, '2', 'interrupt')
    assert (code, len(pids), errors) == (0, 2, '')
    assert not any(map(alive, pids))


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(tmp_path):
    code, pids, _ = run(tmp_path, '2', 'kill')
    assert code == -signal.SIGKILL and len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


@pytest.mark.parametrize('count, batch_size', [(10, 4), (10, 5), (3, 8)])
def test_evaluation(count, batch_size):
    rows = numbered(count)
    made = list(batches.evaluation(rows, batch_size))
    assert len(made) == -(-count // batch_size)
    assert {values.shape for batch in made for values in batch.values()} == {(batch_size, 4)}
    flat = {name: np.concatenate([batch[name] for batch in made]) for name in made[0]}
    for i in range(count):
        assert_same({name: values[i] for name, values in flat.items()}, rows[i])
    assert not flat['weights'][count:].any()
    assert flat['inputs'].min() >= 0 and flat['inputs'].max() < 259


def test_evaluation_changes_no_row():
    rows = list(numbered(3))
    before = rows[2]['weights'].copy()
    list(batches.evaluation(rows, 2))
    np.testing.assert_array_equal(rows[2]['weights'], before)

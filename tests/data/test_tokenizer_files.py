"""Tokenizers as files: saved and loaded, downloaded, trained."""

import concurrent.futures
import contextlib
import functools
import http.server
import io
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import tokenizers as library
from vocabularies import KINDS, byte_level, content, open_file, prose, specials, with_settings

from mixln_jax import config
from mixln_jax.data import download, tokenizers, train_tokenizer
from mixln_jax.system.errors import DataError

# save and load


@pytest.mark.parametrize('name', ['bytes', *KINDS])
def test_save_and_load(name, opened, tmp_path):
    tokenizer, folder = opened(name), tmp_path / 'run/tokenizer'
    tokenizer.save(folder)
    tokenizer.save(folder)
    again = tokenizers.load(folder)
    assert type(again) is type(tokenizer) and again.fingerprint == tokenizer.fingerprint
    assert specials(again) == specials(tokenizer) and again.vocab_size == tokenizer.vocab_size
    text = '\n'.join(prose(20, seed=3))
    assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
    if tokenizer.kind == 'huggingface':
        assert open_file(folder / 'tokenizer.json').fingerprint == tokenizer.fingerprint
        settings = json.loads((folder / 'tokenizer_config.json').read_text())
        ids = library.Tokenizer.from_file(str(folder / 'tokenizer.json')).token_to_id
        assert tuple(ids(settings[f'{role}_token']) for role in ('pad', 'bos', 'eos')) == specials(tokenizer)
    assert all(path.is_file() for path in folder.iterdir())


def test_fingerprints_differ(opened, tmp_path):
    prints = {name: opened(name).fingerprint for name in ('bytes', *KINDS)}
    prints['other end'] = with_settings(tmp_path, byte_level(), {'eos_token': '<s>'}).fingerprint
    prints['other text'] = with_settings(tmp_path, byte_level() + b' ', {}).fingerprint
    assert len(set(prints.values())) == len(prints) and all(int(value, 16) for value in prints.values())


@pytest.mark.parametrize('name', ['bytes', 't5', 'byte_level'])
def test_load_names_a_bad_folder(name, opened, tmp_path):
    folder = tmp_path / 'saved'
    with pytest.raises(DataError, match='saved: no tokenizer is saved here'):
        tokenizers.load(folder)
    tokenizer = opened(name)
    tokenizer.save(folder)
    mark = folder / 'fingerprint.json'
    good = mark.read_text()
    for bad in ('', '[]', '{"kind": 3}', good[:-9], good.replace('"kind": "', '"kind": "x')):
        mark.write_text(bad)
        with pytest.raises(DataError, match='saved.*: .*(not whole|not readable|damaged)'):
            tokenizers.load(folder)
    mark.write_text(good)
    for file in folder.iterdir():
        if name == 'bytes' and file != mark:
            continue  # written for people
        body = file.read_bytes()
        for bad in (body[:-1] + bytes([body[-1] ^ 1]), body[: len(body) // 2], b''):
            file.write_bytes(bad)
            with pytest.raises(DataError, match='saved'):
                tokenizers.load(folder)
        file.unlink()
        with pytest.raises(DataError, match='saved'):
            tokenizers.load(folder)
        file.write_bytes(body)
    assert tokenizers.load(folder).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize('completed', [0, 1, 2])
def test_a_save_that_is_cut_short(completed, opened, tmp_path, monkeypatch):
    """Over another tokenizer: what is found afterwards is the old one, or an error."""
    folder, replace, calls = tmp_path / 'saved', os.replace, []
    opened('byte_level').save(folder)
    old = tokenizers.load(folder).fingerprint

    def stop(source, target):
        calls.append(target)
        if len(calls) > completed:
            raise KeyboardInterrupt
        replace(source, target)

    new = opened('unigram')
    monkeypatch.setattr(os, 'replace', stop)
    with pytest.raises(KeyboardInterrupt):
        new.save(folder)
    if completed:
        with pytest.raises(DataError, match='saved: '):
            tokenizers.load(folder)
    else:
        assert tokenizers.load(folder).fingerprint == old


# downloads


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server on this machine, as (URL, answers, requests): answers[path] is (status, body, stated length)."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '*')
    answers, requests = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            status, body, length = answers.get(self.path, (404, b'nothing', None))
            self.send_response(status)
            self.send_header('Content-Length', str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f'http://127.0.0.1:{server.server_port}', answers, requests
    server.shutdown()
    thread.join()
    server.server_close()


def cached(tmp_path):
    return [path for path in (tmp_path / 'cache').rglob('*') if path.is_file()]


def test_download_once(served, tmp_path):
    url, answers, requests = served
    answers['/a/t5.model'] = 200, content('t5'), None
    first = open_file(f'{url}/a/t5.model', 'sentencepiece')
    assert requests == ['/a/t5.model'] and first.vocab_size == 320
    again = open_file(f'{url}/a/t5.model', 'sentencepiece')
    assert requests == ['/a/t5.model'] and again.fingerprint == first.fingerprint
    [model] = [path for path in cached(tmp_path) if path.name == 'tokenizer.model']
    model.write_bytes(model.read_bytes()[:-50])  # damaged: fetched anew
    assert open_file(f'{url}/a/t5.model', 'sentencepiece').fingerprint == first.fingerprint
    assert requests == ['/a/t5.model'] * 2
    (tmp_path / 'here.model').write_bytes(content('t5'))
    assert open_file(tmp_path / 'here.model', 'sentencepiece').fingerprint == first.fingerprint


def test_download_with_settings(served):
    url, answers, requests = served
    answers['/a/tokenizer.json?download=true'] = answers['/b/tokenizer.json'] = 200, byte_level(), None
    answers['/a/tokenizer_config.json'] = 200, b'{"eos_token": "<s>"}', None
    for _ in range(2):
        assert specials(open_file(f'{url}/a/tokenizer.json?download=true')) == (0, 2, 2)
        assert specials(open_file(f'{url}/b/tokenizer.json')) == (0, 2, 1)
    assert len(requests) == 6
    answers['/c/tokenizer.json'] = 200, byte_level(), None
    answers['/c/tokenizer_config.json'] = 500, b'', None
    with pytest.raises(DataError, match=r'/c/tokenizer_config\.json cannot be fetched: 500'):
        open_file(f'{url}/c/tokenizer.json')


def test_failed_downloads_leave_nothing(served, tmp_path):
    url, answers, _ = served
    advice = r'fetch it elsewhere, then --config\.data\.tokenizer_path=FILE'
    with pytest.raises(DataError, match=rf'/none cannot be fetched: 404 .*{advice}'):
        open_file(f'{url}/none', 'sentencepiece')
    answers['/short'] = 200, content('t5')[:-100], len(content('t5'))
    with pytest.raises(DataError, match=rf'/short cannot be fetched: .*{advice}'):
        open_file(f'{url}/short', 'sentencepiece')
    answers['/login'] = 200, b'<html>Welcome to our network</html>', None
    with pytest.raises(DataError, match='/login: not a sentencepiece model'):
        open_file(f'{url}/login', 'sentencepiece')
    with pytest.raises(DataError, match=rf'http://no host/x cannot be fetched: .*{advice}'):
        open_file('http://no host/x', 'sentencepiece')
    assert not cached(tmp_path)
    answers['/login'] = 200, content('t5'), None
    assert open_file(f'{url}/login', 'sentencepiece').vocab_size == 320


@pytest.mark.parametrize('answer', [b'', b'HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\nhalf'])
def test_a_server_that_falls_silent(answer, tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(download, 'TIMEOUT', 0.3)
    with socket.create_server(('127.0.0.1', 0)) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        connection = pool.submit(server.accept)
        sent = pool.submit(lambda: answer and connection.result()[0].sendall(answer))
        start = time.monotonic()
        with pytest.raises(DataError, match='/x cannot be fetched: .*(no answer|timed out)'):
            open_file(f'http://127.0.0.1:{server.getsockname()[1]}/x', 'sentencepiece')
        assert 0.25 < time.monotonic() - start < 5
        sent.result()
        connection.result()[0].close()


def test_what_never_ends_or_lies(served, tmp_path, monkeypatch):
    url, answers, _ = served
    monkeypatch.setattr(download, 'LARGEST', 10**6)
    answers['/large'] = 200, bytes(10**6 + 1), None
    answers['/lies'] = 200, bytes(10**6 + 1), 10**12
    for name in ('large', 'lies'):
        with pytest.raises(DataError, match=f'/{name} cannot be fetched: more than 1,000,000 bytes'):
            open_file(f'{url}/{name}', 'sentencepiece')
    answers['/cut'] = 200, content('t5'), len(content('t5')) - 1
    with pytest.raises(DataError, match='/cut: not a sentencepiece model'):
        open_file(f'{url}/cut', 'sentencepiece')
    assert not cached(tmp_path)


def test_a_server_that_drips(tmp_path, monkeypatch):
    """Every piece comes in time; all of them together do not."""
    monkeypatch.setattr(download, 'WHOLE', 0.2)
    answer = contextlib.nullcontext()
    answer.read1 = lambda _: time.sleep(0.02) or b'x'
    with pytest.raises(ValueError, match='not arrived after 0.2 s'):
        download._received(answer, time.monotonic() + 0.2)


@pytest.mark.parametrize('where, followed', [('http://b/x', False), ('HTTPS://b/x', True), ('ftp://b/x', False)])
def test_redirects_stay_on_https(where, followed):
    handler = download._Redirects()
    redirect = functools.partial(handler.redirect_request, file=None, code=302, reason='', headers={}, url=where)
    expected = contextlib.nullcontext() if followed else pytest.raises(ValueError, match='not https')
    with expected:
        assert redirect(urllib.request.Request('https://a/x')).full_url == where
    assert redirect(urllib.request.Request('http://a/x')).full_url == where  # it was asked for


def test_http_is_warned_of(served, capsys):
    url, answers, _ = served
    answers['/a.model'] = 200, content('t5'), None
    for said in (True, False):  # the second comes from the cache
        open_file(f'{url}/a.model', 'sentencepiece')
        assert ('is not https' in capsys.readouterr().out) == said


def test_names_that_are_never_found(monkeypatch, tmp_path):
    """Neither a resolver that hangs nor a list of dead addresses prolongs the time-out."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(download, 'TIMEOUT', 0.1)
    waiting = threading.Event()
    monkeypatch.setattr(urllib.request.OpenerDirector, 'open', lambda *_, **__: waiting.wait(20))
    start = time.monotonic()
    with pytest.raises(DataError, match=r'sentencepiece\.model cannot be fetched: no answer within 0\.1 s'):
        tokenizers.open_tokenizer(config.Data())
    assert time.monotonic() - start < 5
    waiting.set()


def test_the_default_and_buckets(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    asked = []

    def opened(opener, url, timeout):
        asked.append((url, timeout))
        if len(asked) == 1:
            raise urllib.error.URLError('no network')
        answer = io.BytesIO(content('t5'))
        answer.headers = {}
        return answer

    monkeypatch.setattr(urllib.request.OpenerDirector, 'open', opened)
    url = 'https://storage.googleapis.com/t5-data/vocabs/cc_all.32000/sentencepiece.model'
    with pytest.raises(DataError, match=f'{url} cannot be fetched: .*no network.*tokenizer_path=FILE'):
        tokenizers.open_tokenizer(config.Data())
    assert tokenizers.open_tokenizer(config.Data()).vocab_size == 320
    assert open_file('gs://bucket/a b/x.model', 'sentencepiece').vocab_size == 320
    assert [url for url, _ in asked] == [url, url, 'https://storage.googleapis.com/bucket/a%20b/x.model']
    assert all(timeout < 30 for _, timeout in asked)
    folder = tmp_path / 'cache/mixln_jax/tokenizers'
    assert cached(tmp_path) and all(path.is_relative_to(folder) for path in cached(tmp_path))


def test_several_downloads_at_once(served):
    url, answers, _ = served
    answers['/tokenizer.json'] = 200, byte_level(), None
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        prints = pool.map(lambda _: open_file(f'{url}/tokenizer.json').fingerprint, range(16))
    assert len(set(prints)) == 1


# training


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / 'corpus.txt'
    path.write_text('\n\n'.join('\n'.join(prose(40, seed)) for seed in range(8)))
    return path


def train(*words):
    return train_tokenizer.main([str(word) for word in words])


def test_train(corpus, tmp_path, capsys):
    out = tmp_path / 'out'
    assert train('--source', 'text', '--path', corpus, '--vocab_size', 500, '--out', out) == 0
    said = capsys.readouterr().out
    keys = dict(word.removeprefix('--config.').split('=') for word in said.split() if word.startswith('--config.'))
    assert keys.pop('model.vocab_size') == '500'
    data = config.Data(**{key.removeprefix('data.'): value for key, value in keys.items()})
    tokenizer = tokenizers.open_tokenizer(data)
    assert tokenizer.vocab_size == 500 and specials(tokenizer) == (0, 2, 1)
    assert tokenizers.load(out).fingerprint == tokenizer.fingerprint
    text = corpus.read_text()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    mean = float(said.partition('ids, ')[2].split()[0])
    assert mean == pytest.approx(len(text.encode()) / len(tokenizer.encode(text)), rel=0.05) and mean > 2
    assert str(out) in said and '500 ids' in said


def test_train_repeats_itself(corpus, tmp_path):
    """In another process, with other hashes; into a file and into a folder."""
    words = ['--source', 'text', '--path', corpus, '--vocab_size', '500']
    command = [sys.executable, '-m', 'mixln_jax.data.train_tokenizer', *words, '--out', tmp_path / 'one.json']
    root = pathlib.Path(__file__).parents[2]
    subprocess.run(command, check=True, cwd=root, env=os.environ | {'PYTHONHASHSEED': '7', 'RAYON_NUM_THREADS': '1'})
    assert train(*words, '--out', tmp_path / 'two') == 0
    assert (tmp_path / 'one.json').read_bytes() == (tmp_path / 'two/tokenizer.json').read_bytes()
    one, two = open_file(tmp_path / 'one.json'), tokenizers.load(tmp_path / 'two')
    assert one.fingerprint == two.fingerprint and not (tmp_path / 'tokenizer_config.json').exists()


@pytest.mark.parametrize('count, holds', [(1, 'only one document'), (50, '50 documents, all with the same text')])
def test_train_on_one_document(tmp_path, capsys, count, holds):
    (tmp_path / 'a.jsonl').write_text('{"text": "a b c"}\n' * count)
    words = ['--source', 'jsonl', '--vocab_size', 500, '--out', tmp_path / 'out', '--path']
    for path, line in (
        (tmp_path / 'a.jsonl', f' holds {holds}; two '),
        (tmp_path / 'b', f': there is no file {tmp_path}/b'),
    ):
        assert train(*words, path) == 4
        error = capsys.readouterr().err
        assert error.startswith(f'mixln_jax: --path{line}') and error.count('\n') == 1


@pytest.mark.parametrize('name', ['one.json', 'folder'])
def test_two_trainings_at_once(corpus, tmp_path, capsys, monkeypatch, name):
    """Into one --out, or into one that a link leads to: the second is refused, and changes nothing."""
    out, original = tmp_path / 'outs' / name, train_tokenizer.train
    (tmp_path / 'link').symlink_to(tmp_path / 'outs')
    words = ['--source', 'text', '--path', corpus, '--vocab_size', '500', '--out']

    def second(*arguments):
        monkeypatch.setattr(train_tokenizer, 'train', original)
        before = sorted(tmp_path.rglob('*'))
        for place in (out, tmp_path / 'link' / name):
            assert train(*words, place) == 2
            error = capsys.readouterr().err
            assert 'another process is writing to it' in error and error.count('\n') == 1
        assert sorted(tmp_path.rglob('*')) == before
        return original(*arguments)

    monkeypatch.setattr(train_tokenizer, 'train', second)
    assert train(*words, out) == 0
    assert train(*words, out) == 0 and open_file(out if out.is_file() else out / 'tokenizer.json').vocab_size == 500


def test_train_on_too_little_text(corpus, tmp_path, capsys):
    assert train('--source', 'text', '--path', corpus, '--vocab_size', 50_000, '--out', tmp_path / 'out') == 0
    said = capsys.readouterr()
    size = tokenizers.load(tmp_path / 'out').vocab_size
    assert 260 < size < 50_000
    assert f'only {size:,} of 50,000 ids' in said.err and f'model.vocab_size={size}' in said.out


@pytest.mark.parametrize(
    ('words', 'code', 'line'),
    [
        ('', 2, '--source, --vocab_size, --out'),
        ('--source web --vocab_size 300 --out x', 2, 'argument --source: invalid choice'),
        ('--source text --path a --vocab_size many --out x', 2, 'argument --vocab_size: invalid int value'),
        ('--source stdlib --vocab_size 259 --out x', 2, '--vocab_size 259 is too small.* 260'),
        ('--source stdlib --vocab_size 1000000000 --out x', 2, '--vocab_size must be at most 16777216'),
        ('--source stdlib --vocab_size 300 --out x --bogus', 2, '--bogus'),
        ('--source text --vocab_size 300 --out x', 2, '--path FILES is missing'),
        ('--source text --path none.txt --vocab_size 300 --out x', 4, r'there is no file none\.txt'),
        ('--source text --path corpus.txt --vocab_size 300 --out corpus.txt', 2, r'corpus\.txt'),
    ],
)
def test_train_errors(words, code, line, corpus, capsys, monkeypatch):
    monkeypatch.chdir(corpus.parent)
    assert train(*words.split()) == code
    said = capsys.readouterr().err
    assert said.startswith('mixln_jax: ') and said.count('\n') == 1
    assert re.search(line, said)
    assert not (corpus.parent / 'x').exists()

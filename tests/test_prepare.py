"""data.prepare: what it writes, that a kill changes nothing, and bad input."""

import gzip
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mixln_jax import config
from mixln_jax.data import datasets, files, layout, prepare, prepared, rows, shards, tokenizers, units
from mixln_jax.exits import DataError, UsageError

ROOT = pathlib.Path(__file__).parents[1]


def texts(seed, count=120):
    rng = random.Random(seed)
    words = 'the quick brown fox größer 🙂 jumps over a lazy dog'.split()  # noqa: SIM905
    return [f'{seed}.{i} ' + ' '.join(rng.choices(words, k=rng.randrange(1, 60))) for i in range(count)]


def write(path, documents):
    opener = gzip.open if path.suffix == '.gz' else open
    with opener(path, 'wt', encoding='utf-8') as file:
        for number, text in enumerate(documents):
            file.write(json.dumps({'text': text, 'timestamp': '2019-04-25', 'url': f'http://a/{number}'}) + '\n')
    return path


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """Three files shaped like C4's."""
    folder = tmp_path_factory.mktemp('corpus')
    for number in range(3):
        write(folder / f'c4-train.{number:05}-of-00003.json.gz', texts(number))
    return folder


def data(path, **values):
    return config.Data(source='jsonl', path=str(path), tokenizer='bytes', **values)


def contents(folder):
    """Name and bytes of everything that readers see."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file() and shards.NOTES not in path.parts
    }


def all_texts(source):
    return source.__getitems__(range(len(source)))


class TestDataSet:
    def test_is_one_that_tfds_opens(self, corpus, tmp_path):
        assert prepare.prepare(data(corpus / '*.gz'), str(tmp_path), format='tfds')
        read = {
            split: list(tfds.data_source('c4/en', split=split, data_dir=str(tmp_path)))
            for split in ('train', 'validation')
        }
        found = {split: [record['text'].decode() for record in records] for split, records in read.items()}
        assert sorted(found['train'] + found['validation']) == sorted(texts(0) + texts(1) + texts(2))
        assert len(found['validation']) == 20
        assert read['train'][0]['url'].startswith(b'http://a/') and read['train'][0]['timestamp'] == b'2019-04-25'
        ours = datasets.Dataset('c4/en', 'train', str(tmp_path))
        assert all_texts(ours) == found['train']
        assert 'c4-train.array_record-00000-of-00003, record 0' in ours.origin(0)

    def test_name_and_version(self, corpus, tmp_path):
        prepare.prepare(data(corpus / '*0-of*', name='mine:1.2.0'), str(tmp_path), format='tfds')
        assert (tmp_path / 'mine/1.2.0/mine-train.array_record-00000-of-00001').exists()
        assert len(datasets.Dataset('mine', 'train', str(tmp_path))) == 100

    def test_files_to_validate_on(self, corpus, tmp_path):
        validation = write(tmp_path / 'c4-validation.json', ['a', 'b', 'c'])
        prepare.prepare(data(corpus / '*.gz'), str(tmp_path), format='tfds', validation=str(validation))
        assert all_texts(datasets.Dataset('c4/en', 'validation', str(tmp_path))) == ['a', 'b', 'c']
        assert all_texts(datasets.Dataset('c4/en', 'train', str(tmp_path))) == texts(0) + texts(1) + texts(2)


class TestTokens:
    @pytest.mark.parametrize('mode', ['pad', 'pack', 'concat'])
    def test_rows_are_those_made_at_the_start_of_a_run(self, corpus, tmp_path, mode):
        of = data(corpus / '*0-of*', mode=mode)
        prepare.prepare(of, str(tmp_path), format='tokens', seq_length=32)
        tokenizer = tokenizers.Bytes()
        for split in ('train', 'validation'):
            made = prepared.Prepared(str(tmp_path), split)
            wanted = rows.open_rows(of, split, tokenizer, 32, 259)
            assert made.layout == wanted.layout and len(made) == len(wanted)
            np.testing.assert_array_equal(made.tokens(range(len(made))), wanted.tokens(range(len(made))))

    def test_small_vocabularies_take_two_bytes(self, corpus, tmp_path):
        prepare.prepare(data(corpus / '*0-of*'), str(tmp_path), format='tokens', seq_length=32)
        made = prepared.Prepared(str(tmp_path), 'train')
        assert (tmp_path / 'train-00000-of-00001.bin').stat().st_size == len(made) * 33 * 2
        assert layout.dtype_for(2**16) == np.uint16 and layout.dtype_for(2**16 + 1) == np.uint32

    def test_of_a_data_set(self, corpus, tmp_path):
        prepare.prepare(data(corpus / '*.gz'), str(tmp_path / 'text'), format='tfds')
        of = config.Data(source='tfds', data_dir=str(tmp_path / 'text'), tokenizer='bytes', mode='concat')
        prepare.prepare(of, str(tmp_path / 'tokens'), format='tokens', seq_length=64)
        made = prepared.Prepared(str(tmp_path / 'tokens'), 'train')
        assert len(list((tmp_path / 'tokens').glob('train-*-of-00003.bin'))) == 3
        ids = np.concatenate([*made.tokens(range(len(made)))[:, :-1]])
        assert tokenizers.Bytes().decode(ids[:200]).startswith(datasets.Dataset('c4/en', 'train', of.data_dir)[0][:60])

    def test_of_a_slice_and_another_split(self, corpus, tmp_path):
        prepare.prepare(data(corpus / '*.gz'), str(tmp_path / 'text'), format='tfds')
        of = config.Data(source='tfds', data_dir=str(tmp_path / 'text'), tokenizer='bytes')
        prepare.prepare(of, str(tmp_path / 'tokens'), format='tokens', validation='train[:7]')
        assert len(prepared.Prepared(str(tmp_path / 'tokens'), 'validation')) == 7
        with pytest.raises(UsageError, match='another preparation: .*data set'):
            prepare.prepare(of, str(tmp_path / 'tokens'), format='tokens', validation='train[:8]')

    def test_of_the_embedded_corpus_and_of_text(self, tmp_path):
        for source, path in (('stdlib', ''), ('text', ROOT / 'README.md')):
            out = tmp_path / source
            of = config.Data(source=source, path=str(path), tokenizer='bytes', mode='concat')
            prepare.prepare(of, str(out), format='tokens', seq_length=64)
            wanted = rows.open_rows(of, 'train', tokenizers.Bytes(), 64, 259)
            assert len(prepared.Prepared(str(out), 'train')) == len(wanted)


class TestAgain:
    def test_parts_of_the_work_make_the_whole(self, corpus, tmp_path, capsys):
        for out, parts in (('whole', [slice(None)]), ('parts', [slice(2, 3), slice(0, 2)])):
            for part in parts:
                done = prepare.prepare(
                    data(corpus / '*.gz', mode='pack'), str(tmp_path / out), format='tokens', seq_length=32, only=part
                )
                if part == slice(2, 3):
                    assert not done and not (tmp_path / out / prepared.DESCRIPTION).exists()
                    assert 'still lacks 2 of 3 shards: both-00000, both-00001\n' in capsys.readouterr().out
            assert done
        assert contents(tmp_path / 'whole') == contents(tmp_path / 'parts')

    @pytest.mark.parametrize('format', ['tfds', 'tokens'])
    def test_finished_shards_stay_and_damaged_ones_are_made_anew(self, corpus, tmp_path, format):
        def run():
            prepare.prepare(data(corpus / '*.gz'), str(tmp_path), format=format, seq_length=32)
            paths = [path for path in tmp_path.rglob('*-of-*') if shards.NOTES not in path.parts]
            return contents(tmp_path), {path: path.stat().st_mtime_ns for path in paths}

        before, times = run()
        assert run() == (before, times)
        path = max(times)
        path.write_bytes(path.read_bytes()[:-7])
        after, again = run()
        assert after == before
        assert {other for other in times if times[other] != again[other]} <= {
            other for other in times if other.name[-14:] == path.name[-14:]
        }

    def test_another_preparation_is_refused(self, corpus, tmp_path):
        prepare.prepare(data(corpus / '*0-of*'), str(tmp_path), format='tokens', seq_length=32)
        before = contents(tmp_path)
        for change, words in (
            ({'seq_length': 16}, 'seq-length'),
            ({'of': data(corpus / '*.gz')}, 'files'),
            ({'of': data(corpus / '*0-of*', mode='pack')}, 'mode'),
        ):
            arguments = {'of': data(corpus / '*0-of*'), 'seq_length': 32} | change
            with pytest.raises(UsageError, match=f'another preparation: .*{words}'):
                prepare.prepare(arguments.pop('of'), str(tmp_path), format='tokens', **arguments)
        assert contents(tmp_path) == before

    def test_bad_lines_do_not_cost_the_good_shards(self, corpus, tmp_path):
        for path in corpus.iterdir():
            shutil.copy(path, tmp_path / path.name)
        with gzip.open(tmp_path / 'c4-train.00002-of-00003.json.gz', 'at') as file:
            file.write('{"te\n')
        validation = str(write(tmp_path / 'validation.jsonl', ['a']))
        of, out = data(tmp_path / '*.gz'), tmp_path / 'out'
        with pytest.raises(DataError, match='00002-of-00003.json.gz:121: not JSON'):
            prepare.prepare(of, str(out), format='tokens', validation=validation)
        time = (out / 'train-00000-of-00003.bin').stat().st_mtime_ns
        assert prepare.prepare(of, str(out), format='tokens', validation=validation, skip_bad=1)
        assert (out / 'train-00000-of-00003.bin').stat().st_mtime_ns == time
        assert len(prepared.Prepared(str(out), 'train')) == 360

    @pytest.mark.parametrize(
        'format, description', [('tokens', 'tokens.json'), ('tfds', 'c4/en/3.1.0/dataset_info.json')]
    )
    def test_other_text_of_the_same_size(self, tmp_path, monkeypatch, format, description):
        """Is seen, and while it is prepared the folder is no data set."""
        path, validation = write(tmp_path / 'a.jsonl', texts(0)), str(write(tmp_path / 'b.jsonl', texts(1)))
        run = lambda: prepare.prepare(data(path), str(tmp_path / 'out'), format=format, validation=validation)  # noqa: E731
        run()
        before = contents(tmp_path / 'out')
        path.write_text(path.read_text().replace('quick', 'slow!'))
        there = []
        with monkeypatch.context() as patch:
            patch.setattr(prepare, '_write_all', lambda *_: there.append((tmp_path / 'out' / description).exists()))
            assert not run()
        assert there == [False]
        assert run()
        assert contents(tmp_path / 'out').keys() == before.keys() and contents(tmp_path / 'out') != before


class TestBadInput:
    def test_truncated_gzip(self, corpus, tmp_path):
        for path in corpus.iterdir():
            shutil.copy(path, tmp_path / path.name)
        bad = tmp_path / 'c4-train.00001-of-00003.json.gz'
        bad.write_bytes(bad.read_bytes()[:-30])
        with pytest.raises(DataError, match=r'00001-of-00003.json.gz:\d+: cannot be read'):
            prepare.prepare(data(tmp_path / '*.gz'), str(tmp_path / 'out'), format='tokens', skip_bad=10**6)
        assert not (tmp_path / 'out' / prepared.DESCRIPTION).exists()
        assert not list((tmp_path / 'out').glob('*00001-of*'))

    def test_a_file_that_was_fetched_anew(self, corpus, tmp_path):
        """Only its shard is made again; large corpora do not start over for one broken download."""
        validation = str(write(tmp_path / 'validation.jsonl', ['a']))
        for path in corpus.iterdir():
            shutil.copy(path, tmp_path / path.name)
        bad = tmp_path / 'c4-train.00001-of-00003.json.gz'
        bad.write_bytes(bad.read_bytes()[:-30])
        with pytest.raises(DataError, match=r'00001-of-00003.json.gz:\d+: cannot be read'):
            prepare.prepare(data(tmp_path / '*.gz'), str(tmp_path / 'out'), format='tokens', validation=validation)
        assert [path.name for path in sorted((tmp_path / 'out').glob('train*'))] == ['train-00000-of-00003.bin']
        time = (tmp_path / 'out/train-00000-of-00003.bin').stat().st_mtime_ns
        shutil.copy(corpus / bad.name, bad)
        assert prepare.prepare(data(tmp_path / '*.gz'), str(tmp_path / 'out'), format='tokens', validation=validation)
        assert len(prepared.Prepared(str(tmp_path / 'out'), 'train')) == 360
        assert (tmp_path / 'out/train-00000-of-00003.bin').stat().st_mtime_ns == time

    def test_bad_and_empty_records(self, tmp_path, capsys):
        path = write(tmp_path / 'a.jsonl', [*texts(0), '', ' \n'])
        path.write_bytes(path.read_bytes() + b'{"text": 1}\n{"text": "\xff"}\n{"te')
        for skip_bad, line in ((0, 123), (2, 125)):
            with pytest.raises(DataError, match=f'a.jsonl:{line}'):
                prepare.prepare(data(path), str(tmp_path / str(skip_bad)), format='tokens', skip_bad=skip_bad)
        capsys.readouterr()
        prepare.prepare(data(path), str(tmp_path / 'out'), format='tokens', skip_bad=3)
        shown = capsys.readouterr().out
        assert '2 documents without text and 3 bad records' in shown
        assert 'a.jsonl:124: not UTF-8' in shown and 'a.jsonl:125: not JSON' in shown

    def test_no_room(self, corpus, tmp_path, monkeypatch):
        usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
        monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda path: usage)
        with pytest.raises(UsageError, match=r'room for 0.00 MB, about 0.\d\d MB are needed; nothing was written'):
            prepare.prepare(data(corpus / '*.gz'), str(tmp_path), format='tfds')
        assert not contents(tmp_path)

    @pytest.mark.parametrize('format', ['tfds', 'tokens'])
    def test_the_room_foretold_is_about_right(self, tmp_path, capsys, monkeypatch, format):
        write(tmp_path / 'a.json.gz', texts(0, 8000))
        monkeypatch.setattr(prepare, 'SAMPLE', 500_000)
        prepare.prepare(data(tmp_path / 'a.json.gz'), str(tmp_path / 'out'), format=format)
        words = capsys.readouterr().out.split()
        assert words[2] == 'MB'
        written = sum(map(len, contents(tmp_path / 'out').values())) / 1e6
        assert float(words[1]) == pytest.approx(1.1 * written, rel=0.25)

    def test_a_shard_that_another_process_writes(self, corpus, tmp_path):
        of = data(corpus / '*0-of*')
        unit = units.list_units(of, '')[0]
        with shards._locked(tmp_path / shards.NOTES, unit.name), pytest.raises(UsageError, match='another process'):
            job = shards.Job(of, 'tokens', '', str(tmp_path), tokenizers.Bytes(), 32, 2**60, 0)
            shards.write(job, unit, lambda *_: None)

    def test_files_for_both_splits(self, corpus, tmp_path):
        with pytest.raises(UsageError, match='--path and --validation both name .*00001-of'):
            prepare.prepare(
                data(corpus / '*.gz'), str(tmp_path), format='tokens', validation=f'{corpus}/c4-train.00001*'
            )

    @pytest.mark.parametrize('name', ['', 'My Data/x y', '../../out', '/abs', 'c4/en:abc', 'a/b/c'])
    def test_names(self, corpus, tmp_path, name):
        with pytest.raises(UsageError, match='--name'):
            prepare.prepare(data(corpus / '*.gz', name=name), str(tmp_path / 'out'), format='tfds')
        assert not (tmp_path / 'out').exists()

    def test_no_such_shards(self, corpus, tmp_path):
        with pytest.raises(UsageError, match='--shards 7:9: there are only 3 shards'):
            prepare.prepare(data(corpus / '*.gz'), str(tmp_path), format='tokens', only=slice(7, 9))

    def test_one_document(self, tmp_path):
        with pytest.raises(DataError, match='one document only'):
            prepare.prepare(data(write(tmp_path / 'a.jsonl', ['x'])), str(tmp_path / 'out'), format='tokens')

    def test_a_long_document(self, tmp_path):
        long = 'word ' * 4_000_000
        path = write(tmp_path / 'a.jsonl', ['short', long])
        prepare.prepare(data(path, mode='concat'), str(tmp_path / 'out'), format='tokens', seq_length=256)
        sizes = sorted(len(prepared.Prepared(str(tmp_path / 'out'), 'train')) for _ in range(1))
        assert sizes[0] in (0, len(long) // 256)

    @pytest.mark.parametrize(
        'words, message',
        [
            ('--source jsonl --format tokens', '--out'),
            ('--source tokens --out x --format tokens', 'invalid choice'),
            ('--source jsonl --path x --out x --format tokens --shards 3', '--shards is A:B'),
            ('--source jsonl --path x --out x --format tokens --shards 3:3', '--shards is A:B'),
            ('--source jsonl --path x --out x --format tokens --shards=-1:3', '--shards is A:B'),
            ('--source jsonl --path x --out x --format tokens --workers 0', '--workers must be at least 1'),
            ('--source jsonl --path x --out x --format tokens --skip-bad -1', '--skip-bad must be at least 0'),
            ('--source text --out x --format tfds', '--source text needs --path FILES'),
            ('--source stdlib --out gs://x/y --format tfds', '--out gs://x/y: a folder of this machine is needed'),
            ('--source tfds --out x --format tfds', '--source tfds goes with --format tokens'),
            ('--source jsonl --out x --format tfds more', 'unrecognized arguments: more'),
        ],
    )
    def test_usage(self, words, message, capsys, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        assert prepare.main(words.split()) == 2
        error = capsys.readouterr().err
        assert message in error and error.count('\n') == 1
        assert not list(tmp_path.iterdir())

    def test_codes(self, corpus, tmp_path, capsys):
        words = ['--source', 'jsonl', '--format', 'tokens', '--tokenizer', 'bytes', '--workers', '1']
        assert prepare.main([*words, '--path', f'{corpus}/none.gz', '--out', f'{tmp_path}/a']) == 4
        assert 'there is no file' in capsys.readouterr().err
        assert prepare.main([*words, '--path', f'{corpus}/*.gz', '--out', f'{tmp_path}/a']) == 0
        assert '--config.data.source=tokens' in capsys.readouterr().out


def start(corpus, out, *words, format='tokens'):
    command = [
        sys.executable,
        '-m',
        'mixln_jax.data.prepare',
        '--source',
        'jsonl',
        '--path',
        f'{corpus}/*.gz',
        '--format',
        format,
    ]
    command += ['--tokenizer', 'bytes', '--mode', 'pack', '--out', str(out), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def children(pid):
    return [
        int(path.parent.name)
        for path in pathlib.Path('/proc').glob('[0-9]*/stat')
        if path.exists() and path.read_text().rpartition(')')[2].split()[1] == str(pid)
    ]


def alive(pid):
    return os.path.exists(f'/proc/{pid}')


def partial(out):
    """Whether a shard is being written."""
    return next(out.rglob('*train*.partial'), None) is not None


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    """Four files that take about a second each."""
    folder = tmp_path_factory.mktemp('large')
    for number in range(4):
        write(folder / f'{number}.json.gz', texts(number, 30_000))
    return folder


@pytest.mark.slow
class TestProcesses:
    @pytest.mark.parametrize('format', ['tokens', 'tfds'])
    def test_killed_and_run_again(self, large, tmp_path, format):
        """Whenever it is killed, what is there by then is whole, and the end is the same."""
        whole = start(large, tmp_path / 'whole', '--workers', '2', format=format)
        assert whole.wait(120) == 0
        out = tmp_path / 'killed'
        for finished in range(3):
            process = start(large, out, '--workers', '2', format=format)
            until(lambda n=finished: len(list(out.rglob(f'{shards.NOTES}/both*.json'))) >= n and partial(out))
            workers = children(process.pid)
            process.kill()
            assert process.wait() == -signal.SIGKILL
            assert not [*out.rglob(prepared.DESCRIPTION), *out.rglob('dataset_info.json')]
            until(lambda pids=workers: not any(map(alive, pids)))
        last = start(large, out, '--workers', '1', format=format)
        assert last.wait(120) == 0
        assert contents(tmp_path / 'whole') == contents(out)

    def test_sigterm(self, large, tmp_path):
        process = start(large, tmp_path / 'out', '--workers', '2')
        until(lambda: partial(tmp_path / 'out'))
        workers = children(process.pid)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 75
        assert b'run the same command again' in errors.splitlines()[-1]
        assert len(workers) >= 2
        until(lambda: not any(map(alive, workers)))
        assert not list(tmp_path.rglob('*.partial')) and not list(tmp_path.rglob('*.lock'))

    def test_a_killed_worker_is_told(self, large, tmp_path):
        process = start(large, tmp_path / 'out', '--workers', '2')
        until(lambda: partial(tmp_path / 'out'))
        for pid in children(process.pid):
            if b'spawn_main' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes():
                os.kill(pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 7
        assert b'a worker process was killed' in errors.splitlines()[-1]

    def test_memory_does_not_grow_with_the_text(self, large, tmp_path):
        peaks = []
        for name, repeat in (('small', 1), ('large', 8)):
            with gzip.open(tmp_path / f'{name}.json.gz', 'wb') as file:
                for _ in range(repeat):
                    file.write(gzip.decompress((large / '0.json.gz').read_bytes()))
            code = (
                'import resource, sys\n'
                'from mixln_jax.data import prepare\n'
                'assert prepare.main(sys.argv[1:]) == 0\n'
                'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)'
            )
            words = (
                f'--source jsonl --path {tmp_path}/{name}.json.gz --out {tmp_path}/{name} --format tokens --workers 1'
            )
            command = [sys.executable, '-c', code, *words.split(), '--tokenizer', 'bytes', '--mode', 'pack']
            shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
            peaks.append(int(shown.split()[-1]) / 1024)
        assert peaks[1] - peaks[0] < 10, peaks


def test_readers_tell_of_files(tmp_path):
    """The counts that a shard's note keeps are the reader's."""
    path = write(tmp_path / 'a.jsonl', ['a', '', 'b'])
    reader = files.Reader('jsonl', str(path))
    assert len(list(reader)) == 2 and (reader.empty, reader.bad, reader.position) == (1, 0, path.stat().st_size)

"""data.prepare: what it writes, what it writes again, and bad input."""

import dataclasses
import errno
import gzip
import pathlib
import re
import shutil

import data_sets
import numpy as np
import pytest
import tensorflow_datasets as tfds
from corpora import all_tokens, contents, documents, texts, write

from mixln_jax import config
from mixln_jax.data import prepared, rows, sources, tokenizers, train_tokenizer
from mixln_jax.data.prepare import command as prepare
from mixln_jax.data.prepare import job as jobs
from mixln_jax.data.prepare import units
from mixln_jax.system import outputs
from mixln_jax.system.errors import DataError, UsageError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """Three files shaped like C4's."""
    folder = tmp_path_factory.mktemp('corpus')
    for number in range(3):
        write(folder / f'c4-train.{number:05}-of-00003.json.gz', texts(number))
    return folder


def data(path, **values):
    return config.Data(**{'source': 'jsonl', 'path': str(path), 'tokenizer': 'bytes'} | values)


def dataset(folder, **values):
    return config.Data(source='tfds', data_dir=str(folder), tokenizer='bytes', **values)


def assert_rows(folder, of, seq_length=64):
    """Prepared rows are those that a run makes of `of` at its start."""
    for split in ('train', 'validation'):
        made = prepared.Prepared(str(folder), split)
        wanted = rows.open_rows(of, split, tokenizers.Bytes(), seq_length, 259)
        np.testing.assert_array_equal(all_tokens(made), all_tokens(wanted))


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
        first = read['train'][0]
        assert first['url'].startswith(b'http://a/') and first['timestamp'] == b'2019-04-25'
        assert {*first} == {*jobs.FIELDS} and first['content-type'] == b''
        assert documents(dataset(tmp_path), 'train') == found['train']
        origin = sources.open_source(dataset(tmp_path), 'train').origin(0)
        assert 'c4-train.array_record-00000-of-00003, record 0' in origin

    def test_name_and_version(self, corpus, tmp_path):
        prepare.prepare(data(corpus / '*0-of*', name='mine:1.2.0'), str(tmp_path), format='tfds')
        assert (tmp_path / 'mine/1.2.0/mine-train.array_record-00000-of-00001').exists()
        assert len(documents(dataset(tmp_path, name='mine'), 'train')) == 100

    def test_files_to_validate_on(self, corpus, tmp_path):
        validation = write(tmp_path / 'c4-validation.json', ['a', 'b', 'c'])
        prepare.prepare(data(corpus / '*.gz'), str(tmp_path), format='tfds', validation=str(validation))
        assert documents(dataset(tmp_path), 'validation') == ['a', 'b', 'c']
        assert documents(dataset(tmp_path), 'train') == texts(0) + texts(1) + texts(2)


class TestTokens:
    def test_small_vocabularies_take_two_bytes(self, corpus, tmp_path):
        prepare.prepare(data(corpus / '*0-of*'), str(tmp_path), format='tokens', seq_length=32)
        made = prepared.Prepared(str(tmp_path), 'train')
        assert (tmp_path / 'train-00000-of-00001.bin').stat().st_size == len(made) * 33 * 2

    def test_of_a_data_set(self, corpus, tmp_path):
        prepare.prepare(data(corpus / '*.gz'), str(tmp_path / 'text'), format='tfds')
        of = dataset(tmp_path / 'text')
        for split in ('train', 'validation'):
            assert documents(of, split) == documents(data(corpus / '*.gz'), split)
        prepare.prepare(of, str(tmp_path / 'tokens'), format='tokens', seq_length=64)
        assert len(list((tmp_path / 'tokens').glob('train-*-of-00003.bin'))) == 3
        assert_rows(tmp_path / 'tokens', of)

    def test_of_a_slice_and_another_split(self, corpus, tmp_path):
        prepare.prepare(data(corpus / '*.gz'), str(tmp_path / 'text'), format='tfds')
        of = dataset(tmp_path / 'text')
        of = dataclasses.replace(of, split='train[8:]')
        prepare.prepare(of, str(tmp_path / 'tokens'), format='tokens', validation='train[:7]')
        assert len(prepared.Prepared(str(tmp_path / 'tokens'), 'validation')) == 7
        with pytest.raises(UsageError, match='another preparation: .*data set'):
            prepare.prepare(of, str(tmp_path / 'tokens'), format='tokens', validation='train[:8]')

    @pytest.mark.parametrize(
        'split, validation, shared',
        [
            ('train', 'train[:7]', True),
            ('train[130:150]', 'train[149:160]', True),  # of the second file
            ('train[:150]', 'train[150:151]', False),
            ('train[250:]', 'train[249:251]', True),
            ('train', 'validation', False),
            ('train[9:]+train[:2]', 'train[1:3]', True),
            ('train[9:]+train[:2]', 'train[2:9]', False),
        ],
    )
    def test_splits_that_share_records(self, corpus, tmp_path, capsys, split, validation, shared):
        prepare.prepare(data(corpus / '*.gz'), str(tmp_path / 'text'), format='tfds')
        words = ['--source', 'tfds', '--data_dir', str(tmp_path / 'text'), '--split', split, '--validation', validation]
        words += ['--format', 'tokens', '--tokenizer', 'bytes', '--out', str(tmp_path / 'out'), '--workers', '1']
        assert prepare.main(words) == (2 if shared else 0)
        told = f'--split {split} and --validation {validation} share records of {tmp_path}/text/c4'
        assert (told in capsys.readouterr().err) == shared

    @pytest.mark.parametrize('source, path', [('stdlib', ''), ('text', ROOT / 'README.md')])
    def test_of_the_embedded_corpus_and_of_text(self, tmp_path, source, path):
        of = data(path, source=source, mode='concat')
        prepare.prepare(of, str(tmp_path), format='tokens', seq_length=64)
        assert_rows(tmp_path, of)


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

    @pytest.mark.parametrize(
        'parts', [(':1', '1:'), ('1:3', '0:1'), ('2:', ':2'), ('0:1', '1:2', '2:3'), ('1:99', '0:1')]
    )
    def test_hosts_share_the_work(self, corpus, tmp_path, capsys, parts):
        """--shards A:B names those from A on and before B, no others; together the hosts make what one makes."""
        words = ['--source', 'jsonl', '--path', f'{corpus}/*.gz', '--format', 'tokens', '--tokenizer', 'bytes']
        words += ['--mode', 'pack', '--seq_length', '32', '--workers', '1', '--out']
        assert prepare.main([*words, str(tmp_path / 'whole')]) == 0
        whole, out = contents(tmp_path / 'whole'), tmp_path / 'out'
        names = sorted(name for name in whole if name.endswith('.bin'))
        assert len(names) == 6 and len({whole[name] for name in names}) == 6
        made = set()
        for part in parts:
            assert prepare.main([*words, str(out), f'--shards={part}']) == 0
            first, end = part.split(':')
            made |= {*range(int(first or 0), min(int(end or 3), 3))}
            there = {int(path.name.split('-')[1]) for path in out.glob('*.bin')}
            assert there == made and ((out / prepared.DESCRIPTION).exists() == (made == {0, 1, 2}))
        assert contents(out) == whole

    def test_the_first_host_makes_all_to_validate_on(self, corpus, tmp_path):
        for name in 'ab':
            write(tmp_path / f'{name}.jsonl', [f'{name}{i}' for i in range(3)])

        def run(part):
            validation, out = f'{tmp_path}/*.jsonl', str(tmp_path / 'out')
            return prepare.prepare(data(corpus / '*.gz'), out, format='tokens', validation=validation, only=part)

        assert not run(slice(1, 3)) and not list(tmp_path.glob('out/validation*'))
        assert not run(slice(2, 3)) and not list(tmp_path.glob('out/validation*'))
        assert run(slice(0, 1))
        assert len(prepared.Prepared(str(tmp_path / 'out'), 'validation')) == 6
        assert len(prepared.Prepared(str(tmp_path / 'out'), 'train')) == 360

    @pytest.mark.parametrize('format', ['tfds', 'tokens'])
    def test_finished_shards_stay_and_damaged_ones_are_made_anew(self, corpus, tmp_path, format):
        def run():
            prepare.prepare(data(corpus / '*.gz'), str(tmp_path), format=format, seq_length=32)
            paths = [path for path in tmp_path.rglob('*-of-*') if prepared.WORK not in path.parts]
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
        out, of = tmp_path / 'out', corpus / '*0-of*'
        (tmp_path / 'tokenizer.json').write_bytes(train_tokenizer.train(texts(0), 270))
        prepare.prepare(data(of), str(out), format='tokens', seq_length=32)
        before = contents(out)
        for other, seq_length, words in (
            (data(of), 16, 'seq_length'),
            (data(corpus / '*.gz'), 32, 'files'),
            (data(of, mode='pack'), 32, 'mode'),
            (data(of, tokenizer='huggingface', tokenizer_path=str(tmp_path / 'tokenizer.json')), 32, 'tokenizer'),
        ):
            with pytest.raises(UsageError, match=f'another preparation: .*{words}'):
                prepare.prepare(other, str(out), format='tokens', seq_length=seq_length)
        assert contents(out) == before

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
        with pytest.raises(DataError, match='00002-of-00003.json.gz:121: not JSON'):  # asked for again
            prepare.prepare(of, str(out), format='tokens', validation=validation)

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


def test_inputs_that_change_at_their_end_are_others(tmp_path, monkeypatch):
    monkeypatch.setattr(units, 'ENDS', 100)
    path = write(tmp_path / 'a.jsonl', texts(0))

    def digest():
        [unit] = units.list_units(data(path), '')
        return unit.digest

    before, content = digest(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert digest() != before


class TestBadInput:
    def test_a_file_that_was_fetched_anew(self, corpus, tmp_path):
        """Only its shard is made again; large corpora do not start over for one broken download."""
        validation = str(write(tmp_path / 'validation.jsonl', ['a']))
        for path in corpus.iterdir():
            shutil.copy(path, tmp_path / path.name)
        bad = tmp_path / 'c4-train.00001-of-00003.json.gz'
        bad.write_bytes(bad.read_bytes()[:-30])
        of, out = data(tmp_path / '*.gz'), tmp_path / 'out'
        with pytest.raises(DataError, match=r'00001-of-00003.json.gz:\d+: cannot be read'):
            prepare.prepare(of, str(out), format='tokens', validation=validation, skip_bad=10**6)
        assert not (out / prepared.DESCRIPTION).exists() and not list(out.glob('*00001-of*'))
        assert [path.stem for path in sorted(out.glob('train*'))] == 2 * ['train-00000-of-00003']
        time = (out / 'train-00000-of-00003.bin').stat().st_mtime_ns
        shutil.copy(corpus / bad.name, bad)
        assert prepare.prepare(of, str(out), format='tokens', validation=validation)
        assert len(prepared.Prepared(str(out), 'train')) == 360
        assert (out / 'train-00000-of-00003.bin').stat().st_mtime_ns == time

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

    def test_documents_that_are_too_long(self, tmp_path, capsys):
        data_sets.write(tmp_path, [[f'0 {i}' for i in range(30)] + ['long ' * 1000]])
        sources = {'a data set': dict(data=dataset(tmp_path, split='train[5:]'), validation='train[:5]')}
        sources['a file'] = dict(data=data(write(tmp_path / 'a.jsonl', [*texts(0), 'long ' * 1000])))
        for number, (kind, of) in enumerate(sources.items()):
            of |= dict(format='tokens', max_document=4000)
            with pytest.raises(DataError, match='more than 4,000 bytes.*--max_document BYTES'):
                prepare.prepare(out=str(tmp_path / f'{kind}-0'), **of)
            capsys.readouterr()
            assert prepare.prepare(out=str(tmp_path / f'{kind}-1'), skip_bad=1, **of)
            assert '0 documents without text and 1 bad records' in capsys.readouterr().out, number

    def test_bad_and_empty_records_of_a_data_set(self, tmp_path, capsys):
        found = [[f'{shard} {i}' for i in range(count)] for shard, count in enumerate((30, 100))]
        found[1][50], found[1][70], found[1][80] = b'caf\xe9', b'\xff', ' \n'  # none is in the sample of a fingerprint
        data_sets.write(tmp_path, found)

        def run(skip_bad):
            of, out = dataset(tmp_path, split='train[:120]'), str(tmp_path / 'out')
            return prepare.prepare(of, out, format='tokens', validation='train[120:]', skip_bad=skip_bad)

        with pytest.raises(DataError, match='-00001-of-00002, record 70: no text in `text`: .*utf-8'):
            run(1)
        capsys.readouterr()
        assert run(2) and len(prepared.Prepared(str(tmp_path / 'out'), 'train')) == 117
        shown = capsys.readouterr().out
        assert '1 documents without text and 2 bad records' in shown
        assert all(f'-00001-of-00002, record {number}: no text in `text`: ' in shown for number in (50, 70))

    def test_no_room(self, corpus, tmp_path, monkeypatch):
        usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
        monkeypatch.setattr(prepare.shutil, 'disk_usage', lambda path: usage)
        with pytest.raises(UsageError, match=r'room for 0.00 MB, but about 0.\d\d MB are needed; nothing was written'):
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

    @pytest.mark.parametrize('format', ['tokens', 'tfds'])
    @pytest.mark.parametrize(
        'first, second', [(':', ':'), (':', '2:'), ('1:2', ':'), ('0:2', '1:3'), ('2:', '0:9'), ('0:1', '0:1')]
    )
    @pytest.mark.parametrize('state', ['new', 'complete', 'damaged'])
    def test_shards_that_another_process_prepares(self, corpus, tmp_path, capsys, format, first, second, state):
        """Are refused before anything is written, also where they are finished; the first is not disturbed."""
        words = ['--source', 'jsonl', '--path', f'{corpus}/*.gz', '--tokenizer', 'bytes', '--workers', '1']
        words += ['--out', str(tmp_path), '--format', format]
        if state != 'new':
            assert prepare.main(words) == 0
            for path in [*tmp_path.rglob('*-00001-of-*')] if state == 'damaged' else ():
                path.write_bytes(path.read_bytes()[:-1])
        of = data(corpus / '*.gz')
        folder = jobs.folder(str(tmp_path), format, of.name)
        job = jobs.Job(of, format, str(tmp_path), str(folder), tokenizers.Bytes(), 32, 2**60, 0)
        (folder / prepared.WORK).mkdir(parents=True, exist_ok=True)
        wanted = units.list_units(of, '')[slice(*(int(end) if end else None for end in first.split(':')))]
        partial = folder / f'{job.file(wanted[0], "train")}.partial'
        partial.touch()
        before = contents(tmp_path)
        capsys.readouterr()
        with job.claimed(wanted):
            assert prepare.main([*words, '--shards', second]) == 2
            error = capsys.readouterr().err
            assert re.search(rf'{folder}/.prepare/both-0000\d.lock: another process prepares this shard', error)
            assert error.count('\n') == 1 and contents(tmp_path) == before
        partial.unlink()
        assert prepare.main(words) == 0 and not [*tmp_path.rglob('*.lock')]

    @pytest.mark.parametrize('first, second', [('0:1', '1:3'), ('1:3', '0:1'), ('1:2', '2:'), ('2:', ':2')])
    def test_other_shards_than_those_of_another_process(self, corpus, tmp_path, first, second):
        of = data(corpus / '*.gz')
        job = jobs.Job(of, 'tokens', '', str(tmp_path), tokenizers.Bytes(), 32, 2**60, 0)
        (tmp_path / prepared.WORK).mkdir()
        one, other = (slice(*(int(end) if end else None for end in part.split(':'))) for part in (first, second))
        (tmp_path / prepared.WORK / 'both-00001.lock').touch()  # of a process that was killed
        with job.claimed(units.list_units(of, '')[one]):
            assert not prepare.prepare(of, str(tmp_path), format='tokens', only=other)
            assert {int(path.name[6:11]) for path in tmp_path.glob('train-*.bin')} == {*range(3)[other]}

    def test_a_file_system_without_locks(self, corpus, tmp_path, monkeypatch, capsys):
        def flock(*_):
            raise OSError(errno.ENOLCK, 'No locks available')

        monkeypatch.setattr(outputs.fcntl, 'flock', flock)
        prepare.prepare(data(corpus / '*.gz'), str(tmp_path), format='tokens')
        told = capsys.readouterr().err.count('.lock cannot be locked ([Errno')
        assert told == 1 and len(list(tmp_path.glob('train-*.bin'))) == 3

    def test_files_for_both_splits(self, corpus, tmp_path):
        with pytest.raises(UsageError, match='--path and --validation both name .*00001-of'):
            prepare.prepare(
                data(corpus / '*.gz'), str(tmp_path), format='tokens', validation=f'{corpus}/c4-train.00001*'
            )

    def test_errors_name_the_option(self, corpus, tmp_path):
        with pytest.raises(DataError, match='^--validation: there is no file none$'):
            prepare.prepare(data(corpus / '*.gz'), str(tmp_path), format='tokens', validation='none')
        with pytest.raises(DataError, match='^--path: gs://a/b is not a file of this machine; copy it here first$'):
            prepare.prepare(data('gs://a/b', source='text'), str(tmp_path), format='tokens')

    NAMES = ['./a.jsonl', '{}/a.jsonl', 'c/../a.jsonl', '~/a.jsonl', 'link', 'hard', 'copy.jsonl', 'a*']

    @pytest.mark.parametrize('validation', NAMES)
    def test_a_file_for_both_splits_by_another_name(self, tmp_path, monkeypatch, validation):
        write(tmp_path / 'a.jsonl', texts(0))
        write(tmp_path / 'b.jsonl', texts(1))
        write(tmp_path / 'other.jsonl', texts(2))
        (tmp_path / 'c').mkdir()
        (tmp_path / 'link').symlink_to('a.jsonl')
        (tmp_path / 'hard').hardlink_to(tmp_path / 'a.jsonl')
        shutil.copy(tmp_path / 'a.jsonl', tmp_path / 'copy.jsonl')
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv('HOME', str(tmp_path))
        for path in ('[ab].jsonl', f'{tmp_path}/[ab].jsonl'):
            with pytest.raises(UsageError, match=r'--path .*a\.jsonl.* one file|--path and --validation both name'):
                prepare.prepare(data(path), 'out', format='tokens', validation=validation.replace('{}', str(tmp_path)))
        assert not (tmp_path / 'out' / 'tokens.json').exists()
        assert prepare.prepare(data('[ab].jsonl'), 'out', format='tokens', validation='other.jsonl')

    def test_a_file_named_twice_is_one_shard(self, tmp_path, monkeypatch):
        write(tmp_path / 'a.jsonl', texts(0))
        monkeypatch.chdir(tmp_path)
        prepare.prepare(data('a.jsonl'), 'once', format='tokens')
        prepare.prepare(data('./a.jsonl,a.jsonl'), 'twice', format='tokens')
        assert contents(tmp_path / 'once') == contents(tmp_path / 'twice')

    @pytest.mark.parametrize('packed', [False, True])
    @pytest.mark.parametrize('skip_bad', ['0', '1', '9'])
    def test_why_there_is_no_text(self, tmp_path, capsys, skip_bad, packed):
        """As training says it; packed by gzip too, whatever the name."""
        path, content = tmp_path / 'a.json', b'{"content": "a b"}\n{"content": "c"}\n'
        path.write_bytes(gzip.compress(content) if packed else content)
        words = ['--source', 'jsonl', '--path', str(path), '--format', 'tokens', '--tokenizer', 'bytes', '--out']
        assert prepare.main([*words, str(tmp_path / 'out'), '--skip_bad', skip_bad]) == 4
        why = 'no field `text` that is a string (fields: content)'
        place = {'0': ':1', '1': ':2', '9': ': no text in this file: 2 malformed lines, the first of them 1'}[skip_bad]
        assert capsys.readouterr().err.splitlines()[-1] == f'mixln_jax: {path}{place}: {why}'
        with pytest.raises(DataError) as caught:
            sources.open_source(data(path), 'train')
        assert str(caught.value) == f'{path}:1: {why}'

    @pytest.mark.parametrize('name', ['', 'My Data/x y', '../../out', '/abs', 'c4/en:abc', 'a/b/c'])
    def test_names(self, corpus, tmp_path, name):
        with pytest.raises(UsageError, match='--name'):
            prepare.prepare(data(corpus / '*.gz', name=name), str(tmp_path / 'out'), format='tfds')
        assert not (tmp_path / 'out').exists()

    def test_no_such_shards(self, corpus, tmp_path):
        with pytest.raises(UsageError, match='--shards 7:9: there are only 3 shards'):
            prepare.prepare(data(corpus / '*.gz'), str(tmp_path), format='tokens', only=slice(7, 9))

    @pytest.mark.parametrize(
        'name, content, holds',
        [
            ('a.jsonl', '{"text": "x"}\n', 'only one document'),
            ('a.txt', 'x\n\n' * 9, 'only one document'),
            ('a.jsonl,b.jsonl', '{"text": "x"}\n', '2 documents, all with the same text'),
            ('a.jsonl', '{"text": "x"}\n' * 50, '50 documents, all with the same text'),
            ('a.jsonl,b.jsonl', '{"text": "x"}\n' * 2500, '5,000 documents, all with the same text'),
        ],
    )
    @pytest.mark.parametrize('format', ['tokens', 'tfds'])
    def test_one_document(self, tmp_path, capsys, monkeypatch, name, content, holds, format):
        """However often it comes: the option is named, and the reason."""
        monkeypatch.chdir(tmp_path)
        for file in name.split(','):
            pathlib.Path(file).write_text(content)
        words = ['--source', 'text' if 'txt' in name else 'jsonl', '--path', name, '--tokenizer', 'bytes']
        assert prepare.main([*words, '--format', format, '--out', 'out']) == 4
        needed = 'two different documents are needed, one of them for validation, or --validation FILES'
        assert capsys.readouterr().err == f'mixln_jax: --path holds {holds}; {needed}\n'
        assert not pathlib.Path('out').exists()

    @pytest.mark.parametrize('description', ['both', 'tokens.json', '.prepare'])
    @pytest.mark.parametrize('format, below', [('tfds', ''), ('tfds', 'a'), ('tokens', 'a'), ('tokens', 'a/b')])
    def test_inside_of_another_preparation(self, corpus, tmp_path, capsys, description, format, below):
        """No data set goes into a folder of rows, as no rows go into one of a data set."""
        words = ['--source', 'jsonl', '--path', f'{corpus}/*0-of*', '--tokenizer', 'bytes', '--workers', '1']
        out = tmp_path / 'rows'
        assert prepare.main([*words, '--format', 'tokens', '--out', str(out)]) == 0
        if description == 'tokens.json':
            shutil.rmtree(out / prepared.WORK)
        elif description == '.prepare':
            (out / 'tokens.json').unlink()
        before = contents(tmp_path)
        capsys.readouterr()
        assert prepare.main([*words, '--format', format, '--out', str(out / below)]) == 2
        error = capsys.readouterr().err
        assert f'{out} holds another preparation' in error and error.count('\n') == 1
        assert contents(tmp_path) == before and not (out / 'a').exists() and not (out / 'c4').exists()

    def test_rows_beside_and_inside_of_the_folder_of_data_sets(self, corpus, tmp_path):
        """As in docs/c4.md; but not inside of a data set."""
        of = data(corpus / '*0-of*')
        for name, format in {'': 'tfds', 'c4-64': 'tokens', 'c4-32': 'tokens'}.items():
            assert prepare.prepare(of, str(tmp_path / 'data' / name), format=format)
        for place in ('c4/en/3.1.0', 'c4/en/3.1.0/rows'):
            with pytest.raises(UsageError, match='another preparation'):
                prepare.prepare(of, str(tmp_path / 'data' / place), format='tokens')

    def test_a_long_document(self, tmp_path):
        long = 'word ' * 4_000_000
        of, validation = (
            data(write(tmp_path / 'a.jsonl', [long]), mode='concat'),
            write(tmp_path / 'b.jsonl', ['short']),
        )
        prepare.prepare(of, str(tmp_path / 'out'), format='tokens', seq_length=256, validation=str(validation))
        assert len(prepared.Prepared(str(tmp_path / 'out'), 'train')) == len(long) // 256

    @pytest.mark.parametrize(
        'words, message',
        [
            ('--source jsonl --format tokens', '--out'),
            ('--source tokens --out x --format tokens', 'invalid choice'),
            ('--source jsonl --path x --out x --format tokens --shards 3', '--shards is A:B'),
            ('--source jsonl --path x --out x --format tokens --shards 3:3', '--shards is A:B'),
            ('--source jsonl --path x --out x --format tokens --shards=-1:3', '--shards is A:B'),
            ('--source jsonl --path x --out x --format tokens --workers 0', '--workers must be at least 1'),
            ('--source jsonl --path x --out x --format tokens --workers 100000', '--workers must be at most 1024'),
            (
                '--source jsonl --path x --out x --format tokens --seq_length 1e12',
                '--seq_length must be at most 1048576',
            ),
            ('--source jsonl --path x --out x --format tokens --max_document 0', '--max_document must be at least 1'),
            ('--source jsonl --path x --out x --format tokens --skip_bad -1', '--skip_bad must be at least 0'),
            ('--source jsonl --path x --out x --format tokens --seq_length 1', '--seq_length must be at least 2'),
            ('--source stdlib --validation x --out x --format tfds', '--validation does not go with --source stdlib'),
            ('--source text --out x --format tfds', '--source text needs --path FILES'),
            ('--source stdlib --out gs://x/y --format tfds', '--out gs://x/y: a path on this machine is needed'),
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

    def test_hyphens_in_options(self):
        words = (
            '--source jsonl --path my-file --out x --format tokens --seq{0}length 16 --skip{0}bad=3 --max{0}document 9'
        )
        assert prepare.parse(words.format('-').split()) == prepare.parse(words.format('_').split())

    def test_codes(self, corpus, tmp_path, capsys):
        words = ['--source', 'jsonl', '--format', 'tokens', '--tokenizer', 'bytes', '--workers', '1']
        assert prepare.main([*words, '--path', f'{corpus}/none.gz', '--out', f'{tmp_path}/a']) == 4
        assert 'there is no file' in capsys.readouterr().err
        assert prepare.main([*words, '--path', f'{corpus}/*.gz', '--out', f'{tmp_path}/a']) == 0
        assert '--config.data.source=tokens' in capsys.readouterr().out

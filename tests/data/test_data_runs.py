"""Whole runs on prepared data: the path that C4 takes, a record that fails, what may not change, inspect."""

import json
import pathlib
import shutil
import time
import types

import numpy as np
import pytest
from corpora import write

from mixln_jax import config as configs
from mixln_jax import evaluate, main, recipes
from mixln_jax.analysis import angular
from mixln_jax.data import batches, datasets, inspect, prepared, sources, train_tokenizer
from mixln_jax.data.prepare import command as prepare
from mixln_jax.runs import log
from mixln_jax.system import signals
from mixln_jax.system.errors import DataError, Stopped, UsageError
from mixln_jax.training import hooks
from mixln_jax.training import meter as meter_module

WORDS = 'the quick brown fox jumps over one lazy dog and an evil queen'.split()  # noqa: SIM905


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """A JSONL file."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp('data') / 'c4.jsonl'
    return write(path, [f'{number} ' + ' '.join(rng.choice(WORDS, rng.integers(2, 12))) for number in range(120)])


@pytest.fixture(scope='module')
def dataset(corpus, tmp_path_factory):
    """A data_dir with c4/en in it."""
    out = tmp_path_factory.mktemp('tfds')
    prepare.prepare(configs.Data(source='jsonl', path=str(corpus)), str(out), format='tfds')
    return out


def tokens(corpus, out, mode, tokenizer_path=''):
    """A folder of prepared rows."""
    kind = 'huggingface' if tokenizer_path else 'bytes'
    data = configs.Data(source='jsonl', path=str(corpus), mode=mode, tokenizer=kind, tokenizer_path=tokenizer_path)
    prepare.prepare(data, str(out), format='tokens', seq_length=16)
    return out


def recipe(**changes):
    """A tiny network that reads c4/en, as the paper recipes do."""
    config = recipes.load(str(pathlib.Path(__file__).parents[2] / 'configs' / 'llama_9m.py'))
    config.batch_size, config.seq_length, config.num_steps, config.log_every = 8, 16, 6, 1
    config.compute_dtype, config.device = 'float32', 'cpu'
    config.model.update(vocab_size=300, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2)
    config.data.tokenizer, config.analysis.tokens = 'bytes', 0
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def lines_of(workdir):
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith('perf/')} for line in lines]


def stop_at(step, config, workdir):
    """Runs until a signal comes after `step`."""
    stop = signals.Stop()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(hooks.Evaluation, 'due', lambda self, number, last: number == step)
        patch.setattr(hooks.Evaluation, '__call__', lambda *args: setattr(stop, 'requested', 'SIGTERM'))
        main.run(config, workdir, stop)


@pytest.fixture
def seen(monkeypatch):
    """Every training batch that a run takes, in order."""
    taken, read = [], batches.read

    def watched(dataset, start, workers):
        for batch in read(dataset, start, workers):
            taken.append(batch)
            yield batch

    monkeypatch.setattr(batches, 'read', watched)
    return taken


class TestSources:
    def test_tokens_train_as_text_does(self, corpus, dataset, tmp_path):
        main.run(recipe(**{'data.data_dir': str(dataset)}), tmp_path / 'text')
        made = tokens(corpus, tmp_path / 'tokens', 'pad')
        main.run(recipe(**{'data.source': 'tokens', 'data.path': str(made)}), tmp_path / 'rows')
        assert lines_of(tmp_path / 'text') == lines_of(tmp_path / 'rows')
        shares = [line['train/real_token_frac'] for line in lines_of(tmp_path / 'text')]
        assert all(0.2 < share <= 15 / 16 for share in shares)

    @pytest.mark.parametrize('mode', ['pack', 'concat'])
    def test_modes_resume_exactly(self, corpus, tmp_path, mode):
        made = tokens(corpus, tmp_path / 'tokens', mode)
        config = recipe(**{'data.source': 'tokens', 'data.path': str(made), 'data.mode': mode})
        main.run(config, tmp_path / 'whole')
        stop_at(3, config, tmp_path / 'stopped')
        assert len(lines_of(tmp_path / 'stopped')) == 3
        main.run(config, tmp_path / 'stopped')
        assert lines_of(tmp_path / 'stopped') == lines_of(tmp_path / 'whole')

    def test_a_wait_for_data_is_told_once(self, dataset, tmp_path, monkeypatch, capsys):
        read = batches.read

        def slow(dataset, start, workers):
            for batch in read(dataset, start, workers):
                time.sleep(0.3)
                yield batch

        monkeypatch.setattr(batches, 'read', slow)
        monkeypatch.setattr(meter_module, 'PATIENCE', 0.5)
        main.run(recipe(**{'data.data_dir': str(dataset)}), tmp_path)
        [warning] = [line for line in capsys.readouterr().err.splitlines() if 'waiting for data' in line]
        assert 'data.workers' in warning and 'data.prepare' in warning

    @pytest.mark.parametrize('ready', [True, False])
    def test_a_wait_beside_a_running_step_is_none(self, ready):
        meter = object.__new__(meter_module.Meter)
        meter._window_wait = 0.0
        with meter.waiting((1, {'loss': types.SimpleNamespace(is_ready=lambda: ready)}, None)):
            time.sleep(0.01)
        assert (meter._window_wait >= 0.01) == ready and (meter._window_wait == 0) != ready


class TestAFailingRecord:
    def test_names_it_keeps_what_is_trained_and_goes_on_when_it_is_mended(self, dataset, tmp_path):
        data_dir = shutil.copytree(dataset, tmp_path / 'data')
        config = recipe(**{'data.data_dir': str(data_dir), 'num_steps': 12})
        main.run(config, tmp_path / 'whole')

        [shard] = (data_dir / 'c4/en/3.1.0').glob('c4-train*')
        whole = shard.read_bytes()
        for at in range(3000, len(whole), 97):  # until a flipped byte breaks just one record, and not an early one
            shard.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
            broken = unreadable(data_dir)
            places = np.arange(8)
            of = [
                s
                for s in range(2, 12)
                if len(broken) == 1 and broken[0] in batches.order(range(100), 0, s * 8 + places)
            ]
            if of:
                break
        [number], step = broken, of[0] + 1
        with pytest.raises(DataError, match=f'{shard.name}, record {number}: cannot be read'):
            main.run(config, tmp_path / 'run')
        assert [line['step'] for line in lines_of(tmp_path / 'run')] == list(range(1, step))
        assert (tmp_path / 'run' / 'checkpoints' / str(step - 1)).is_dir()
        shard.write_bytes(whole)
        main.run(config, tmp_path / 'run')
        both = [lines_of(tmp_path / name) for name in ('run', 'whole')]
        for line in sum(both, []):  # of all tokens that can be read, which became more
            del line['stability/entropy_distance']
        assert both[0] == both[1]


def unreadable(data_dir):
    """Numbers of the records that cannot be read; none where the damage shows before."""
    broken = []
    try:
        of = datasets.Dataset('c4/en', 'train', str(data_dir))
    except DataError:
        return broken
    for i in range(len(of)):
        try:
            of[i]
        except DataError:
            broken.append(i)
    return broken


@pytest.fixture(scope='module')
def stopped(dataset, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run')
    stop_at(2, recipe(**{'data.data_dir': str(dataset)}), workdir)
    return workdir


class TestRefusals:
    """A run goes on with the data that it has seen, or not at all."""

    @pytest.mark.parametrize(
        'key, value',
        [('data.mode', 'concat'), ('data.seed', 1), ('data.name', 'c4'), ('seq_length', 8), ('batch_size', 16)],
    )
    def test_configuration(self, dataset, stopped, tmp_path, key, value):
        workdir = shutil.copytree(stopped, tmp_path / 'run')
        with pytest.raises(UsageError, match=f'another configuration: {key} '):
            main.run(recipe(**{'data.data_dir': str(dataset), key: value}), workdir)

    def test_text(self, corpus, stopped, tmp_path):
        workdir = shutil.copytree(stopped, tmp_path / 'run')
        other = tmp_path / 'other.jsonl'
        other.write_text(corpus.read_text().replace('queen', 'kings'))
        prepare.prepare(configs.Data(source='jsonl', path=str(other)), str(tmp_path), format='tfds')
        with pytest.raises(UsageError, match='seen other data: data.fingerprint.source differs'):
            main.run(recipe(**{'data.data_dir': str(tmp_path)}), workdir)

    def test_vocabulary(self, corpus, dataset, tmp_path):
        for number, text in enumerate(['the quick brown fox', 'another text that has other pairs']):
            vocabulary = train_tokenizer.train([text] * 20, 262)
            (tmp_path / f'{number}.json').write_bytes(vocabulary)
        config = recipe(**{'data.data_dir': str(dataset), 'data.tokenizer': 'huggingface'})
        config.data.tokenizer_path = str(tmp_path / '0.json')
        stop_at(2, config, tmp_path / 'run')
        config.data.tokenizer_path = str(tmp_path / '1.json')
        with pytest.raises(UsageError, match='seen other data: data.fingerprint.tokenizer differs'):
            main.run(config, tmp_path / 'run')


def with_another_text(corpus, path, validation):
    """Writes the corpus with the first text of a split changed, so that it stays in the split."""
    texts = [json.loads(line)['text'] for line in corpus.read_text().splitlines()]
    ranks = sorted(sources.rank(text.encode()) for text in texts)
    low, high = (0, ranks[18]) if validation else (ranks[20], 2**64)  # the 20 of lowest rank are for validation
    inside = lambda text: low <= sources.rank(text.encode()) < high  # noqa: E731
    number = next(number for number, text in enumerate(texts) if inside(text))
    texts[number] = next(text for n in range(10**6) if inside(text := f'{n} {texts[number]}'))
    return write(path, texts)


class TestMovedData:
    """--data_path of evaluate, inspect and the analyses, whatever the source."""

    @staticmethod
    def make(kind, corpus, folder):
        """A folder of data; what names it."""
        if kind == 'tokens':
            return str(tokens(corpus, folder, 'pad'))
        if kind == 'tfds':
            prepare.prepare(configs.Data(source='jsonl', path=str(corpus)), str(folder), format='tfds')
            return str(folder)
        folder.mkdir()
        shutil.copy(corpus, folder)
        return f'{folder}/*.jsonl'

    @pytest.fixture(scope='class', params=['tfds', 'tokens', 'jsonl'])
    @classmethod
    def run(cls, request, corpus, tmp_path_factory):
        """(kind of source, folder of a run, where its data is now): nothing is left where the run found it."""
        kind, folder = request.param, tmp_path_factory.mktemp('moved')
        given = cls.make(kind, corpus, folder / 'old')
        key = 'data.data_dir' if kind == 'tfds' else 'data.path'
        main.run(recipe(**{'data.source': kind, key: given, 'num_steps': 2, 'eval.tokens': 100}), folder / 'run')
        (folder / 'old').rename(folder / 'new')
        return kind, folder / 'run', given.replace('/old', '/new')

    @staticmethod
    def commands(run, tmp_path):
        return {
            inspect.main: ['--workdir', str(run), '--step', '2'],
            evaluate.main: ['--checkpoint', str(run), '--out', str(tmp_path / 'out.json')],
            angular.main: ['--checkpoint', str(run), '--tokens', '50'],
        }

    def test_all_read_it_where_it_is_now(self, run, tmp_path, capsys):
        _, run, now = run
        for command, words in self.commands(run, tmp_path).items():
            capsys.readouterr()
            assert command(words) == 4
            assert 'where the data is now' in capsys.readouterr().err
            assert command([*words, '--data_path', str(tmp_path / 'none')]) == 4
            error = capsys.readouterr().err
            assert str(tmp_path / 'none') in error and '--data_path' in error and 'config.data' not in error
            assert command([*words, '--data_path', now]) == 0
        last, found = log.read_metrics(run / 'metrics.jsonl')[-1], json.loads((tmp_path / 'out.json').read_text())
        assert found['eval/loss'] == pytest.approx(last['eval/loss'], rel=1e-5)

    @pytest.mark.parametrize('changed', ['validation', 'train', 'train, as older runs know it'])
    def test_other_data_is_refused(self, run, corpus, tmp_path, capsys, changed):
        """A split by what the run has recorded of it; one that an older run has not, by the split it trained on."""
        kind, run, _ = run
        run = shutil.copytree(run, tmp_path / 'run')
        other = with_another_text(corpus, tmp_path / 'other.jsonl', changed == 'validation')
        now = self.make(kind, other, tmp_path / 'another')
        if changed.endswith('it'):
            about = json.loads((run / 'environment.json').read_text())
            del about['eval_data']
            (run / 'environment.json').write_text(json.dumps(about))
        codes = []
        for command, words in self.commands(run, tmp_path).items():
            capsys.readouterr()
            codes.append(command([*words, '--data_path', now]))
            if codes[-1]:
                assert f'the data is not what the run in {run} saw: source differs' in capsys.readouterr().err
        assert codes == {'validation': [0, 4, 4], 'train': [4, 0, 0]}.get(changed, [4, 4, 4])


def reverse(folder):
    """All rows of the folder, and their notes, in the order from the last to the first; each is whole."""
    for shards in prepared.description(str(folder))['splits'].values():
        for shard in shards:
            for name, size in (
                (shard['file'], 2 * 17),
                (prepared.notes_file(shard['file']), prepared.note(16).itemsize),
            ):
                content = (folder / name).read_bytes()
                end = shard['rows'] * size
                rows = [content[start : start + size] for start in range(0, end, size)]
                (folder / name).write_bytes(b''.join(reversed(rows)) + content[end:])


def exchange(folder):
    """The files of training and of validation, cut to equal sizes; tokens.json says that these sizes are right."""
    about = prepared.description(str(folder))
    [train], [validation] = about['splits'].values()
    number = train['rows'] = validation['rows']
    for name, size in (('bin', 2 * 17), ('rows', prepared.note(16).itemsize)):
        one, other = (folder / f'{split}-00000-of-00001.{name}' for split in ('train', 'validation'))
        seal = one.read_bytes()[-prepared.SEAL :] if name == 'rows' else b''
        content = one.read_bytes()[: number * size] + seal
        one.write_bytes(other.read_bytes())
        other.write_bytes(content)
    (folder / 'tokens.json').write_text(json.dumps(about))


@pytest.mark.parametrize('harm', [reverse, exchange])
def test_rows_in_the_place_of_others_are_refused_by_all(corpus, tmp_path, capsys, harm):
    made = tokens(corpus, tmp_path / 'tokens', 'pad')
    config = recipe(**{'data.source': 'tokens', 'data.path': str(made), 'eval.tokens': 100})
    stop_at(3, config, tmp_path / 'run')
    harm(made)
    with pytest.raises(DataError, match=r'/tokens/train-.*\.(bin, row \d+|rows): damaged, or '):
        main.run(config, tmp_path / 'run')
    capsys.readouterr()
    for command, words in TestMovedData.commands(tmp_path / 'run', tmp_path).items():
        assert command(words) == 4
        error = capsys.readouterr().err.splitlines()[-1]
        assert 'damaged, or ' in error and 'made the folder again' in error
    tokens(corpus, made, 'pad')
    main.run(config, tmp_path / 'run')
    main.run(config, tmp_path / 'whole')
    assert lines_of(tmp_path / 'run') == lines_of(tmp_path / 'whole')


class TestInspect:
    @pytest.mark.parametrize('mode', ['pad', 'pack', 'concat'])
    def test_shows_what_the_step_saw(self, corpus, tmp_path, seen, mode, capsys):
        made = tokens(corpus, tmp_path / 'tokens', mode)
        config = recipe(**{'data.source': 'tokens', 'data.path': str(made), 'data.mode': mode, 'data.seed': 5})
        main.run(config, tmp_path / 'run')
        training = seen[:6]
        for step in (1, 4, 6):
            shown = list(inspect.inspect(tmp_path / 'run', step))
            assert len(shown) == 8
            for name, values in training[step - 1].items():
                np.testing.assert_array_equal([row[name] for row in shown], values)
            assert all('train-00000-of-00001.bin, row ' in row['origin'] for row in shown)
        assert inspect.main(['--workdir', str(tmp_path / 'run'), '--step', '10000000', '--rows', '1', '--json']) == 0
        [row] = [line for line in capsys.readouterr().out.splitlines() if line.startswith('{')]
        assert json.loads(row)['row'] == 0

    def test_each_segment_has_its_text(self, corpus, tmp_path):
        made = tokens(corpus, tmp_path / 'tokens', 'pack')
        config = recipe(**{'data.source': 'tokens', 'data.path': str(made), 'data.mode': 'pack', 'num_steps': 1})
        main.run(config, tmp_path / 'run')
        counts = set()
        for row in inspect.inspect(tmp_path / 'run', 1):
            ids, segments = np.array([row['inputs'], row['segment_ids']])
            numbers = range(1, segments.max() + 1)
            assert row['text'] == [bytes(ids[(segments == n) & (ids < 256)].tolist()).decode() for n in numbers]
            counts.add(len(row['text']))
        assert max(counts) > 1

    def test_texts_are_the_documents(self, dataset, tmp_path, capsys):
        main.run(recipe(**{'data.data_dir': str(dataset), 'num_steps': 1}), tmp_path)
        of = datasets.Dataset('c4/en', 'train', str(dataset))
        for row in inspect.inspect(tmp_path, 3):
            number = int(row['origin'].rpartition(' ')[2])
            assert row['text'] == [of[number].encode()[:15].decode()]
        capsys.readouterr()
        assert inspect.main(['--workdir', str(tmp_path), '--step', '3', '--rows', '2']) == 0
        shown = capsys.readouterr().out
        assert shown.count('targets are real') == 2 and 'loss_mask   1*15 0' in shown

    def test_bad_input(self, dataset, tmp_path, capsys):
        data_dir = shutil.copytree(dataset, tmp_path / 'data')
        run = tmp_path / 'run'
        main.run(recipe(**{'data.data_dir': str(data_dir), 'num_steps': 1}), run)
        capsys.readouterr()
        other = write(tmp_path / 'other.jsonl', [f'other {i}' for i in range(120)])
        for words, code, message in (
            (['--workdir', str(tmp_path / 'none'), '--step', '1'], 2, 'none is not the folder of a run: it has no'),
            (['--workdir', str(run), '--step', '0'], 2, '--step counts from 1'),
            (['--workdir', str(run), '--step', 'x'], 2, '--step'),
            (['--workdir', str(run)], 2, '--step'),
            (['--workdir', str(run), '--step', str(10**21)], 2, 'is beyond any run'),
            (['--workdir', str(run), '--step', '1', '--rows', '-1'], 2, '--rows must be at least 0'),
        ):
            assert inspect.main(words) == code
            error = capsys.readouterr().err
            assert message in error and error.count('\n') == 1
        environment = (run / 'environment.json').read_text()
        (run / 'environment.json').write_text('{}')
        assert inspect.main(['--workdir', str(run), '--step', '1']) == 2
        assert 'does not tell what data the run saw' in capsys.readouterr().err
        (run / 'environment.json').write_text(environment)
        shutil.rmtree(data_dir)
        prepare.prepare(configs.Data(source='jsonl', path=str(other)), str(data_dir), format='tfds')
        capsys.readouterr()
        assert inspect.main(['--workdir', str(run), '--step', '1']) == 4
        assert 'the data is not what the run in' in capsys.readouterr().err

"""Whole runs in this process: records, exact resume at every point where a run can stop, and bad input."""

import argparse
import contextlib
import fcntl
import gzip
import itertools
import json
import math
import pathlib
import re
import shutil

import events
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from corpora import write

from mixln_jax import config as configs
from mixln_jax import main, replay
from mixln_jax.analysis import angular, drop, gradients, variance
from mixln_jax.data import batches
from mixln_jax.program.program import Program
from mixln_jax.runs import checkpoint, log
from mixln_jax.system import errors, signals
from mixln_jax.system.errors import DataError, DeviceError, NumericsError, Stopped, UsageError
from mixln_jax.tasks.language import Language
from mixln_jax.training import collapse, hooks

WORDS = 'the quick brown fox jumps over one lazy dog and an evil queen'.split()  # noqa: SIM905

NO_ANALYSES = {'analysis.tokens': 0}  # which are half of a small run's time


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    """A file shaped like C4's."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp('data') / 'c4-train.json.gz'
    return write(path, [' '.join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(120)])


def recipe(corpus, **changes):
    config = configs.default()
    config.batch_size, config.seq_length, config.num_steps, config.log_every = 8, 16, 7, 2
    config.compute_dtype, config.device, config.mesh.data = 'float32', 'cpu', 2
    config.model.update(
        vocab_size=259, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, scan_unroll='1'
    )
    config.data.update(source='jsonl', path=str(corpus), tokenizer='bytes')
    config.eval.update(every=3, tokens=10_000)  # all three batches of the validation split
    config.checkpoint.update(every=3, keep=2)
    config.analysis.update(every=3, tokens=50)
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def latest_step(workdir):
    return max(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())


def timeless(lines):
    """What must be bitwise equal: everything but speed."""
    return [{name: value for name, value in line.items() if not name.startswith('perf/')} for line in lines]


def weights_of(workdir, step):
    folder = workdir / 'checkpoints' / str(step) / 'state'
    return ocp.StandardCheckpointer().restore(folder)


def assert_same_run(workdir, other, last=7):
    assert timeless(lines_of(workdir)) == timeless(lines_of(other))
    jax.tree.map(np.testing.assert_array_equal, weights_of(workdir, last), weights_of(other, last))


@pytest.fixture(scope='module')
def finished(corpus, tmp_path_factory):
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp('runs') / 'whole'
    main.run(recipe(corpus), workdir)
    return workdir


class StopAfter(signals.Stop):
    """A signal that comes when the run looks for one the n-th time, wherever that is."""

    def __init__(self, looks):
        self.looks = looks
        super().__init__()

    @property
    def requested(self):
        self.looks -= 1
        return 'SIGTERM' if self.looks < 0 else None

    @requested.setter
    def requested(self, value):
        pass


class TestRecords:
    def test_metrics_lines(self, finished):
        lines = lines_of(finished)
        assert [line['step'] for line in lines] == [2, 3, 4, 6, 7]
        for line in lines:
            assert {'tokens', 'train/loss', 'train/grad_norm', 'train/learning_rate', 'perf/tokens_per_sec'} <= set(
                line
            )
            assert line['perf/mfu'] is None  # no peak is known for a CPU
            assert len(line['layers/grad_norm']) == 3
            assert line['train/positions_per_step'] == 8 * 16
            assert 0 < line['train/tokens_per_step'] <= 8 * 15
        assert [line['step'] for line in lines if 'eval/loss' in line] == [3, 6, 7]
        last = lines[-1]
        assert last['eval/perplexity'] == pytest.approx(math.exp(last['eval/loss']))
        assert last['eval/tokens'] > 100
        # One byte a token, but the end of a document is a token without bytes.
        assert last['eval/bits_per_byte'] > last['eval/loss'] / math.log(2)
        assert [line for line in lines if 'perf/compile_sec' in line] == lines[:1]
        assert last['tokens'] > lines[-2]['tokens']

    def test_config_and_environment(self, finished, corpus):
        config = json.loads((finished / 'config.json').read_text())
        assert config['model']['norm_position'] == ['post', 'pre', 'pre']
        assert (config['model']['layer_index'], config['model']['depth']) == ([1, 2, 3], 3)
        assert config['data']['path'] == str(corpus)
        environment = json.loads((finished / 'environment.json').read_text())
        assert environment['versions']['jax'] == jax.__version__
        assert environment['devices']['count'] == 2
        assert json.loads((finished / 'tokenizer' / 'tokenizer.json').read_text())['kind'] == 'bytes'

    def test_tensorboard_shows_what_the_lines_say(self, finished):
        scalars, images = events.read(finished)
        assert scalars == events.of_lines(lines_of(finished), pictures=['analysis/angular_matrix'])
        assert [step for step, _ in scalars['eval/loss']] == [3, 6, 7] and len(scalars['layers/grad_norm/003']) == 5
        assert {tag: [step for step, _ in shown] for tag, shown in images.items()} == {
            'analysis/angular_matrix': [3, 6, 7]
        }

    def test_only_the_newest_checkpoints_are_there(self, finished):
        assert sorted(path.name for path in (finished / 'checkpoints').iterdir()) == ['6', '7']  # 3 has been removed

    def test_again_says_already_finished(self, finished, corpus, capsys):
        before = lines_of(finished)
        main.run(recipe(corpus), finished)
        assert 'already finished' in capsys.readouterr().out
        assert lines_of(finished) == before

    def test_what_the_terminal_shows(self, corpus, tmp_path, capsys):
        changes = {'optim.warmup_ratio': 0.0, 'profile.start': 2, 'profile.steps': 9, 'eval.every': 1, **NO_ANALYSES}
        main.run(recipe(corpus, num_steps=2, log_every=1, **changes), tmp_path)
        shown, warned = capsys.readouterr()
        assert 'placement post x 1, pre x 2' in shown
        assert '\n14,928 parameters (--verbose lists them)\n' in shown and 'segment_1' not in shown
        assert 'step 2/2 100%' in shown
        table = log.summary_table(lines_of(tmp_path)[-1], ('post', 'pre', 'pre')).splitlines()
        assert len(table) == 5 and table[0].startswith('eval loss ') and shown.splitlines()[-7:-2] == table
        assert shown.endswith(f'are in {tmp_path}\nnext: python -m mixln_jax.report {tmp_path}\n')
        assert 'warm-up of about 10 %' in warned
        assert list((tmp_path / 'profile').rglob('*.xplane.pb'))

    def test_parameters_are_listed_where_asked_for(self, corpus, tmp_path, capsys):
        with pytest.raises(Stopped):
            main.run(recipe(corpus), tmp_path, StopAfter(3), verbose=True)
        shown = capsys.readouterr().out
        assert 'layers/segment_1/attention/q/kernel' in shown and '14,928 parameters\n' in shown

    def test_nothing_is_compiled_twice(self, corpus, tmp_path, caplog, programs):
        programs.clear()
        with jax.log_compiles():
            main.run(recipe(corpus), tmp_path)
        compiled = re.findall(r'Compiling jit\((\w+)\)', caplog.text)
        assert [compiled.count(name) for name in ('train_step', 'eval_step')] == [1, 1]
        analyses = angular._distances, drop._losses, gradients._gradient, gradients._norms, variance._sums
        assert all(compiled.count(of.__name__) <= 1 for of in analyses)  # some are kept from earlier runs


class TestResume:
    # Looks 0-3: start; 4-6: steps 1 to 3; 7-9: evaluation 3; 10-13: analyses 3; 14: after them; 15-25, 26-34 likewise.
    @pytest.mark.parametrize('looks', [3, 4, 6, 7, 10, 13, 14, 15, 24, 34])
    def test_a_signal_at_any_point_changes_nothing(self, corpus, finished, tmp_path, looks):
        """Wherever the run looks for a signal (start, compilation, step, evaluation, save) it may stop there."""
        with pytest.raises(Stopped):
            main.run(recipe(corpus), tmp_path, StopAfter(looks))
        main.run(recipe(corpus), tmp_path)
        assert_same_run(tmp_path, finished)

    def test_no_look_is_left_out(self, corpus, tmp_path):
        main.run(recipe(corpus), tmp_path, StopAfter(35))

    def test_stop_in_an_evaluation_keeps_the_step(self, corpus, finished, tmp_path, monkeypatch):
        stop = signals.Stop()
        evaluation = batches.evaluation

        def signal_then(*args, **sampled):  # which the analyses' rows are, at the start
            stop.requested = stop.requested if 'seed' in sampled else 'SIGINT'
            return evaluation(*args, **sampled)

        monkeypatch.setattr(batches, 'evaluation', signal_then)
        with pytest.raises(Stopped):
            main.run(recipe(corpus), tmp_path, stop)
        monkeypatch.undo()
        assert [line['step'] for line in lines_of(tmp_path)] == [2]  # step 3 is not complete
        assert (tmp_path / 'checkpoints' / '3').is_dir()
        main.run(recipe(corpus), tmp_path)
        assert_same_run(tmp_path, finished)

    def test_lines_behind_the_checkpoint_are_cut(self, corpus, finished, tmp_path):
        """What a kill leaves: lines of steps whose state is lost, the last one half written."""

        class Lost(hooks.Saving):
            def __call__(self, step, state, complete=True, wait=False):
                self.metrics.flush()
                if step == 6:
                    raise KeyboardInterrupt
                super().__call__(step, state, complete, wait)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(hooks, 'Saving', Lost)
            main.run(recipe(corpus), tmp_path)
        path = tmp_path / 'metrics.jsonl'
        assert lines_of(tmp_path)[-1]['step'] == 6
        path.write_text(path.read_text() + '{"step": 7, "tok')
        main.run(recipe(corpus), tmp_path)
        assert_same_run(tmp_path, finished)
        assert events.read(tmp_path)[0] == events.of_lines(lines_of(tmp_path), pictures=['analysis/angular_matrix'])

    def test_damaged_checkpoint_takes_the_one_before(self, corpus, finished, tmp_path, capsys):
        with pytest.raises(Stopped):
            main.run(recipe(corpus), tmp_path, StopAfter(16))
        latest = latest_step(tmp_path)
        assert latest > 3
        arrays = (tmp_path / 'checkpoints' / str(latest)).glob('state/d/*')
        largest = max(arrays, key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        main.run(recipe(corpus), tmp_path)
        assert f'{latest}.corrupt' in capsys.readouterr().err
        assert_same_run(tmp_path, finished)

    @pytest.mark.parametrize(
        'changes',
        [
            pytest.param({'accumulate': 2, 'mesh.fsdp': 2, **NO_ANALYSES}, marks=pytest.mark.slow),
            {'mesh.data': 8, 'data.workers': 1, 'log_every': 3, 'eval.every': 2, **NO_ANALYSES},
        ],
    )
    def test_what_may_change(self, corpus, finished, tmp_path, changes):
        with pytest.raises(Stopped):
            main.run(recipe(corpus), tmp_path, StopAfter(15))
        main.run(recipe(corpus, **changes), tmp_path)
        mine, theirs = lines_of(tmp_path)[-1], lines_of(finished)[-1]
        assert mine['tokens'] == theirs['tokens']
        assert mine['train/loss'] == pytest.approx(theirs['train/loss'], rel=1e-5)
        assert mine['eval/loss'] == pytest.approx(theirs['eval/loss'], rel=1e-5)

    @pytest.mark.slow
    def test_evaluation_sees_the_same_text_under_accumulation(self, corpus, tmp_path):
        changes = {'num_steps': 1, 'mesh.data': 1, 'eval.tokens': 60, 'checkpoint.every': 0, **NO_ANALYSES}
        ends = []
        for accumulate in (1, 4):
            workdir = tmp_path / str(accumulate)
            main.run(recipe(corpus, accumulate=accumulate, **changes), workdir)
            ends.append(lines_of(workdir)[-1])
        assert ends[0]['eval/tokens'] == ends[1]['eval/tokens'] < 150  # not the whole split
        assert ends[1]['eval/loss'] == pytest.approx(ends[0]['eval/loss'], rel=1e-6)

    def test_what_may_not_change_is_named(self, corpus, finished, tmp_path):
        changes = {'seed': 5, 'optim.learning_rate': 0.5, 'model.norm_position': 'pre', 'log_every': 1}
        with pytest.raises(UsageError) as error:
            main.run(recipe(corpus, **changes), finished)
        named = str(error.value)
        assert all(key in named for key in ('seed', 'optim.learning_rate', 'model.norm_position'))
        assert 'log_every' not in named and named.endswith('; give another --workdir')

    def test_other_data_is_refused(self, corpus, tmp_path):
        with pytest.raises(Stopped):
            main.run(recipe(corpus, **NO_ANALYSES), tmp_path / 'run', StopAfter(9))
        same = tmp_path / 'same.json.gz'
        same.write_bytes(corpus.read_bytes())
        other = tmp_path / 'other.jsonl'
        other.write_text(gzip.decompress(corpus.read_bytes()).decode().replace('queen', 'king'))
        with pytest.raises(UsageError, match='fingerprint'):
            main.run(recipe(other, **NO_ANALYSES), tmp_path / 'run')
        main.run(recipe(same, **NO_ANALYSES), tmp_path / 'run')  # another path, the same text


class TestErrorsInTraining:
    def test_a_last_save_that_is_not_what_was_saved(self, corpus, tmp_path, monkeypatch):
        wait = checkpoint.Checkpoints.wait

        def wait_and_damage(self):
            wait(self)
            for path in (tmp_path / 'run/checkpoints/7/state/d').iterdir():
                path.write_bytes(path.read_bytes()[::-1])

        monkeypatch.setattr(checkpoint.Checkpoints, 'wait', wait_and_damage)
        with pytest.raises(errors.CheckpointError, match='the last save cannot be read back: .*checkpoints/7'):
            main.run(recipe(corpus), tmp_path / 'run')

    @pytest.mark.parametrize('count', [0, 4])
    def test_what_was_trained_is_saved_whatever_reading_raises(self, corpus, finished, tmp_path, monkeypatch, count):
        read = batches.read

        def failing(dataset, start, workers):
            with contextlib.closing(read(dataset, start, workers)) as of:
                yield from itertools.islice(of, count)
            raise RuntimeError('a library of the reader')

        monkeypatch.setattr(batches, 'read', failing)
        workdir = tmp_path / 'run'
        with pytest.raises(RuntimeError, match='a library'):
            main.run(recipe(corpus, **{'eval.every': 0, 'analysis.every': 0}), workdir)
        monkeypatch.undo()
        assert workdir.exists() == (count > 0)  # a start that failed leaves no folder
        if count:
            assert latest_step(workdir) == count
            main.run(recipe(corpus), workdir)
            jax.tree.map(np.testing.assert_array_equal, weights_of(workdir, 7), weights_of(finished, 7))

    def test_exit_7(self, corpus, tmp_path, monkeypatch, capsys):
        """Of a step that finds no memory, as XLA says it."""

        def full(state, batch):
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.')

        options = argparse.Namespace(workdir=tmp_path, traceback=False, verbose=False)
        monkeypatch.setattr(Program, 'compile', lambda self: (full, None))
        monkeypatch.setattr(main, 'parse', lambda argv: (options, recipe(corpus, **NO_ANALYSES)))
        assert main.main([]) == 7
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith('mixln_jax: out of memory: lower batch_size') and '17179869184 bytes' in line


class TestBadSteps:
    def test_exit_6_leaves_debug_and_no_bad_checkpoint(self, corpus, tmp_path):
        changes = {'optim.learning_rate': 1e30, 'optim.warmup_ratio': 0.0, 'optim.name': 'sgd', 'checkpoint.every': 1}
        changes |= NO_ANALYSES
        with pytest.raises(NumericsError, match='step 2: the loss or a gradient is not finite') as error:
            main.run(recipe(corpus, **changes), tmp_path)
        assert error.value.code == 6
        report = json.loads((tmp_path / 'debug' / 'report.json').read_text())
        assert report['step'] == 2
        assert [step['step'] for step in report['steps']] == [1, 2]
        assert len(report['layers/weight_norm']) == len(report['steps'][0]['layers/grad_norm']) == 3
        assert np.load(tmp_path / 'debug' / 'batch_2.npz')['inputs'].shape == (8, 16)
        assert latest_step(tmp_path) == 1
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights_of(tmp_path, 1)))

    def test_the_bad_step_is_replayed(self, corpus, tmp_path, capsys, monkeypatch):
        """Row 5 of step 2 alone is bad; its micro-batch has the rows 1, 3, 5 and 7."""
        read = batches.read

        def poisoned(dataset, start, workers):
            for step, batch in enumerate(read(dataset, start, workers), start + 1):
                if step == 2:
                    batch = batch | {'loss_mask': batch['loss_mask'].copy()}
                    batch['loss_mask'][5, 0] = np.nan
                yield batch

        monkeypatch.setattr(batches, 'read', poisoned)
        for _ in range(2):  # run again it ends in the same way
            with pytest.raises(NumericsError, match='step 2: '):
                main.run(recipe(corpus, **{'accumulate': 2, 'mesh.data': 1, **NO_ANALYSES}), tmp_path)
        capsys.readouterr()
        assert replay.main(['--workdir', str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert 'weights of step 1, float32, 3 layers' in shown
        assert 'batch 2: loss not finite in rows 5\n' in shown
        assert 'the first number that is not finite: ' not in shown and shown.count('    3  pre ') == 2
        assert 'batch 1 came before these weights' in shown

    def test_a_collapsed_network(self, corpus, tmp_path, capsys, monkeypatch):
        """A network that learns nothing stays at ln 259, as a collapsed one stays at the tokens' entropy."""
        monkeypatch.setattr(Language, 'baseline', lambda *_: np.log(259))
        monkeypatch.setattr(collapse.Collapse, 'WINDOW', 20)
        changes = {'optim.learning_rate': 1e-9, 'num_steps': 25, 'log_every': 100, 'eval.every': 0, 'mesh.data': 1}
        changes |= NO_ANALYSES
        with pytest.raises(NumericsError, match='step 22: the mean loss of 10 steps, 5.5.*the network has collapsed'):
            main.run(recipe(corpus, **changes, collapse='stop'), tmp_path / 'stop')
        main.run(recipe(corpus, **changes), tmp_path / 'warn')
        assert capsys.readouterr().err.count('the network has collapsed') == 1

    def test_when_a_network_has_collapsed(self, capsys):
        asked = []
        seen = collapse.Collapse('stop', 10, lambda: asked.append(1) or 7.0)
        for step in range(1, 411):  # high in the warm-up, then learning
            seen.add(step, 9.0 if step <= 10 else 6.0)
        assert len(asked) == 1
        for step in range(411, 611):  # on its way through the tokens' entropy
            seen.add(step, 7.6 - 0.004 * (step - 410))
        for step in range(611, 811):  # nothing learnt at all
            seen.add(step, 10.0)
        with pytest.raises(NumericsError, match='step 1010: .*6.70, stays near 7.00'):
            for step in range(811, 1011):
                seen.add(step, 6.7)
        ignored = collapse.Collapse('ignore', 0, None)
        for step in range(1, 500):
            ignored.add(step, 9.0)

    def test_weights_that_the_last_update_ruined(self, corpus, tmp_path):
        """Finite, but no longer a model: no checkpoint, debug/, and never "finished"."""
        changes = {'optim.learning_rate': 1e30, 'optim.warmup_ratio': 0.0, 'num_steps': 1, **NO_ANALYSES}
        for _ in range(2):
            with pytest.raises(NumericsError, match='step 1: the evaluation loss is not finite'):
                main.run(recipe(corpus, **changes), tmp_path)
        assert json.loads((tmp_path / 'debug' / 'report.json').read_text())['step'] == 1
        assert not list((tmp_path / 'checkpoints').glob('[0-9]*'))


class TestBadInput:
    """One clear error before any compilation."""

    @pytest.fixture(autouse=True)
    def no_compilation(self, monkeypatch):
        monkeypatch.setattr(Program, 'compile', None)

    @pytest.mark.parametrize(
        'changes, kind, words',
        [
            (
                {'batch_size': 12, 'mesh.data': 8},
                UsageError,
                'batch_size=12 is not divisible by config.accumulate=1 times 8 parts',
            ),
            (
                {'accumulate': 2, 'mesh.data': 8},
                UsageError,
                'batch_size=8 is not divisible by config.accumulate=2 times 8',
            ),
            ({'mesh.data': 9}, UsageError, r'config.mesh.data=9, .* does not fit the 8 cpu devices'),
            ({'device': 'tpu'}, DeviceError, 'config.device=tpu: there is no such device'),
            ({'model.norm_position': 'foo'}, UsageError, "'foo' is not one of"),
            ({'model.norm_position': 'post*2'}, UsageError, 'lists 2 layers, config.model.num_layers is 3'),
            ({'model.vocab_size': 258}, UsageError, 'more than config.model.vocab_size=258'),
            ({'data.path': '/nope.jsonl'}, DataError, 'there is no file /nope.jsonl'),
            ({'data.source': 'tfds', 'data.data_dir': '/nope'}, DataError, 'there is no data set /nope/c4/en'),
        ],
    )
    def test_is_named(self, corpus, tmp_path, changes, kind, words):
        with pytest.raises(kind, match=words):
            main.run(recipe(corpus, **changes), tmp_path / 'runs/of mine')
        assert not list(tmp_path.iterdir())

    def test_a_start_that_fails_leaves_what_was_there(self, corpus, tmp_path, monkeypatch):
        """Also where it fails late, and what others put there in the meantime."""
        (tmp_path / 'empty').mkdir()
        (tmp_path / 'old/tokenizer').mkdir(parents=True)
        (tmp_path / 'old/notes').write_text('mine')
        before = sorted(tmp_path.rglob('*'))
        for folder in ('empty', 'old', 'new/run'):
            with pytest.raises(TypeError):  # compile is None
                main.run(recipe(corpus), tmp_path / folder)
        left = sorted(tmp_path.rglob('*'))
        assert left == before

        def another(*_):
            (tmp_path / 'shared/notes').write_text("another process's")
            raise TypeError

        monkeypatch.setattr(Program, 'compile', another)
        with pytest.raises(TypeError):
            main.run(recipe(corpus), tmp_path / 'shared')
        assert [path.name for path in (tmp_path / 'shared').iterdir()] == ['notes']

    def test_data_errors_name_file_and_line(self, corpus, tmp_path):
        bad = tmp_path / 'bad.jsonl'
        bad.write_text('{"text": "good"}\n{"text": 3}\n')
        with pytest.raises(DataError, match=r'bad\.jsonl:2'):
            main.run(recipe(bad), tmp_path / 'run')

    def test_unwritable_workdir(self, corpus, tmp_path):
        (tmp_path / 'file').write_text('')
        with pytest.raises(UsageError, match='cannot be used'):
            main.run(recipe(corpus), tmp_path / 'file' / 'run')

    def test_a_workdir_without_results_is_free(self, corpus, tmp_path):
        """A first try that failed before training must not bind the next one."""
        for seed in (0, 9):
            with pytest.raises(TypeError, match="'NoneType' object is not callable"):  # compile: all before it was fine
                main.run(recipe(corpus, seed=seed), tmp_path)

    def test_a_workdir_in_use(self, corpus, tmp_path):
        with (tmp_path / '.lock').open('w') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(UsageError, match='in use by another process'):
                main.run(recipe(corpus), tmp_path)

    def test_a_damaged_config_json(self, finished, corpus, tmp_path):
        workdir = shutil.copytree(finished, tmp_path / 'run')
        (workdir / 'config.json').write_text('[1]')
        with pytest.raises(UsageError, match=r'config\.json: not readable JSON: not a JSON object'):
            main.run(recipe(corpus), workdir)
        (workdir / 'config.json').unlink()
        shutil.rmtree(workdir / 'checkpoints' / '7')
        with pytest.raises(UsageError, match='seed'):  # the checkpoint knows its configuration too
            main.run(recipe(corpus, seed=9), workdir)

    @pytest.mark.parametrize('finished_too', [True, False])
    @pytest.mark.parametrize('change', ['gap', 'cut', 'deleted', 'other', 'twice', 'reversed'])
    def test_damaged_metrics_are_named(self, finished, corpus, tmp_path, change, finished_too):
        """Before anything is trained, and nothing is written."""
        workdir = shutil.copytree(finished, tmp_path / 'run')
        lines = (workdir / 'metrics.jsonl').read_text().splitlines(keepends=True)
        if not finished_too:
            shutil.rmtree(workdir / 'checkpoints/7')
        other = re.sub(r'"train/loss": [\d.]+', '"train/loss": 9.9', ''.join(lines))
        changed = {
            'gap': [lines[0], *lines[2:]],
            'cut': lines[:1],
            'other': [other],
            'twice': [*lines[:2], *lines[1:]],
            'reversed': lines[::-1],
        }
        if change == 'deleted':
            (workdir / 'metrics.jsonl').unlink()
        else:
            (workdir / 'metrics.jsonl').write_text(''.join(changed[change]))
        before = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob('*') if path.is_file())
        words = {'other': 'is not what the run has written', 'twice': r':3 is step', 'reversed': r':2 is step'}
        words = words.get(change, r' has \d lines before step')
        with pytest.raises(
            errors.CheckpointError, match=rf'metrics\.jsonl.*{words}.*; put the file back .*resume_from'
        ):
            main.run(recipe(corpus), workdir)
        left = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob('*') if path.is_file())
        assert [kept for kept in left if kept[0].name != '.lock'] == [
            kept for kept in before if kept[0].name != '.lock'
        ]

    def test_metrics_of_a_version_that_kept_no_seal(self, finished, corpus, tmp_path, monkeypatch):
        workdir = shutil.copytree(finished, tmp_path / 'run')
        about = checkpoint.Checkpoints.about
        monkeypatch.setattr(checkpoint.Checkpoints, 'about', lambda *at: about(*at) | {'metrics': None})
        main.run(recipe(corpus), workdir)  # already finished
        (workdir / 'metrics.jsonl').unlink()
        with pytest.raises(errors.CheckpointError, match='lacks the last step'):
            main.run(recipe(corpus), workdir)

    def test_damaged_records(self, corpus, tmp_path):
        (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
        with pytest.raises(errors.CheckpointError, match=r'metrics\.jsonl:2'):
            main.run(recipe(corpus), tmp_path)


def test_config_of_a_run_is_read_back(corpus, finished):
    read, built = configs.read(finished / 'config.json'), configs.build(recipe(corpus))
    assert read.model.norm_position == 'post,pre,pre'
    assert jax.tree.map(str, configs.flatten(read) | {'model.norm_position': 'mix'}) == jax.tree.map(
        str, configs.flatten(built)
    )


def test_command_line_prints_one_line_and_the_code(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quickstart = pathlib.Path(__file__).parents[1] / 'configs' / 'quickstart.py'
    for words, code in (
        (['--config', 'nope.py'], 2),
        (['--config', str(quickstart), '--config.device=tpu'], 3),
        (['--config', str(quickstart), '--config.data.source=text', '--config.data.path=nope'], 4),
    ):
        assert main.main(words) == code
        error = capsys.readouterr().err
        assert error.startswith('mixln_jax: ') and error.count('\n') == 1


def test_json_has_no_nan(tmp_path):
    metrics = log.Metrics(tmp_path)
    metrics.add(1, {'tokens': 3, 'a': math.nan, 'b': [math.inf, 1.0]})
    metrics.flush()
    metrics.close()
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"step": 1, "tokens": 3, "a": null, "b": [null, 1.0]}\n'

"""Runs that go on for longer than they were begun for: the run that had this length from the start, or a refusal."""

import itertools
import json
import re
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from corpora import write
from short_runs import WORDS, StopAtTwo, lines_of, recipe

from mixln_jax import config as configs
from mixln_jax import main
from mixln_jax.models import families
from mixln_jax.runs import weights
from mixln_jax.runs.best import best_step
from mixln_jax.runs.checkpoint_folders import steps
from mixln_jax.system.errors import NumericsError, Stopped, UsageError
from mixln_jax.tasks import build
from mixln_jax.tasks.language import Language, OfficialLanguage
from mixln_jax.training import feed, hooks

WSD = {'optim.schedule': 'wsd', 'optim.warmup_steps': 1, 'optim.decay_steps': 2}
CONSTANT = {'optim.schedule': 'constant', 'optim.warmup_steps': 1}
QUIET = {'eval.every': 0, 'eval.tokens': 20}


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp('data') / 'train.json.gz'
    return write(path, [' '.join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(120)])


def state_of(run, step):
    return ocp.StandardCheckpointer().restore(run / f'checkpoints/{step}/state')


def without_evaluations(lines):
    return [{name: value for name, value in line.items() if not name.startswith('eval/')} for line in lines]


def assert_same(run, other, last):
    """Bit for bit: weights, moments and counts; all lines but for the evaluation at the end of the shorter run."""
    jax.tree.map(np.testing.assert_array_equal, state_of(run, last), state_of(other, last))
    assert without_evaluations(lines_of(run)) == without_evaluations(lines_of(other))
    assert lines_of(run)[-1] == lines_of(other)[-1]


@pytest.mark.parametrize(
    'changes, length',
    [
        (CONSTANT, 4),
        pytest.param({'optim.schedule': 'constant', 'optim.warmup_ratio': 0.0}, 4, marks=pytest.mark.slow),
        (WSD, 6),
    ],
    ids=['constant', 'constant without warm-up', 'finished wsd'],
)
def test_extended_is_the_undisturbed_longer_run(corpus, tmp_path, capsys, changes, length):
    changes = {**changes, **QUIET}
    main.run(recipe(corpus, num_steps=8, **changes), tmp_path / 'long')
    main.run(recipe(corpus, num_steps=length, **changes), tmp_path / 'run')
    capsys.readouterr()
    main.run(recipe(corpus, num_steps=8, **changes), tmp_path / 'run')
    shown = capsys.readouterr()
    assert 'goes on from step 4\n' in shown.out
    assert_same(tmp_path / 'run', tmp_path / 'long', 8)
    assert json.loads((tmp_path / 'run/config.json').read_text())['num_steps'] == 8
    if length == 6:  # it had decayed
        assert 'goes back to step 4; checkpoint 6 is now 6.superseded' in shown.err
        assert (tmp_path / 'run/checkpoints/6.superseded/state').is_dir()
    main.run(recipe(corpus, num_steps=8, **changes), tmp_path / 'run')
    assert 'already finished (8 steps)' in capsys.readouterr().out


def test_a_plateau_that_a_signal_cut(corpus, tmp_path):
    """And a second one before the longer run has saved anything of its own."""
    changes = {**WSD, **QUIET, 'checkpoint.every': 0}
    main.run(recipe(corpus, num_steps=9, **changes), tmp_path / 'long')
    with pytest.raises(Stopped):
        main.run(recipe(corpus, num_steps=5, **changes), tmp_path / 'run', StopAtTwo())
    stop = main.stop.__class__()
    stop.requested = 'SIGTERM'
    with pytest.raises(Stopped):
        main.run(recipe(corpus, num_steps=9, **changes), tmp_path / 'run', stop)
    main.run(recipe(corpus, num_steps=9, **changes), tmp_path / 'run')
    assert_same(tmp_path / 'run', tmp_path / 'long', 9)


@pytest.fixture(scope='module')
def finished(corpus, tmp_path_factory):
    """{schedule: a run of four steps, with the published ratios}."""
    folder, runs = tmp_path_factory.mktemp('finished'), {}
    for schedule in ('cosine', 'linear', 'constant', 'wsd'):
        runs[schedule] = folder / schedule
        changes = {'optim.schedule': schedule, 'optim.warmup_ratio': 0.5, 'checkpoint.keep': 1, **QUIET}
        main.run(recipe(corpus, **changes), runs[schedule])
    return runs


REFUSED = [
    ('cosine', {}, 'update 1, which is done, would be 0.00025 (was 0.0005); give another --workdir with {resume}'),
    ('linear', {'warmup_steps': 2}, 'update 3, which is done, would be 0.00085 (was 0.00055); give another {resume}'),
    ('constant', {}, 'update 1, which is done, would be 0.00025 (was 0.0005); config.optim.warmup_steps=2 keeps its'),
    ('wsd', {'warmup_steps': 2}, 'update 4, which is done, would be 0.001 (was 0.0001); give another {resume}'),
    ('wsd', {}, 'update 1, which is done, would be 0.00025 (was 0.0005); give another {resume}'),
]


@pytest.mark.parametrize('schedule, changes, message', REFUSED)
def test_is_refused_where_a_rate_would_change(corpus, finished, schedule, changes, message):
    run = finished[schedule]
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    values = {'optim.schedule': schedule, 'optim.warmup_ratio': 0.5, **QUIET}
    values |= {f'optim.{name}': value for name, value in changes.items()}
    with pytest.raises(UsageError) as refused:
        main.run(recipe(corpus, num_steps=8, **values), run)
    text, said = str(refused.value), message.partition('{')[0].replace('--workdir with ', '')
    start = f'{run}: with config.num_steps=8 (was 4) the learning rate of '
    assert text.startswith(start + said) and text.count('\n') == 0
    if '{resume}' in message:
        assert text.endswith(f'--workdir with config.resume_from={run}, which may change the schedule')
    assert before.items() <= {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}.items()


@pytest.mark.parametrize(
    'changes, keys',
    [
        ({'num_steps': 3}, ['num_steps']),
        ({'num_steps': 8, 'seed': 1}, ['num_steps', 'seed']),
        ({'optim.warmup_steps': 2, 'optim.warmup_ratio': 0.0}, ['optim.warmup_ratio', 'optim.warmup_steps']),
    ],
)
def test_other_changes_stay_refused(corpus, finished, changes, keys):
    """A shorter run, another key with it, and other rates in as many steps."""
    values = {'optim.schedule': 'constant', 'optim.warmup_ratio': 0.5, **QUIET, **changes}
    with pytest.raises(UsageError, match='holds a run of another configuration') as refused:
        main.run(recipe(corpus, **values), finished['constant'])
    assert re.findall(r'([\w.]+) \(was ', str(refused.value)) == keys


def test_a_decay_from_a_stable_checkpoint(corpus, tmp_path, capsys):
    """The weights, moments and data of a run that was to decay there from the start.

    Bit for bit where no signs are measured: with them XLA compiles the two schedules to steps that round differently.
    """
    unsigned = QUIET | {'stability.every': 0}
    main.run(recipe(corpus, num_steps=8, **CONSTANT, **unsigned), tmp_path / 'stable')
    decay = {**WSD, **unsigned, 'num_steps': 6}
    main.run(recipe(corpus, **decay), tmp_path / 'whole')
    capsys.readouterr()
    main.run(recipe(corpus, resume_from=f'{tmp_path}/stable/checkpoints/4', **decay), tmp_path / 'decayed')
    assert 'learning rate was 0.001 in update 4, 0.00055 comes next' in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, *(state_of(tmp_path / run, 6) for run in ('decayed', 'whole')))
    assert lines_of(tmp_path / 'decayed') == lines_of(tmp_path / 'whole')[4:]
    rates = [line['train/learning_rate'] for line in lines_of(tmp_path / 'decayed')]
    np.testing.assert_allclose(rates, [5.5e-4, 1e-4], rtol=1e-6)  # by hand: from 1e-3 to a tenth in two steps


def test_other_schedules_from_a_stable_checkpoint(corpus, tmp_path):
    """A line from the peak in update 1 to 0 in update 6: rates by hand, and a signal on the way."""
    main.run(recipe(corpus, **CONSTANT, **QUIET), tmp_path / 'stable')
    linear = {'optim.schedule': 'linear', 'optim.warmup_steps': 1, 'optim.min_ratio': 0.0, 'num_steps': 6, **QUIET}
    linear['resume_from'] = str(tmp_path / 'stable')
    main.run(recipe(corpus, **linear), tmp_path / 'run')
    rates = [line['train/learning_rate'] for line in lines_of(tmp_path / 'run')]
    np.testing.assert_allclose(rates, [2e-4, 0.0], atol=1e-9)
    assert lines_of(tmp_path / 'run')[0]['step'] == 5


class TestEpochs:
    def test_resolved_from_the_rows(self, corpus, tmp_path, capsys):
        values = recipe(corpus, num_epochs=0.5, num_steps=0, **CONSTANT, **QUIET)
        main.run(values, tmp_path)
        [rows] = re.findall(r'epochs of ([\d,]+) rows', capsys.readouterr().out)
        expected = -(-int(rows.replace(',', '')) // 16)
        resolved = json.loads((tmp_path / 'config.json').read_text())
        assert (resolved['num_epochs'], resolved['num_steps']) == (0.5, expected) and expected > 4
        assert lines_of(tmp_path)[-1]['step'] == expected
        main.run(values, tmp_path)
        assert f'already finished ({expected} steps)' in capsys.readouterr().out
        assert weights.load(tmp_path).config.num_steps == expected

    def test_more_of_them_extend_a_run(self, corpus, tmp_path):
        changes = {**CONSTANT, **QUIET, 'num_steps': 0}
        main.run(recipe(corpus, num_epochs=0.25, **changes), tmp_path / 'run')
        first = lines_of(tmp_path / 'run')
        main.run(recipe(corpus, num_epochs=0.5, **changes), tmp_path / 'run')
        main.run(recipe(corpus, num_epochs=0.5, **changes), tmp_path / 'long')
        last = lines_of(tmp_path / 'run')[-1]['step']
        assert last == lines_of(tmp_path / 'long')[-1]['step'] > first[-1]['step']
        jax.tree.map(np.testing.assert_array_equal, *(state_of(tmp_path / run, last) for run in ('run', 'long')))


class TestKept:
    """Milestones, the clock and the best checkpoint."""

    def test_milestones_stay(self, corpus, tmp_path):
        changes = {'checkpoint.keep': 1, 'checkpoint.every': 1, 'checkpoint.keep_every': 3, 'num_steps': 8, **QUIET}
        with pytest.raises(Stopped):
            main.run(recipe(corpus, **changes), tmp_path, StopAtTwo())
        assert steps(tmp_path / 'checkpoints') == [2]
        main.run(recipe(corpus, **changes), tmp_path)
        assert steps(tmp_path / 'checkpoints') == [3, 6, 8]

    @pytest.mark.parametrize('interrupted', [False, True])
    def test_the_best_stays(self, corpus, tmp_path, monkeypatch, interrupted):
        losses = {1: 3.0, 2: 1.5, 3: 2.0, 4: 1.0, 5: 1.0, 6: 4.0, 7: 5.0}
        evaluated(monkeypatch, losses)
        changes = {'checkpoint.keep': 1, 'checkpoint.every': 0, 'checkpoint.best': 'eval/loss', 'eval.every': 1}
        changes |= {'num_steps': 7}
        if interrupted:
            with pytest.raises(Stopped):
                main.run(recipe(corpus, **changes), tmp_path, StopAtTwo())
            assert weights.find(tmp_path / 'best')[0].name == '2'
        main.run(recipe(corpus, **changes), tmp_path)
        assert steps(tmp_path / 'checkpoints') == [4, 7]
        found = weights.load(tmp_path / 'best')
        assert found.step == 4 and found.where.endswith('checkpoints/4')
        assert weights.load(tmp_path).step == 7

    def test_the_task_says_what_is_better(self):
        class Ranking(Language):
            lower = 'loss', 'wrong'

        def best(name, values, saved=(1, 2, 3, 4), task=Ranking):
            lines = [{'step': step, f'eval/{name}': value} for step, value in enumerate(values, 1)] + [{'step': 4}]
            return best_step(lines, f'eval/{name}', saved, task)

        values = 0.5, None, 0.7
        assert best('loss', values) == best('wrong', values) == 1
        assert best('f1', values) == best('loss_margin', values) == 3
        assert best('f1', values, [1, 2]) == 1 and best('f1', values, [2, 4]) is None
        for name in OfficialLanguage.lower:
            assert best(name, values, task=OfficialLanguage) == 1

    @pytest.mark.parametrize('compat', ['none', 'official'])
    def test_all_numbers_of_language_are_better_lower(self, compat):
        config = configs.Config(compat=compat)
        task = build.from_config(config, families.from_config(config.model))
        names = task.summary({'sum': 1.0, 'weight': 1.0, 'num_bytes': 1, 'batch_means': 1.0, 'batches': 1})
        assert names.keys() <= {*task.lower} and len(names) == 3 + (compat == 'official')

    def test_before_the_network_fell(self, corpus, tmp_path, monkeypatch):
        """An evaluation that is not finite ends the run with 6; the best checkpoint is not touched."""
        evaluated(monkeypatch, {1: 2.0, 2: 3.0, 3: float('nan')})
        changes = {'checkpoint.keep': 1, 'checkpoint.every': 1, 'checkpoint.best': 'eval/loss', 'eval.every': 1}
        with pytest.raises(NumericsError):
            main.run(recipe(corpus, **changes), tmp_path)
        assert steps(tmp_path / 'checkpoints') == [1, 2] and weights.find(tmp_path / 'best')[0].name == '1'

    def test_by_the_clock(self, corpus, tmp_path, monkeypatch):
        """With a clock that shows a minute more whenever it is read: at the start, every `log_every` steps up to the
        last one, and at each save."""
        minutes = itertools.count()
        monkeypatch.setattr(hooks, 'time', types.SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))
        saved = []
        save = hooks.Saving.__call__

        def saving(self, step, *rest, **more):
            saved.append(step)
            save(self, step, *rest, **more)

        monkeypatch.setattr(hooks.Saving, '__call__', saving)
        changes = {'checkpoint.every': 0, 'checkpoint.minutes': 2.0, 'num_steps': 12, 'log_every': 2, **QUIET}
        main.run(recipe(corpus, **changes), tmp_path)
        assert saved == [4, 8, 12]

    def test_no_best(self, corpus, finished, tmp_path):
        with pytest.raises(UsageError, match='keeps no best checkpoint'):
            weights.load(finished['constant'] / 'best')
        (tmp_path / 'checkpoints').mkdir()
        (tmp_path / 'config.json').write_text((finished['constant'] / 'config.json').read_text())
        values = json.loads((tmp_path / 'config.json').read_text())
        values['eval']['every'], values['checkpoint']['best'] = 1, 'eval/loss'
        (tmp_path / 'config.json').write_text(json.dumps(values))
        with pytest.raises(UsageError, match='no checkpoint of the run has eval/loss yet'):
            weights.load(tmp_path / 'best')


def evaluated(monkeypatch, losses):
    """Makes evaluations of a run return these losses, by step."""

    def evaluation(self, eval_step, examples):
        return lambda state: {
            'eval/loss': losses[int(state.step)], 'eval/perplexity': 1.0, 'eval/tokens': 1
        }  # fmt: skip

    monkeypatch.setattr(feed.Feed, 'evaluation', evaluation)


BAD = [
    ('optim.warmup_steps=4', 'config.optim.warmup_steps=4 must be below config.num_steps=4'),
    ('optim.warmup_steps=-1', 'config.optim.warmup_steps must be at least 0, not -1'),
    ('optim.warmup_steps=x', "config.optim.warmup_steps must be of type int, not 'x'"),
    ('optim.decay_steps=2', 'config.optim.decay_steps needs config.optim.schedule=wsd; cosine decays up to the last'),
    ('optim.schedule=wsd optim.decay_steps=4 optim.warmup_steps=1', 'config.optim.decay_steps=4 is more than the 3'),
    ('optim.schedule=constant optim.decay_steps=2', 'config.optim.decay_steps needs config.optim.schedule=wsd; const'),
    ('optim.schedule=wsd optim.decay_steps=-2', 'config.optim.decay_steps must be at least 0, not -2'),
    ('num_epochs=2', 'config.num_steps=4 and config.num_epochs=2 are both given; config.num_steps=0 leaves'),
    ('num_steps=0', 'config.num_steps must be at least 1 without config.num_epochs, not 0'),
    ('num_steps=0 num_epochs=-1', 'config.num_epochs must be at least 0, not -1'),
    ('num_steps=0 num_epochs=nan', 'config.num_epochs must be a finite number, not nan'),
    ('num_steps=0 num_epochs=inf', 'config.num_epochs must be a finite number, not inf'),
    ('num_steps=0 num_epochs=0.01 optim.warmup_steps=9', 'config.optim.warmup_steps=9 must be below config.num_steps'),
    ('checkpoint.keep_every=3', 'config.checkpoint.keep_every=3 must be a multiple of config.checkpoint.every=2'),
    ('checkpoint.keep_every=3 checkpoint.every=0', 'config.checkpoint.keep_every=3 must be a multiple of config'),
    ('checkpoint.keep_every=-2', 'config.checkpoint.keep_every must be at least 0, not -2'),
    ('checkpoint.minutes=-1', 'config.checkpoint.minutes must be at least 0, not -1'),
    ('checkpoint.minutes=nan', 'config.checkpoint.minutes must be a finite number, not nan'),
    ('expected.tasks=boolq', "config.expected.tasks: 'boolq' is not TASK=PER CENT, each task once"),
    ('expected.tasks=boolq=1,boolq=2', "config.expected.tasks: 'boolq=2' is not TASK=PER CENT"),
    ('expected.tasks=boolq=nan', "config.expected.tasks: 'boolq=nan' is not TASK=PER CENT"),
    ('expected.tasks=boolq=101', "config.expected.tasks: 'boolq=101' is not TASK=PER CENT"),
    ('checkpoint.best=eval/los', "config.checkpoint.best='eval/los' is no metric of the evaluation, which has eval/lo"),
    ('checkpoint.best=train/loss', "config.checkpoint.best='train/loss' is no metric of the evaluation"),
    ('checkpoint.best=eval/tokens', "config.checkpoint.best='eval/tokens' is no metric of the evaluation"),
    ('checkpoint.best=eval/loss eval.every=0', 'config.checkpoint.best needs evaluations during the run'),
]


@pytest.mark.parametrize('words, message', BAD)
def test_bad_values(corpus, tmp_path, capsys, words, message):
    """One line, exit code 2, and no folder."""
    file = tmp_path / 'short.py'
    file.write_text(
        'from mixln_jax import config\n\n\ndef get_config():\n    c = config.default()\n'
        '    c.batch_size, c.seq_length, c.num_steps, c.device = 8, 16, 4, "cpu"\n'
        '    c.model.update(vocab_size=259, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2)\n'
        f'    c.data.update(source="jsonl", path={str(corpus)!r}, tokenizer="bytes")\n'
        '    c.eval.every, c.checkpoint.every, c.mesh.data, c.analysis.tokens = 2, 2, 1, 0\n    return c\n'
    )
    command = ['--config', str(file), '--workdir', str(tmp_path / 'run')]
    assert main.main([*command, *(f'--config.{word}' for word in words.split())]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and error.startswith(f'mixln_jax: {message}') and not (tmp_path / 'run').exists()

"""Searches with Optuna, with cells that only pretend: what is proposed, pruned, counted, gone on with and refused."""

import json
import pathlib
import sys

import pytest
from short_runs import FILE as RECIPE
from short_runs import saved_config

from mixln_jax import sweep
from mixln_jax.runs import sweep_folder
from mixln_jax.sweeps import search, workers

pytest.importorskip('optuna')

# Perplexity grows with the distance of the rate from 1e-2. Once six cells have ended, one with a rate above 5e-2 waits
# after a bad evaluation; above 9e-2 a cell collapses.
PRETENDED = """
import json, math, pathlib, sys
words = dict(word.split('=', 1) for word in sys.argv if word.startswith('--config.'))
run = pathlib.Path(sys.argv[sys.argv.index('--workdir') + 1])
run.mkdir(exist_ok=True)
rate = float(words['--config.optim.learning_rate'])
value = 10 + abs(math.log10(rate) + 2)
(run / 'config.json').write_text(sys.argv[-1])
with open(run / 'metrics.jsonl', 'w') as lines:
    for step in (2, 4):
        bad = rate > 5e-2 and len([*run.parent.glob('cells/*.json')]) >= 6
        shown = 99.0 if bad else value
        lines.write(json.dumps({'step': step, 'tokens': 1, 'eval/loss': 1.0, 'eval/perplexity': shown}))
        lines.write(chr(10))
        lines.flush()
        if bad:
            sys.stdin.read()
            sys.exit(75)
if 0.09 < rate:
    print('mixln_jax: step 3: the network has collapsed', file=sys.stderr)
    sys.exit(6)
"""
SPACE = '--over', 'optim.learning_rate=log:1e-3..1e-1'


@pytest.fixture
def searching(tmp_path, monkeypatch):
    """Runs a search with processes that only pretend; returns a function words -> (exit code, definition)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'tiny.py').write_text(RECIPE)
    (tmp_path / 'pretended.py').write_text(PRETENDED)
    command = workers.Job.command

    def pretend(self, cell):
        return [sys.executable, 'pretended.py', *command(self, cell), json.dumps(saved_config(cell.config))]

    monkeypatch.setattr(workers.Job, 'command', pretend)
    monkeypatch.setattr(workers, 'POLL', 0.02)

    def run(*words):
        code = sweep.main(['--config', 'tiny.py', '--workdir', 'out', '--search', 'optuna', *words])
        folder = pathlib.Path('out')
        return code, sweep_folder.read_definition(folder) if folder.exists() else None

    return run


def test_a_search(searching):
    code, definition = searching(*SPACE, 'model.num_layers=2..4', '--over', 'deterministic=true,no', '--trials', '5')
    assert code == 0 and len(definition.cells) == 5
    assert definition.search['optim.learning_rate'] == 'log:1e-3..1e-1'
    for name, values in definition.cells.items():
        assert 1e-3 <= values['optim.learning_rate'] <= 1e-1 and values['model.num_layers'] in (2, 3, 4)
        assert f'learning_rate={values["optim.learning_rate"]},' in name
        assert type(values['deterministic']) is bool
    before = {*definition.cells}
    code, definition = searching(
        *SPACE, 'model.num_layers=2..4', '--over', 'deterministic=true,no', '--trials', '16', '--parallel', '2'
    )
    assert code == 0 and len(definition.cells) == 16 and before < {*definition.cells}
    best = min(definition.cells.values(), key=lambda values: abs(values['optim.learning_rate'] - 1e-2))
    assert 5e-3 < best['optim.learning_rate'] < 2e-2
    for name, values in definition.cells.items():
        ending = sweep_folder.read_ending(pathlib.Path('out') / name)
        assert ending.is_result and (ending.state == 'done' or values['optim.learning_rate'] > 5e-2)


def test_a_bad_cell_is_pruned_and_a_collapsed_one_counts_as_the_worst(searching):
    _, definition = searching('--over', 'optim.learning_rate=2e-3..2e-2', '--trials', '6')
    made = search.Search.study
    folder = pathlib.Path('out')
    worker = search.Search(
        workers.Job(folder.absolute(), 'tiny.py', ()),
        definition,
        search.parse_space([['optim.learning_rate=2e-3..2e-2']]),
        trials=6,
        parallel=1,
    )
    study = made(worker, definition)
    assert [trial.state.name for trial in study.trials] == ['COMPLETE'] * 6
    assert study.best_value == min(trial.value for trial in study.trials) < 10.7
    name = [*definition.cells][0]
    run = folder / name
    sweep_folder.write_ending(run, sweep_folder.Ending('collapsed', 6, 'x', 3))
    assert made(worker, definition).trials[0].state.name == 'PRUNED'
    assert not made(worker, definition).trials[0].intermediate_values
    sweep_folder.cell_file(folder, name, '.json').unlink()
    (run / 'metrics.jsonl').write_text('{"step": 2, "eval/perplexity": 99.0}\n')
    study = made(worker, definition)
    assert study.trials[0].state.name == 'RUNNING' and study.pruner.prune(study, study.trials[0])
    (run / 'metrics.jsonl').write_text('{"step": 2, "eval/perplexity": 1.0}\n')
    study = made(worker, definition)
    assert not study.pruner.prune(study, study.trials[0])


@pytest.mark.parametrize(
    'words, said',
    [
        ([], '--search optuna needs --over KEY=LOW..HIGH'),
        (['--over', 'optim.learning_rate=1e-3'], 'a search needs KEY=LOW..HIGH, KEY=log:LOW..HIGH or several values'),
        (['--over', 'optim.learning_rate=lin:1..2'], 'a search needs KEY=LOW..HIGH'),
        (['--over', 'optim.learning_rate=2..1'], '2 is not below 1'),
        (['--over', 'optim.learning_rate=1..nan'], 'a search needs KEY=LOW..HIGH'),
        (['--over', 'optim.learning_rate=log:0..1'], 'a logarithmic range begins above 0'),
        (['--over', 'optim.learning_rate=-1..1'], 'config.optim.learning_rate must be'),
        (['--over', 'optim.learning=0..1'], 'unknown key config.optim.learning'),
        (['--over', 'optim=0..1'], 'config.optim is a group of keys'),
        (['--over', 'model.num_layers=1.5..3'], 'whole numbers are needed'),
        (['--over', 'data.path=1..3'], 'config.data.path is not a number'),
        (['--over', 'model.norm_position=pre,prae'], "'prae'"),
        (['--over', 'seed=1..3', '--over', 'seed=1..2'], '--over: seed is given twice'),
        (['--over', 'seed=1..3', '--config.seed=1'], 'config.seed is given twice, by --config.seed and --over'),
        (['--over', 'seed=1..3', '--seeds', '2'], '--seeds has no meaning in a search'),
        (['--over', 'seed=1..3', '--parallel', '9'], '--parallel 9 is more than --trials 3'),
    ],
)
def test_refused(searching, capsys, words, said):
    assert searching('--trials', '3', *words) == (2, None)
    shown = capsys.readouterr().err
    assert said in shown and len(shown.splitlines()) == 1


def test_another_search(searching, capsys):
    assert searching(*SPACE, '--trials', '1')[0] == 0
    assert searching('--over', 'optim.learning_rate=1e-3..1e-1', '--trials', '1')[0] == 2
    said = 'it is a search over optim.learning_rate=log:1e-3..1e-1, not a search over optim.learning_rate=1e-3..1e-1;'
    assert said in capsys.readouterr().err
    assert sweep.main(['--config', 'tiny.py', '--workdir', 'out', '--over', 'optim.learning_rate=1e-3,2e-3']) == 2
    assert '=log:1e-3..1e-1, not a grid, without --search; give another' in capsys.readouterr().err
    pathlib.Path('out/sweep.json').unlink()
    assert searching(*SPACE, '--trials', '1')[0] == 2
    assert 'sweep.json is missing, and this command has no cell learning_rate=' in capsys.readouterr().err


def test_without_the_package(searching, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'optuna', None)
    assert searching(*SPACE, '--trials', '1') == (2, None)
    assert 'needs a package that is not installed: pip install optuna' in capsys.readouterr().err

"""Sweeps: cells, names, folders that grow or are refused, and the worker's loop with cells that only pretend."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from short_runs import FILE as RECIPE
from short_runs import saved_config

from mixln_jax import sweep
from mixln_jax.report import command as report
from mixln_jax.runs import sweep_folder
from mixln_jax.sweeps import definition, grid, workers
from mixln_jax.system.errors import UsageError
from mixln_jax.system.signals import Stop

# Acts like the process of a cell: trains nothing, and ends as the learning rate says.
PRETENDED = """
import json, os, pathlib, sys
words = dict(word.split('=', 1) for word in sys.argv if word.startswith('--config.'))
run = pathlib.Path(sys.argv[sys.argv.index('--workdir') + 1])
rate, wanted = words['--config.optim.learning_rate'], json.loads(os.environ['ENDS'])
run.mkdir(exist_ok=True)
with open(run / 'tries', 'a') as tries:
    tries.write('x')
code, line = wanted.get(rate, (0, ''))
(run / 'metrics.jsonl').write_text('{"step": 4, "eval/loss": 2.5}\\n')
(run / 'config.json').write_text(sys.argv[-1])
print('a line', flush=True)
print(line, file=sys.stderr)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'tiny.py').write_text(RECIPE)
    return tmp_path / 'tiny.py'


@pytest.fixture
def pretended(recipe, monkeypatch):
    """Runs `sweep` with processes that only pretend; returns a function words, ends -> (exit code, folder)."""
    (recipe.parent / 'pretended.py').write_text(PRETENDED)
    command = workers.Job.command

    def pretend(self, cell):
        words = [*command(self, cell)[3:], json.dumps(saved_config(cell.config))]
        return [sys.executable, str(recipe.parent / 'pretended.py'), *words]

    monkeypatch.setattr(workers.Job, 'command', pretend)
    monkeypatch.setattr(workers, 'POLL', 0.01)

    def run(*words, **ends):
        monkeypatch.setenv('ENDS', json.dumps({rate.replace('_', '-'): end for rate, end in ends.items()}))
        return sweep.main(['--config', 'tiny.py', '--workdir', 'out', *words]), recipe.parent / 'out'

    return run


def cells_of(recipe, *groups, seeds=0, fixed=()):
    changes = grid.combine(fixed, [{}], grid.parse_over(groups), seeds)
    return grid.make_cells(str(recipe), fixed, changes)


def test_a_product_of_values_and_seeds(recipe):
    cells = cells_of(recipe, ['model.norm_position=pre,post'], ['optim.learning_rate=1e-3,2e-3'], seeds=2)
    assert [cell.name for cell in cells] == [
        f'norm_position={name},learning_rate={rate},seed={seed}'
        for seed in (0, 1)
        for name in ('pre', 'post')
        for rate in ('1e-3', '2e-3')
    ]
    last = cells[-1].config
    assert (last.model.norm_position, last.optim.learning_rate, last.seed, last.data.seed) == ('post', 2e-3, 1, 1)


def test_keys_in_one_over_change_together(recipe):
    cells = cells_of(recipe, ['model.num_layers=2,3', 'optim.learning_rate=1e-3,2e-3'])
    assert [(cell.config.model.num_layers, cell.config.optim.learning_rate) for cell in cells] == [(2, 1e-3), (3, 2e-3)]


def test_names_of_values_that_no_folder_can_have(recipe):
    cells = cells_of(recipe, ['model.norm_position="post*2,pre",pre'], ['data.path=/a/b*,/a/b?'])
    assert [cell.name for cell in cells][::2] == ['norm_position=post-2-pre,path=-a-b-', 'norm_position=pre,path=-a-b-']
    assert cells[1].name.startswith('norm_position=post-2-pre,path=-a-b-~') and len({cell.name for cell in cells}) == 4


@pytest.mark.parametrize(
    'words, said',
    [
        (['--over', 'optim.learningrate=1'], 'unknown key config.optim.learningrate, did you mean '),
        (['--over', 'model=1,2'], 'config.model is a group of keys'),
        (['--over', 'optim.learning_rate=1e-3,-1'], 'optim.learning_rate=-1: config.optim.learning_rate must be above'),
        (['--over', 'optim.learning_rate=1e-3,x'], "config.optim.learning_rate must be of type float, not 'x'"),
        (['--over', 'optim.learning_rate=1e-3,'], "--over 'optim.learning_rate=1e-3,': value 2 of 2 is empty"),
        (['--over', 'model.norm_position=pre,prae'], "model.norm_position='prae'"),
        (['--over', 'model.num_heads=2,3'], 'cell model.num_heads=3: config.model.hidden_size=16 is not divisible'),
        (['--over', 'optim.learning_rate=1e-3,1e-3'], 'optim.learning_rate=1e-3 is given twice'),
        (['--over', 'optim.learning_rate=1e-3,0.001'], 'learning_rate=1e-3 and optim.learning_rate=0.001 are the same'),
        (['--over', 'model.norm_position=mix,"post,pre,pre"'], 'are the same run'),
        (['--over', 'model.num_layers=2,3', 'seed=1'], 'model.num_layers has 2, seed has 1'),
        (['--over', 'seed=1,2', '--over', 'seed=3'], '--over: seed is given twice'),
        (['--over', 'seed=1,2', '--seeds', '2'], 'config.seed is given twice, by --over and --seeds'),
        (['--over', 'seed=1,2', '--config.seed=1'], 'config.seed is given twice, by --config.seed and --over'),
        (['--over', 'seed'], "--over 'seed' is not KEY=V1,V2,..."),
        (['--over', 'seed='], "--over 'seed=' is not KEY=V1,V2,..."),
        (['--over', 'data.path="a'], 'a value with a comma stands in double quotes'),
        (['--over'], 'expected at least one argument'),
        ([], 'nothing varies'),
        (['--seeds', '0'], '--seeds must be at least 1, not 0'),
        (['--seeds', 'two'], "invalid int value: 'two'"),
        (['--seeds', '2', '--parallel', '3'], '--parallel 3 is more than the sweep has cells (2)'),
        (['--seeds', '2', '--parallel', '-1'], '--parallel must be at least 1'),
        (['--seeds', '2', '--trials', '2'], '--search optuna and --trials N are given together'),
        (['--seeds', '2', '--show', 'out'], '--config has no meaning with --show'),
        (['--seeds', '2', '--workdir', 'tiny.py'], '--workdir tiny.py cannot be used: Not a directory'),
        (['--seeds', '2', '--workdir', '.'], '--workdir . holds tiny.py but no sweep.json, so it is not'),
        (['--seeds', '2', '--workdir', ''], '--workdir is empty'),
        (['--seeds', '2', '--over', 'model.hidden=1,2'], 'unknown key config.model.hidden'),
        (['--seeds', '2', '--config', 'none.py'], '--config: there is no file none.py'),
    ],
)
def test_refused_in_one_line_before_anything_runs(recipe, capsys, monkeypatch, words, said):
    monkeypatch.setattr(subprocess, 'Popen', None)
    assert sweep.main(['--config', 'tiny.py', '--workdir', 'out', *words]) == 2
    shown = capsys.readouterr().err
    assert said in shown and len(shown.splitlines()) == 1 and shown.startswith('mixln_jax: ')
    assert {path.name for path in recipe.parent.iterdir()} <= {'tiny.py', '__pycache__'}


RATES = '--over', 'optim.learning_rate=1e-3,2e-3,3e-3'


def tries(folder):
    return {path.parent.name: len(path.read_text()) for path in folder.glob('*/tries')}


def test_every_end_of_a_cell(pretended, capsys):
    collapsed = 'mixln_jax: warning: step 300: the mean loss stays: the network has collapsed; try'
    code, out = pretended(
        *('--over', 'optim.learning_rate=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3,7e-3', '--parallel', '3'),
        **{
            '2e_3': (6, 'mixln_jax: step 12: the loss or a gradient is not finite; so'),
            '3e_3': (6, 'mixln_jax: step 250: the mean loss stays: the network has collapsed; so'),
            '4e_3': (0, collapsed),
            '5e_3': (2, 'mixln_jax: config.x is wrong'),
            '6e_3': (75, 'mixln_jax: stopped by SIGTERM'),
            '7e_3': (-9, ''),
        },
    )
    assert code == 137
    shown = capsys.readouterr()
    ended = {rate: sweep_folder.read_ending(out / f'learning_rate={rate}e-3') for rate in range(1, 8)}
    assert [ended[rate] and ended[rate].shown for rate in ended] == [
        *('done', 'not finite at 12', 'collapsed at 250', 'collapsed at 300', 'failed (2)', None, 'failed (137)')
    ]
    assert 'mixln_jax: cell learning_rate=5e-3: exit 2: mixln_jax: config.x is wrong' in shown.err
    assert 'killed by signal 9' in shown.err and '2 of 7 cells failed' in shown.err
    assert set(tries(out).values()) == {1}

    again = ('--over', 'optim.learning_rate=1e-3,2e-3,3e-3,4e-3,5e-3,6e-3,7e-3')
    assert pretended(*again, **{'5e_3': (4, 'mixln_jax: no text')})[0] == 4
    assert [tries(out)[f'learning_rate={rate}e-3'] for rate in range(1, 8)] == [1, 1, 1, 1, 2, 2, 2]
    assert '7 cells: 1 failed, 1 not finite, 2 collapsed, 3 done' in capsys.readouterr().out
    assert pretended(*again)[0] == 0 and sum(tries(out).values()) == 11


def test_a_sweep_grows(pretended, capsys):
    """With more values, with seeds, and with another key; cells that are there keep their names."""
    assert pretended(*RATES)[0] == 0
    code, out = pretended('--over', 'optim.learning_rate=0.001,4e-3', '--seeds', '2', '--parallel', '2')
    names = ['learning_rate=1e-3', 'learning_rate=2e-3', 'learning_rate=3e-3']
    more = ['learning_rate=0.001,seed=1', 'learning_rate=4e-3,seed=0', 'learning_rate=4e-3,seed=1']
    assert code == 0 and tries(out) == dict.fromkeys([*names, *more], 1)
    more = '--over', 'optim.learning_rate=4e-3', '--over', 'model.norm_position=mix,post'
    assert pretended(*more)[0] == 2
    assert 'leaves out seed, data.seed: give --seeds N too, or another --workdir' in capsys.readouterr().err
    assert pretended(*more, '--seeds', '1')[0] == 0
    made = sweep_folder.read_definition(out)
    assert [*made.cells][6:] == ['learning_rate=4e-3,norm_position=post,seed=0'] and len(tries(out)) == 7
    fewer = '--over', 'optim.learning_rate=7e-3', '--seeds', '1'
    assert pretended(*fewer)[0] == 2 and len(tries(out)) == 7
    assert 'leaves out model.norm_position: give --over model.norm_position=VALUE too' in capsys.readouterr().err
    assert made.keys == ('optim.learning_rate', 'seed', 'data.seed', 'model.norm_position')
    assert made.value('learning_rate=1e-3', 'model.norm_position') == 'mix'


@pytest.mark.parametrize(
    'words, said',
    [
        (
            ['--over', 'optim.clip_norm=1,2'],
            'leaves out optim.learning_rate: give --over optim.learning_rate=VALUE too',
        ),
        ([*RATES, '--config.num_steps=5'], 'holds another sweep: num_steps (was 4, is 5); give another --workdir'),
        ([*RATES, '--config.eval.tokens=5'], 'holds another sweep: eval.tokens (was 10000000, is 5)'),
        ([*RATES, '--config.device=auto'], ''),
    ],
)
def test_a_folder_of_another_sweep(pretended, capsys, words, said):
    assert pretended(*RATES)[0] == 0
    before = (pathlib.Path('out/sweep.json')).read_text()
    code, out = pretended(*words)
    assert code == (2 if said else 0) and said in capsys.readouterr().err
    assert (out / 'sweep.json').read_text() == before and set(tries(out).values()) == {1}


@pytest.mark.parametrize(
    'edit, said',
    [
        (lambda run: (run / 'metrics.jsonl').write_text('{"step": 4, "eval/loss": 1.5}\n'), 'it was edited since; rem'),
        (lambda run: (run / 'metrics.jsonl').unlink(), 'it is missing; remove out/learning_rate=2e-3 to train the'),
        (
            lambda run: (run / 'config.json').write_text('{'),
            ': line 1 column 2 (char 1); remove out/learning_rate=2e-3 to',
        ),
        (lambda run: change(run / 'config.json', seed=7), 'has seed=7, not 0; remove out/learning_rate=2e-3 to train'),
        (lambda run: (run / 'config.json').unlink(), 'has ended (done), but its config.json is missing; remove out/l'),
        (lambda run: shutil.rmtree(run) or run.write_text(''), 'out/learning_rate=2e-3 is a file where a folder of'),
        (lambda run: ending_of(run).write_text('[]'), 'of a sweep ended: not a JSON object; remove it, and the next'),
        (lambda run: ending_of(run).write_text('{"code": "x"}'), 'ended: state is missing; remove it, and the next tr'),
        (lambda run: change(ending_of(run), code='x'), 'code is not a whole number; remove it, and the next training'),
        (lambda run: change(ending_of(run), step='x'), 'step is not a whole number or null; remove it'),
        (lambda run: change(ending_of(run), state='well'), "state is 'well', not one of done, collapsed, not finite,"),
        (lambda run: change(ending_of(run), weight=1), "'weight' is unknown; remove it"),
        (lambda run: (run / '../sweep.json').write_text('{}'), 'sweep: config is missing; put back a good copy, or re'),
        (lambda run: (run / '../sweep.json').write_text('{'), 'column 2 (char 1); put back a good copy, or remove it'),
        (lambda run: change(run / '../sweep.json', cells=None), 'cells is not an object; put back a good copy, or rem'),
        (lambda run: change(run / '../sweep.json', cells={'../x': {}}), "'../x' is not a cell; put back a good copy"),
    ],
)
def test_a_folder_that_was_edited(pretended, capsys, edit, said):
    """Training, `--show` and a report name what is wrong and the way out; `--show` before it prints or writes."""
    assert pretended(*RATES)[0] == 0
    capsys.readouterr()
    edit(pathlib.Path('out/learning_rate=2e-3'))
    for command in (lambda: pretended(*RATES)[0], lambda: sweep.main(['--show', 'out'])):
        assert command() == 2
        shown = capsys.readouterr()
        error = shown.err.replace(f'{pathlib.Path().absolute()}/', '')
        assert said in error and error.count('\n') == 1 and not shown.out
    out = pathlib.Path('out')
    assert sum(tries(out).values()) <= 3 and not (out / 'results').exists()
    assert report.main(['out']) == 2 and said in capsys.readouterr().err


def ending_of(run):
    return sweep_folder.cell_file(run.parent, run.name, '.json')


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_cell_whose_folder_was_removed_is_trained_again(pretended, capsys, monkeypatch):
    """And meanwhile its old ending does not count."""
    assert pretended(*RATES)[0] == 0
    run = pathlib.Path('out/learning_rate=2e-3')
    shutil.rmtree(run)
    monkeypatch.setattr(workers, 'read_end', lambda *_: None)  # it is stopped
    assert pretended(*RATES)[0] == 75 and sweep_folder.read_ending(run) is None
    monkeypatch.undo()


def test_a_definition_that_is_missing(pretended, capsys):
    """The command that has all cells makes it anew."""
    code, out = pretended(*RATES)
    (out / 'results').mkdir()
    before = (out / 'sweep.json').read_text()
    (out / 'sweep.json').unlink()
    capsys.readouterr()
    assert sweep.main(['--show', 'out']) == 2
    assert 'cells of a sweep are there, but sweep.json is missing; put it back, or give' in capsys.readouterr().err
    assert pretended('--over', 'optim.learning_rate=1e-3,2e-3')[0] == 2
    shown = capsys.readouterr().err
    assert 'sweep.json is missing, and this command has no cell learning_rate=3e-3, which is there; put the' in shown
    assert not (out / 'sweep.json').exists()
    change(out / 'learning_rate=2e-3/config.json', num_steps=5)
    assert pretended(*RATES)[0] == 2 and 'was edited: config.json has num_steps=5' in capsys.readouterr().err
    change(out / 'learning_rate=2e-3/config.json', num_steps=4)
    assert pretended(*RATES)[0] == code == 0 and set(tries(out).values()) == {1}
    assert (out / 'sweep.json').read_text() == before
    assert 'sweep.json was missing; it is made anew, and 3 cells are there' in capsys.readouterr().out


@pytest.mark.parametrize(
    'words, said',
    [
        (['--show', 'out/results'], 'out/results is a file where a folder of the sweep belongs; remove or rename it'),
        (['--show', 'out/cells'], 'out/cells is a file where a folder of the sweep belongs; remove or rename it'),
        (['--show', 'out/results/results.csv'], 'results.csv cannot be written: Is a directory; remove or rename it'),
        (['--show', 'sweep.json'], '--show out/sweep.json is a file; give the folder of the sweep'),
    ],
)
def test_files_in_place_of_folders(recipe, capsys, words, said):
    out = pathlib.Path('out')
    out.mkdir()
    [cell] = cells_of(recipe, ['seed=1'])
    new = definition.new_definition('tiny.py', cell.values, ['seed'], [cell])
    sweep_folder.write_definition(out, new)
    option, path = words
    if path.endswith('csv'):
        pathlib.Path(path).mkdir(parents=True)
    elif path != 'sweep.json':
        pathlib.Path(path).write_text('')
    assert sweep.main([option, 'out/sweep.json' if path == 'sweep.json' else 'out']) == 2
    shown = capsys.readouterr()
    assert said in shown.err and shown.err.count('\n') == 1 and not shown.out
    if path == 'out/cells':
        assert sweep.main(['--config', 'tiny.py', '--workdir', 'out', '--over', 'seed=1']) == 2
        assert said in capsys.readouterr().err


def test_a_lock_that_was_left_in_an_empty_folder(pretended):
    pathlib.Path('out').mkdir()
    pathlib.Path('out/.lock').touch()
    assert pretended('--over', 'optim.learning_rate=1e-3')[0] == 0


def test_a_cell_that_another_worker_trains_is_left_to_it(pretended, capsys):
    assert pretended('--over', 'optim.learning_rate=1e-3,2e-3')[0] == 0
    lock = workers.outputs.hold(sweep_folder.cell_file(pathlib.Path('out'), 'learning_rate=3e-3', '.lock'))
    code, out = pretended(*RATES)
    assert code == 0 and len(tries(out)) == 2 and 'other workers train 1 of the cells' in capsys.readouterr().out
    lock.close()
    assert pretended(*RATES)[0] == 0 and len(tries(out)) == 3


def test_a_signal_stops_the_cells_and_the_sweep_goes_on(pretended, recipe, capsys, monkeypatch):
    """The cell here waits for the end of its input, as a real one does."""
    waiting = 'import sys; sys.stdin.read(); sys.exit(75)'
    command = workers.Job.command
    monkeypatch.setattr(workers.Job, 'command', lambda self, cell: [sys.executable, '-c', waiting])
    stop = Stop()
    cells = cells_of(recipe, RATES[1:])
    pathlib.Path('out/cells').mkdir(parents=True)

    def show(worker):
        if len(worker.running) == 2:
            stop.requested = 'SIGTERM'

    with pytest.raises(workers.errors.Stopped, match='stopped by SIGTERM'):
        job = workers.Job(pathlib.Path('out'), 'tiny.py', ())
        workers.Worker(job, cells, 2, show).work(stop)
    assert not list(pathlib.Path('out/cells').glob('*.json'))
    monkeypatch.setattr(workers.Job, 'command', command)
    pathlib.Path('out/cells').rename('old')
    assert pretended(*RATES)[0] == 0


def test_a_claim_lasts_until_worker_and_cell_have_both_ended(recipe, monkeypatch):
    """So nobody takes over a cell whose worker was killed while its process still saves."""
    monkeypatch.setattr(workers.Job, 'command', lambda self, cell: [sys.executable, '-c', 'input()'])
    [cell, *_] = cells_of(recipe, RATES[1:])
    pathlib.Path('cells').mkdir()
    path = sweep_folder.cell_file(pathlib.Path(), cell.name, '.lock')
    job, lock = workers.Job(pathlib.Path(), 'tiny.py', ()), workers.outputs.hold(path)
    running = workers.start(job, cell, lock, 0, None)
    lock.close()  # as the worker's death does
    assert workers.outputs.hold(path) is None
    running.stop()
    running.process.wait()
    assert workers.outputs.hold(path) is not None


def test_gpus_are_shared_by_the_processes_of_a_worker():
    assert workers.share_devices('0,1,2,3', 2) == ['0,1', '2,3']
    assert workers.share_devices(None, 2) == [None, None] and workers.share_devices('0,1', 1) == ['0,1']
    with pytest.raises(UsageError, match='--parallel 2: the 3 GPUs of CUDA_VISIBLE_DEVICES do not divide by it'):
        workers.share_devices('0,1,2', 2)


@pytest.mark.parametrize(
    'body, said',
    [
        ("yield {'seed': 1}\n    yield {'seed': 2}", ''),
        ("return [{'seed': 1}, {'seed': True}]", "config.seed must be of type int, not 'True'"),
        ('return []', 'tiny.py: sweep() yields no cell'),
        ('return None', 'tiny.py: TypeError: '),
        ('yield 3', 'tiny.py: sweep() yields 3, not a dict of keys and values'),
        (
            "yield {'optim.learning_rate': 1}",
            'is given twice, by --config.optim.learning_rate and sweep() of the recipe',
        ),
        ("yield {'sead': 1}", 'unknown key config.sead, did you mean seed?'),
        ('1 / 0', 'tiny.py:11: ZeroDivisionError: division by zero'),
    ],
)
def test_a_recipe_with_cells_of_its_own(pretended, recipe, capsys, body, said):
    recipe.write_text(f'{RECIPE}def sweep():\n    {body}\n')
    code, out = pretended('--config.optim.learning_rate=1e-3')
    assert code == (2 if said else 0) and said in capsys.readouterr().err
    assert {*tries(out)} == (set() if said else {'seed=1', 'seed=2'})

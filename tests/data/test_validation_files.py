"""Files of one's own to evaluate on, in place of a part of data.path."""

import json
import os

import pytest
import short_runs

from mixln_jax import config
from mixln_jax.data import rows, tokenizers
from mixln_jax.evaluation.loop import evaluate_run
from mixln_jax.runs import weights
from mixln_jax.system.errors import DataError, UsageError
from mixln_jax.training.run import run

BYTES = tokenizers.Bytes()
TASKS = {
    'language': lambda n: {'text': f'text {n}'},
    'instructions': lambda n: {'prompt': f'{n}', 'completion': 'yes'},
    'preference': lambda n: {'prompt': f'{n}', 'chosen': 'yes', 'rejected': 'no'},
    'online': lambda n: {'prompt': f'{n}', 'answer': 'yes'},
}


def write(path, make, numbers):
    path.write_text(''.join(json.dumps(make(number)) + '\n' for number in numbers))
    return str(path)


def data(path, validation, **changes):
    given = {'source': 'jsonl', 'path': path, 'validation_path': validation, 'tokenizer': 'bytes', 'template': 'plain'}
    return config.Data(**given | changes)


def task_of(name):
    return config.Task(name=name, online=config.Online(max_new_tokens=2))


def origins(keys, split, task):
    found = rows.open_rows(keys, split, BYTES, 32, 259, task)
    return [found.origin(number) for number in range(len(found))]


@pytest.mark.parametrize('name', TASKS)
def test_each_split_has_its_files(tmp_path, name):
    train, validation = (
        write(tmp_path / f'{part}.jsonl', TASKS[name], numbers)
        for part, numbers in (('train', range(30)), ('validation', range(30, 35)))
    )
    keys, task = data(train, validation), task_of(name)
    assert origins(keys, 'train', task) == [f'{train}:{line}' for line in range(1, 31)]
    assert origins(keys, 'validation', task) == [f'{validation}:{line}' for line in range(1, 6)]
    assert {*origins(keys, 'all', task)} == {*origins(keys, 'train', task), *origins(keys, 'validation', task)}
    assert rows.shared(keys, task) is None
    both = write(tmp_path / 'both.jsonl', TASKS[name], [50, 7, 8, 7])
    assert rows.shared(data(train, both), task) == (
        '2 of the 3 different records of config.data.validation_path are in config.data.path too, the first of them '
        f'{both}:2'
    )


def test_text_and_one_document(tmp_path):
    for name in ('a', 'b'):
        (tmp_path / f'{name}.txt').write_text(name * 3000)
    keys = data(str(tmp_path / 'a.txt'), str(tmp_path / 'b.txt'), source='text')
    for split, name in (('train', 'a'), ('validation', 'b')):
        assert origins(keys, split, task_of('language')) == [f'{tmp_path}/{name}.txt:1']


@pytest.mark.parametrize('name', TASKS)
@pytest.mark.parametrize(
    'changes, error, words',
    [
        ({'source': 'stdlib'}, UsageError, '(validation_path has no meaning for|online needs) config.data.source='),
        ({'held_out': 0.2}, UsageError, 'config.data.held_out=0.2 and config.data.validation_path are both given'),
        ({'validation_path': 'none'}, DataError, 'config.data.validation_path: there is no file none'),
    ],
)
def test_keys_that_contradict(tmp_path, name, changes, error, words):
    path = write(tmp_path / 'a.jsonl', TASKS[name], range(30))
    with pytest.raises(error, match=words):
        rows.open_rows(data(path, path, **changes), 'validation', BYTES, 32, 259, task_of(name))


def test_held_out_of_zero_agrees(tmp_path):
    path, other = (write(tmp_path / name, TASKS['instructions'], range(5)) for name in 'ab')
    assert len(origins(data(path, other, held_out=0.0), 'validation', task_of('instructions'))) == 5


@pytest.mark.parametrize('name', TASKS)
def test_one_file_in_both(tmp_path, name):
    path = write(tmp_path / 'a.jsonl', TASKS[name], range(30))
    os.symlink(path, tmp_path / 'b.jsonl')
    with pytest.raises(UsageError, match=f'config.data.path and config.data.validation_path both name {tmp_path}/b'):
        rows.shared(data(path, str(tmp_path / 'b.jsonl')), task_of(name))


def test_a_run_and_its_evaluation_elsewhere(tmp_path, capsys):
    train, validation = (
        write(tmp_path / name, TASKS['language'], range(20 * n, 20 * n + 21)) for n, name in [(0, 'a'), (1, 'b')]
    )
    run(short_runs.recipe(train, num_steps=1, **{'data.validation_path': validation}), tmp_path / 'run')
    assert 'warning: 1 of the 21 different records of config.data.validation_path' in capsys.readouterr().err
    [line] = short_runs.lines_of(tmp_path / 'run')
    os.rename(validation, tmp_path / 'moved')
    os.remove(train)
    again = evaluate_run(weights.load(tmp_path / 'run'), data_path=str(tmp_path / 'moved'))
    assert again['eval/tokens'] == line['eval/tokens'] and again['eval/loss'] == pytest.approx(line['eval/loss'])
    write(tmp_path / 'moved', TASKS['language'], range(30))
    with pytest.raises(DataError, match='not what the run in .* saw: source differs'):
        evaluate_run(weights.load(tmp_path / 'run'), data_path=str(tmp_path / 'moved'))

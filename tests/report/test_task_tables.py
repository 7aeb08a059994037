"""Accuracies of tasks beside the paper's."""

import json
import shutil

import pytest

from mixln_jax import config as configs
from mixln_jax.report import command as report

RESULTS = {'piqa': {'acc,none': 0.6, 'acc_stderr,none': 0.01}, 'boolq': {'acc,none': 0.5}, 'other': {'ppl,none': 3.0}}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with the paper's accuracies of two tasks."""
    monkeypatch.chdir(tmp_path)
    config = configs.default()
    config.model.num_layers, config.expected.tasks, config.expected.source = 1, 'boolq=56.12,piqa=66.34', 'a table'
    values = config.to_dict()
    values['model'] |= {'norm_position': ['pre'], 'layer_index': [1], 'depth': 1}
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/config.json').write_text(json.dumps(values))
    return tmp_path / 'run'


def test_beside_the_papers(run, tmp_path):
    (run / 'tasks.json').write_text(json.dumps({'results': RESULTS, 'n-shot': {'boolq': 5}, 'step': 7}))
    assert report.main([str(run)]) == 0
    lines = (tmp_path / 'report/report.md').read_text().splitlines()
    rows = [[word.strip() for word in line.split('|')[1:-1]] for line in lines if line.startswith('| run | ')]
    assert ['run', 'boolq', '50.00', '56.12', '-6.12', '5', '7', 'a table'] in rows
    assert ['run', 'piqa', '60.00 ± 1.00', '66.34', '-6.34', '-', '7', 'a table'] in rows
    assert ['run', 'average of 2', '55.00', '61.23', '-6.23', '-', '7', 'a table'] in rows
    assert not [row for row in rows if 'other' in row]


def test_runs_in_pairs(run, tmp_path):
    """By hand: differences of 0, 1, 1, -1 have the mean 1/4 and the variance 11/12 (n - 1 below)."""
    shutil.copytree(run, other := tmp_path / 'other')
    values = {'boolq': [0, 0, 0, 1], 'piqa': [1, 0]}, {'boolq': [0, 1, 1, 0], 'piqa': [1, 0, 1], 'arc': [1, 1]}
    for folder, of_run in zip((run, other), values, strict=True):
        documents = {task: {'acc,none': accuracies} for task, accuracies in of_run.items()}
        (folder / 'tasks.json').write_text(json.dumps({'results': RESULTS, 'documents': documents}))
    assert report.main([str(run), str(other)]) == 0
    lines = (tmp_path / 'report/report.md').read_text().splitlines()
    rows = [[word.strip() for word in line.split('|')[1:-1]] for line in lines]
    error = 100 * (11 / 12 / 4) ** 0.5
    assert ['other', 'boolq', f'+25.00 ± {error:.2f}', '4'] in rows
    assert not [row for row in rows if row[:2] == ['other', 'piqa'] and row[-1] in '23']  # other documents
    assert any('Accuracy minus that of run in per cent' in line for line in lines)


@pytest.mark.parametrize('documents', [3, {'boolq': 1}, {'boolq': {'acc,none': [1, 'x']}}, {'boolq': {'acc,none': 1}}])
def test_malformed_documents_give_no_pairs(run, tmp_path, documents):
    shutil.copytree(run, other := tmp_path / 'other')
    for folder in (run, other):
        (folder / 'tasks.json').write_text(json.dumps({'results': RESULTS, 'documents': documents}))
    assert report.main([str(run), str(other)]) == 0
    assert 'minus that of' not in (tmp_path / 'report/report.md').read_text()


def test_the_error_of_the_average(run, tmp_path):
    """By hand: of independent tasks, 5 = √(3² + 4²) per cent over their number; unknown where one is."""
    results = {'piqa': {'acc,none': 0.6, 'acc_stderr,none': 0.03}, 'boolq': {'acc,none': 0.5, 'acc_stderr,none': 0.04}}
    (run / 'tasks.json').write_text(json.dumps({'results': results}))
    assert report.main([str(run)]) == 0
    assert '| average of 2 | 55.00 ± 2.50 | 61.23 |' in (tmp_path / 'report/report.md').read_text()


@pytest.mark.parametrize('content', ['[1]', '{"results": 3}', '{"results": {"a": [1], "b": {"acc,none": "x"}}}', '{'])
def test_malformed(run, capsys, content):
    """A file that is no JSON object is named with exit code 5; one without accuracies gives no table."""
    (run / 'tasks.json').write_text(content)
    code, error = report.main([str(run)]), capsys.readouterr().err
    assert 'internal' not in error and (code == 0 or (code == 5 and 'tasks.json' in error))

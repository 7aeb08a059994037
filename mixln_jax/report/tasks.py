"""The section of a report that compares accuracies of tasks with those of a paper and between runs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mixln_jax import config as configs
from mixln_jax.report.inputs import Run
from mixln_jax.report.numbers import number
from mixln_jax.report.page import Section, Table, without_empty_columns

ACCURACY = 'acc,none'  # as the lm-evaluation-harness calls it
HEAD = ('run', 'task', 'accuracy', 'paper', 'difference', 'examples shown', 'step', 'source')
PAIR_HEAD = 'run', 'task', 'difference', 'documents'


def task_section(runs: Sequence[Run]) -> Section | None:
    """Returns the section of the tasks on which runs were evaluated; None if none was."""
    rows = [row for run in runs for row in _rows(run)]
    if not rows:
        return None
    caption = 'Accuracy in per cent, from tasks.json in the folder of a run, and the value of the paper'
    tables = [Table(caption, *without_empty_columns(HEAD, rows))]
    if pairs := list(_pairs(runs)):
        caption = f'Accuracy minus that of {runs[0].name} in per cent, on the same documents, in pairs'
        tables.append(Table(caption, PAIR_HEAD, pairs))
    return Section('Tasks', tables=tuple(tables))


def paired_difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of `other` - `one`, values of the same documents, and its standard error over documents."""
    difference = np.asarray(other, np.float64) - np.asarray(one, np.float64)
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def _pairs(runs: Sequence[Run]) -> Iterator[tuple[str, ...]]:
    """Yields the rows of the second table: runs against the first one, in tasks of which both have all documents."""
    first, *others = [_documents(run) for run in runs]
    for run, documents in zip(runs[1:], others, strict=True):
        for task in sorted(first.keys() & documents.keys()):
            if len(first[task]) == len(documents[task]) > 1:
                mean, error = paired_difference(first[task], documents[task])
                yield run.name, task, f'{100 * mean:+.2f} ± {100 * error:.2f}', f'{len(first[task]):,}'


def _documents(run: Run) -> dict[str, list[float]]:
    """Returns {task: the accuracy of every document}, of tasks of which it is known."""
    documents = run.tasks.get('documents')
    if not isinstance(documents, Mapping):
        return {}
    listed = {task: one.get(ACCURACY) for task, one in documents.items() if isinstance(one, Mapping)}
    values = {task: [*map(number, one)] for task, one in listed.items() if isinstance(one, list)}
    return {task: one for task, one in values.items() if np.isfinite(one).all()}


def _rows(run: Run) -> Iterator[tuple[str, ...]]:
    """Yields the rows of a run: its tasks, in the paper's order first, and the average of those that the paper has."""
    paper, results = configs.task_accuracies(run.config.expected.tasks), run.tasks.get('results')
    if not isinstance(results, Mapping):
        return
    values = {task: 100 * number(one.get(ACCURACY)) for task, one in results.items() if isinstance(one, Mapping)}
    values = {task: value for task, value in values.items() if np.isfinite(value)}
    for task in sorted(values, key=lambda task: [*paper, *values].index(task)):
        error = 100 * number(results[task].get('acc_stderr,none'))
        yield _row(run, task, values[task], paper.get(task), error)
    if len(paper) > 1 and paper.keys() <= values.keys():
        mean, their_mean = (float(np.mean([one[task] for task in paper])) for one in (values, paper))
        errors = [100 * number(results[task].get('acc_stderr,none')) for task in paper]
        error = float(np.linalg.norm(errors)) / len(errors)
        yield _row(run, f'average of {len(paper)}', mean, their_mean, error)


def _row(run: Run, task: str, value: float, paper: float | None, error: float = np.nan) -> tuple[str, ...]:
    shots: Any = run.tasks.get('n-shot')
    return (
        run.name,
        task,
        f'{value:.2f}' + (f' ± {error:.2f}' if np.isfinite(error) else ''),
        '-' if paper is None else f'{paper:.2f}',
        '-' if paper is None else f'{value - paper:+.2f}',
        f'{shots[task]}' if isinstance(shots, Mapping) and task in shots else '-',
        f'{run.tasks.get("step") or "-"}',
        run.config.expected.source or '-',
    )

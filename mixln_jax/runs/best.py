"""The best checkpoint of a run, by a metric of its evaluations."""

import pathlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mixln_jax import config as configs
from mixln_jax.runs import log
from mixln_jax.runs.checkpoint_folders import steps
from mixln_jax.system.errors import UsageError, nearest
from mixln_jax.tasks.build import TASKS
from mixln_jax.tasks.task import Task

NAME = 'best'  # `<run>/best` stands for the folder of the best checkpoint


def check_metric(metric: str, task: Task) -> None:
    """Raises UsageError if evaluations of a task do not log `config.checkpoint.best`."""
    totals = dict.fromkeys(('sum', 'weight', 'num_bytes', *task.metrics), 1.0)
    known = [f'eval/{name}' for name, value in task.summary(totals).items() if value is not None]
    if metric and metric not in known:
        raise UsageError(
            f'config.checkpoint.best={metric!r} is no metric of the evaluation, which has {", ".join(known)}'
            f'{nearest(metric, known)}'
        )


def best_step(
    lines: Iterable[Mapping[str, Any]], metric: str, saved: Collection[int], task: Task | type[Task]
) -> int | None:
    """Returns the saved step at which `metric` of a task was best, of equal ones the first; None if it was never logged
    there."""
    values = {line['step']: line[metric] for line in lines if line['step'] in saved and line.get(metric) is not None}
    choose = min if metric.removeprefix('eval/') in task.lower else max
    return choose(values, key=values.__getitem__, default=None)


def best_folder(run: pathlib.Path) -> pathlib.Path:
    """Returns `<run>/checkpoints/<step>` of the best checkpoint of a run.

    Raises UsageError if the run keeps none, or has not evaluated any that it keeps.
    """
    config = configs.read(run / 'config.json')
    metric, task = config.checkpoint.best, TASKS[config.task.name]
    if not metric:
        raise UsageError(f'{run / NAME}: the run keeps no best checkpoint (config.checkpoint.best is empty)')
    step = best_step(log.read_metrics(run / 'metrics.jsonl'), metric, steps(run / 'checkpoints'), task)
    if step is None:
        raise UsageError(f'{run / NAME}: no checkpoint of the run has {metric} yet')
    return run / 'checkpoints' / str(step)

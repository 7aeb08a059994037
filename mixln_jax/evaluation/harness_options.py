"""Command-line options of the lm-evaluation-harness."""

import argparse
import pathlib
from collections.abc import Callable
from typing import Any

from mixln_jax.runs.weights import Weights
from mixln_jax.system import cli
from mixln_jax.system.errors import UsageError

# Options that are allowed only without, or only with, --tasks.
OF_TEXT, OF_TASKS = ('split', 'tokens', 'data_path'), ('task_path', 'limit', 'num_fewshot')


def add_task_options(add: Callable[..., Any]) -> None:
    """Adds the options that `open_harness` reads; `add` is a parser's add_argument."""
    add('--tasks', metavar='TASK,...', help='tasks of the lm-evaluation-harness: arc_easy,hellaswag')
    add('--task_path', metavar='DIR', help='YAML files that define more tasks')
    add('--limit', type=count_or_share, metavar='N', help='documents of each task, or a share below 1 of them [all]')
    add('--num_fewshot', type=int, metavar='N', help='examples before each document [set by the task]')


def count_or_share(text: str) -> int | float:
    """Returns a number of documents, or a share of them below 1. Raises ValueError for any other text."""
    value = cli.finite(text)
    return value if 0 < value < 1 else cli.integer(text)


def open_harness(options: argparse.Namespace) -> Callable[[Weights], tuple[Any, Callable[[], Any]]] | None:
    """Opens the tasks of the options that `add_task_options` has added.

    Returns:
        A function from Weights to (Harness, evaluate), where `evaluate()` returns the result of `harness.run`. None
        without --tasks.

    Raises:
        UsageError: an option is out of range or needs --tasks, lm_eval is not installed, a task is unknown.
        DataError: a task cannot be read.
    """
    for name, least in (('limit', 1), ('num_fewshot', 0)):
        value = getattr(options, name)
        if value is not None and value < least and not isinstance(value, float):
            raise UsageError(f'--{name} must be at least {least}')
    if not options.tasks:
        for name in OF_TASKS:
            if getattr(options, name) is not None:
                raise UsageError(f'--{name} has no meaning without --tasks')
        return None
    names = cli.split_list(options.tasks)
    if not names:
        raise UsageError(f'--tasks {options.tasks!r} names no task')
    if options.task_path and not pathlib.Path(options.task_path).is_dir():
        raise UsageError(f'--task_path {options.task_path} is not a folder')
    try:
        from mixln_jax.evaluation import harness  # imported only with --tasks: it needs lm_eval
    except ModuleNotFoundError as error:
        if (error.name or '').partition('.')[0] != 'lm_eval':
            raise
        raise UsageError('--tasks needs the lm-evaluation-harness: pip install lm_eval') from error
    manager = harness.open_tasks(names, options.task_path)

    def on_weights(weights: Weights) -> tuple[Any, Callable[[], Any]]:
        model = harness.Harness(weights, options.batch_size or 32)
        return model, lambda: harness.run(model, manager, names, options.limit, options.num_fewshot)

    return on_weights

"""Options of the lm-evaluation-harness."""

import pathlib

from mixln_jax.system import cli
from mixln_jax.system.errors import UsageError

# Options without and with --tasks.
OF_TEXT, OF_TASKS = ('split', 'tokens', 'data_path'), ('task_path', 'limit', 'num_fewshot')


def add_task_options(add):
    """Options for `open_harness`."""
    add('--tasks', metavar='TASK,...', help='tasks of the lm-evaluation-harness: arc_easy,hellaswag')
    add('--task_path', metavar='DIR', help='YAML files that define more tasks')
    add('--limit', type=count_or_share, metavar='N', help='documents of each task, or a share below 1 of them [all]')
    add('--num_fewshot', type=int, metavar='N', help='examples before each document [what the task says]')


def count_or_share(text):
    """How many documents: an integer, or a share of them. Raises ValueError for any other text."""
    value = cli.finite(text)
    return value if 0 < value < 1 else cli.integer(text)


def open_harness(options):
    """Opens the tasks that `add_task_options` names: a function of Weights that gives (Harness, evaluate).

    `evaluate()` gives what `harness.run` does. None without --tasks.

    Raises UsageError for options out of range or without --tasks, where lm_eval is not installed, and as
    `harness.open_tasks`; the function as `Harness`.
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
        from mixln_jax.evaluation import harness  # not for those who need no tasks
    except ModuleNotFoundError as error:
        if error.name.partition('.')[0] != 'lm_eval':
            raise
        raise UsageError('--tasks needs the lm-evaluation-harness: pip install lm_eval') from error
    manager = harness.open_tasks(names, options.task_path)

    def of(found):
        model = harness.Harness(found, options.batch_size or 32)
        return model, lambda: harness.run(model, manager, names, options.limit, options.num_fewshot)

    return of

"""What `python -m mixln_jax.sweep` does: it trains the cells of a grid or a search."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.runs import sweep_cells, sweep_folder
from mixln_jax.sweeps import definition, grid, search
from mixln_jax.sweeps.grid import Cell, Pairs
from mixln_jax.sweeps.progress import Progress
from mixln_jax.sweeps.workers import Job, Worker
from mixln_jax.system import console, errors, signals
from mixln_jax.system.errors import UsageError


def train(options: argparse.Namespace, fixed: Pairs, stop: signals.Stop) -> int:
    """Trains the cells of a sweep that are free; returns the exit code: 0 if each has a result or is another worker's.

    Raises UsageError, before anything runs, for options, keys, values, cells or a folder that cannot be used.
    """
    job = Job(definition.check_folder(options.workdir), options.config, fixed)
    with stop.may_interrupt():
        worker = open_search(options, job) if options.search else open_grid(options, job)
    worker.work(stop)
    return summary(worker, options.workdir)


def open_grid(options: argparse.Namespace, job: Job) -> Worker:
    """Returns the worker of a grid, whose cells are in the definition of the folder."""
    cells, keys = grid_of(options, job.fixed)
    if options.parallel > len(cells):
        raise UsageError(f'--parallel {options.parallel} is more than the sweep has cells ({len(cells)})')
    return Worker(job, claim_names(job, keys, cells), options.parallel, Progress())


def open_search(options: argparse.Namespace, job: Job) -> Worker:
    """Returns the worker of a search, whose space is in the definition of the folder."""
    if options.parallel > options.trials:
        raise UsageError(f'--parallel {options.parallel} is more than --trials {options.trials}')
    if len(recipes.sweep(options.config)) > 1:
        raise UsageError(f'--search has no meaning for {options.config}, whose sweep() yields the cells')
    space = search.parse_space(options.over or [])
    grid.check_not_fixed(job.fixed, space, '--over')
    first = search.check_ends(job.recipe, job.fixed, space)
    words = dict(grid.parse_words(options.over))
    new = definition.new_definition(job.recipe, base_of(job), [*space], [first])
    new = dataclasses.replace(new, cells={}, search=words)
    return search.Search(job, new, space, options.trials, options.parallel)


def base_of(job: Job) -> dict[str, Any]:
    """Returns {key: value} of the recipe with the changes of all cells."""
    return configs.flatten(recipes.load(job.recipe, job.fixed).to_dict())


def grid_of(options: argparse.Namespace, fixed: Pairs) -> tuple[list[Cell], list[str]]:
    """Returns (the cells of a grid, checked; the keys that vary)."""
    over = grid.parse_over(options.over or [])
    changes = grid.combine(fixed, recipes.sweep(options.config), over, options.seeds)
    keys = list(grid.varied(changes))
    if not keys:
        raise UsageError(f'nothing varies: give --over, --seeds, or a recipe with sweep() ({options.config} has none)')
    return grid.make_cells(options.config, fixed, changes), keys


def claim_names(job: Job, keys: Sequence[str], cells: Sequence[Cell]) -> list[Cell]:
    """Returns the cells under their names in the folder, after adding those that are new to its definition."""
    new = definition.new_definition(job.recipe, base_of(job), keys, cells)
    with definition.opened(job.folder) as old:
        merged, names = definition.merge(job.folder, old, new)
        named = [Cell(names[cell.name], cell.changes, cell.config) for cell in cells]
        sweep_cells.check_unedited(job.folder, merged, names.values())
        if merged != old:
            sweep_folder.write_definition(job.folder, merged)
    return named


def summary(worker: Worker, workdir: str) -> int:
    """Prints what is left and what failed; returns the exit code: the worst of the failures, 75 if cells were stopped,
    else 0."""
    failed = {name: ending for name, ending in worker.endings.items() if ending and not ending.is_result}
    for name, ending in failed.items():
        console.say(f'mixln_jax: cell {name}: exit {ending.code}: {ending.line}', file=sys.stderr)
    if worker.elsewhere:
        console.say(f'other workers train {len(worker.elsewhere)} of the cells; if one dies, run the command again')
    console.say(f'next: python -m mixln_jax.sweep --show {shlex.quote(workdir)}')
    if failed:
        text = f'mixln_jax: {len(failed)} of {len(worker.cells)} cells failed; run the same command again to retry them'
        console.say(text, file=sys.stderr)
        return max(ending.code for ending in failed.values())
    return errors.STOPPED if worker.stopped else 0

"""What `python -m mixln_jax.sweep` does: it trains the cells of a grid or a search."""

import argparse
import pathlib
import shlex
import sys
from collections.abc import Sequence

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.runs import sweep_folder
from mixln_jax.sweeps import definition, grid
from mixln_jax.sweeps.grid import Cell, Pairs
from mixln_jax.sweeps.progress import Progress
from mixln_jax.sweeps.workers import Job, Worker
from mixln_jax.system import console, errors, signals
from mixln_jax.system.errors import UsageError


def train(options: argparse.Namespace, fixed: Pairs, stop: signals.Stop) -> int:
    """Trains the cells of a grid that are free; returns the exit code: 0 if each has a result or is another worker's.

    Raises UsageError, before anything runs, for options, keys, values, cells or a folder that cannot be used.
    """
    folder = definition.check_folder(options.workdir)
    with stop.may_interrupt():
        cells, keys = grid_of(options, fixed)
        if options.parallel > len(cells):
            raise UsageError(f'--parallel {options.parallel} is more than the sweep has cells ({len(cells)})')
        cells = claim_names(folder, options.config, fixed, keys, cells)
    worker = Worker(Job(folder, options.config, fixed), cells, options.parallel, Progress())
    worker.work(stop)
    return summary(worker, options.workdir)


def grid_of(options: argparse.Namespace, fixed: Pairs) -> tuple[list[Cell], list[str]]:
    """Returns (the cells of a grid, checked; the keys that vary)."""
    axes = grid.parse_over(options.over or [])
    if options.seeds:
        axes = [grid.seed_axis(options.seeds), *axes]
    changes = grid.combine(fixed, recipes.sweep(options.config), axes)
    keys = list(grid.varied(changes))
    if not keys:
        raise UsageError(f'nothing varies: give --over, --seeds, or a recipe with sweep() ({options.config} has none)')
    return grid.make_cells(options.config, fixed, changes), keys


def claim_names(
    folder: pathlib.Path, recipe: str, fixed: Pairs, keys: Sequence[str], cells: Sequence[Cell]
) -> list[Cell]:
    """Returns the cells under their names in the folder, after adding those that are new to its definition."""
    base = configs.flatten(recipes.load(recipe, fixed).to_dict())
    new = definition.new_definition(recipe, base, keys, cells)
    with definition.opened(folder) as old:
        merged, names = definition.merge(folder, old, new)
        named = [Cell(names[cell.name], cell.changes, cell.config) for cell in cells]
        definition.check_unedited(folder, named, keys)
        if merged != old:
            sweep_folder.write_definition(folder, merged)
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

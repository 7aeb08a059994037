"""Whether a folder holds this sweep, and what of it is there: a sweep may grow, and nothing of it is done twice."""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixln_jax import config as configs
from mixln_jax.models import placements
from mixln_jax.runs import sweep_folder
from mixln_jax.runs.sweep_folder import Definition
from mixln_jax.sweeps.grid import SEEDS, Cell, flat
from mixln_jax.system import errors, files, outputs
from mixln_jax.system.errors import UsageError

ANOTHER = 'give another --workdir'
PATIENCE = 60  # seconds to wait for another worker that reads or writes the definition: it takes milliseconds


def check_folder(workdir: str) -> pathlib.Path:
    """Returns the absolute path of a sweep's folder.

    Raises UsageError if checkpoints cannot be kept there, or if it holds something other than a sweep.
    """
    outputs.resolve(workdir, '--workdir')
    folder = files.for_arrays(workdir, '--workdir')
    try:
        names = sorted(set(os.listdir(folder)) - {sweep_folder.CELLS})
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise UsageError(f'--workdir {workdir} cannot be used: {error.strerror}') from None
    if names and sweep_folder.DEFINITION not in names:
        raise UsageError(f'--workdir {workdir} holds {names[0]} of something else than a sweep; {ANOTHER}')
    return folder


def new_definition(recipe: str, base: Mapping[str, Any], keys: Sequence[str], cells: Sequence[Cell]) -> Definition:
    """Returns the definition of a grid.

    Args:
        recipe: FILE[:ARG].
        base: {key: value} of the recipe, flat, with the changes of all cells; it alone need not be valid.
        keys: that vary.
        cells: of the grid.
    """
    own = {cell.name: {key: cell.values[key] for key in keys} for cell in cells}
    return Definition(recipe, tuple(keys), cells[0].values | {key: base[key] for key in keys}, own)


@contextlib.contextmanager
def opened(folder: pathlib.Path) -> Iterator[Definition | None]:
    """Makes the folder of a sweep and keeps other workers from changing its definition, which it yields; None if there
    is none yet. A block that raises leaves no new folder. Raises UsageError if the folder cannot be used."""
    try:
        with outputs.new_folder(folder), outputs.new_folder(folder / sweep_folder.CELLS):
            path, start = sweep_folder.cell_file(folder, 'sweep', '.lock'), time.monotonic()
            while (lock := outputs.hold(path)) is None:
                if time.monotonic() > start + PATIENCE:
                    raise UsageError(f'{path} has been held by another process for {PATIENCE} s; end that one')
                time.sleep(0.05)
            with lock:
                try:
                    yield sweep_folder.read_definition(folder)
                except BaseException:
                    if not (folder / sweep_folder.DEFINITION).exists():
                        path.unlink(missing_ok=True)
                    raise
    except OSError as error:
        raise UsageError(f'--workdir {folder} cannot be used: {errors.reason(error)}') from None


def merge(folder: pathlib.Path, old: Definition | None, new: Definition) -> tuple[Definition, dict[str, str]]:
    """Returns the definition with the cells of both, and the names there of the cells of `new`.

    A cell that is there already, under whatever name, keeps its name.

    Raises UsageError, naming the keys, if a folder holds another sweep.
    """
    if old is None:
        return new, {name: name for name in new.cells}
    _check_same(folder, old, new)
    keys = tuple(dict.fromkeys((*old.keys, *new.keys)))
    there = {repr([old.value(name, key) for key in keys]): name for name in old.cells}
    cells, names = {name: {key: old.value(name, key) for key in keys} for name in old.cells}, {}
    for name in new.cells:
        values = [new.value(name, key) for key in keys]
        if repr(values) not in there:
            if name in cells:
                raise UsageError(f'{folder} holds another cell named {name}; {ANOTHER}')
            there[repr(values)], cells[name] = name, dict(zip(keys, values, strict=True))
        names[name] = there[repr(values)]
    return dataclasses.replace(old, keys=keys, cells=cells), names


def _check_same(folder: pathlib.Path, old: Definition, new: Definition) -> None:
    """Raises UsageError if two definitions are not of one sweep, which may have grown."""
    if old.search != new.search:
        raise UsageError(
            f'{folder} holds another sweep: it searches {_spelled(old.search)}, not {_spelled(new.search)}; {ANOTHER}'
        )
    before, now = (set(one.keys) - {*SEEDS} for one in (old, new))
    if not (before <= now or now <= before):
        raise UsageError(
            f'{folder} holds another sweep: it varies {", ".join(sorted(before))}, not {", ".join(sorted(now))}; '
            f'{ANOTHER}'
        )
    varied = {*old.keys, *new.keys}
    free = {key for key in configs.may_change() if not key.startswith('eval.')} - varied
    defaults = flat(configs.Config())
    differ = [
        f'{key} (was {was}, is {new.fixed[key]})'
        for key in new.fixed
        if key not in free | varied and (was := old.fixed.get(key, defaults[key])) != new.fixed[key]
    ]
    if differ:
        raise UsageError(f'{folder} holds another sweep: {", ".join(differ)}; {ANOTHER}')


def _spelled(search: Mapping[str, str]) -> str:
    return ' '.join(f'{key}={text}' for key, text in search.items()) or 'nothing'


def check_unedited(folder: pathlib.Path, cells: Sequence[Cell], keys: Sequence[str]) -> None:
    """Raises UsageError, naming cell and key, if the folder of a cell holds another run, or lines that it has not
    written."""
    for cell in cells:
        run = folder / cell.name
        if run.is_file():
            raise UsageError(f'{run} is a file where the folder of a cell belongs; remove it')
        if (run / 'config.json').exists():
            there = configs.read(run / 'config.json')
            expected, seen = _comparable(cell.config, there), _comparable(there, there)
            free = configs.may_change() - {*keys}
            for key in expected.keys() - free:
                if seen[key] != expected[key]:
                    raise UsageError(
                        f'the folder of cell {cell.name} was edited: config.json has {key}={seen[key]}, not '
                        f'{expected[key]}; remove {run} to train the cell again'
                    )
        if ending := sweep_folder.read_ending(run):
            sweep_folder.check_unedited(run, ending)


def _comparable(config: configs.Config, there: configs.Config) -> dict[str, Any]:
    """Returns {key: value} of a configuration, with what a run works out as the run in its folder, `there`, has it."""
    model = config.model
    values = flat(config) | {
        'model.norm_position': placements.resolve(model.norm_position, model.num_layers, model.post_ratio)
    }
    if config.num_epochs:
        values['num_steps'] = there.num_steps
    worked_out = flat(there)
    return {key: worked_out[key] if value == 'auto' else value for key, value in values.items()}

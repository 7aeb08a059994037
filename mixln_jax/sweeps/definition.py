"""Whether a folder holds this sweep, and what of it is there: a sweep may grow, and nothing of it is done twice."""

import contextlib
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixln_jax import config as configs
from mixln_jax.runs import sweep_folder
from mixln_jax.runs.sweep_cells import flat
from mixln_jax.runs.sweep_folder import Definition
from mixln_jax.sweeps.grid import SEEDS, Cell
from mixln_jax.system import console, errors, files, outputs
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
        names = {name for name in os.listdir(folder) if not name.startswith('.')}  # such as a lock that was left
    except FileNotFoundError:
        return folder
    except OSError as error:
        raise UsageError(f'--workdir {workdir} cannot be used: {error.strerror}') from None
    sweep_folder.check_is_folder(folder / sweep_folder.CELLS)
    cells = sweep_folder.recorded_cells(folder)
    others = sorted(names - cells - {sweep_folder.CELLS} - ({sweep_folder.SHOWN} if cells else set()))
    if others and sweep_folder.DEFINITION not in names:
        raise UsageError(
            f'--workdir {workdir} holds {others[0]} but no {sweep_folder.DEFINITION}, so it is not the folder of a '
            f'sweep; {ANOTHER}, or put {sweep_folder.DEFINITION} back if it was one'
        )
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
            path, start = sweep_folder.cell_file(folder, sweep_folder.LOCK, '.lock'), time.monotonic()
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
        _take_up(folder, new)
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


def _take_up(folder: pathlib.Path, new: Definition) -> None:
    """Says that the definition is made anew if cells are there whose definition is missing. Raises UsageError, naming
    one, if it would not have them all."""
    cells = sweep_folder.recorded_cells(folder)
    if strays := sorted(cells - new.cells.keys()):
        raise UsageError(
            f'{folder / sweep_folder.DEFINITION} is missing, and this command has no cell {strays[0]}, which is there; '
            f'put the file back, give the command that has all cells, or {ANOTHER}'
        )
    if cells:
        console.say(f'{sweep_folder.DEFINITION} was missing; it is made anew, and {len(cells)} cells are there')


def _check_same(folder: pathlib.Path, old: Definition, new: Definition) -> None:
    """Raises UsageError if two definitions are not of one sweep, which may have grown."""
    if old.search != new.search:
        raise UsageError(
            f'{folder} holds another sweep: it is {_spelled(old.search)}, not {_spelled(new.search)}; {ANOTHER}'
        )
    if missing := [key for key in old.keys if key not in new.keys]:
        give = '--seeds N' if {*SEEDS} <= {*missing} else f'--over {missing[0]}=VALUE'
        raise UsageError(
            f'{folder} holds a sweep over {", ".join(old.keys)}; this command leaves out {", ".join(missing)}: '
            f'give {give} too, or another --workdir'
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
    words = ' '.join(f'{key}={text}' for key, text in search.items())
    return f'a search over {words}' if words else 'a grid, without --search'

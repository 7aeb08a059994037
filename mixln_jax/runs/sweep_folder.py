"""The folder of a sweep: what is swept, and how each cell, a run in a folder of its own, has ended.

sweep.json         the definition: what all cells share, and in what each differs
<cell>/            the work directory of a cell
cells/<cell>.json  how it ended; .txt: what it printed; .lock: held while it runs
"""

import dataclasses
import hashlib
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from mixln_jax.system import files, outputs
from mixln_jax.system.errors import CheckpointError, UsageError, reading

DEFINITION, CELLS = 'sweep.json', 'cells'
FAILED = 'failed'
# How a cell may end with a result. Any other end is a failure, and the cell is tried again by the next call.
RESULTS = 'done', 'collapsed', 'not finite', 'pruned'


@dataclasses.dataclass(frozen=True)
class Definition:
    """What is swept."""

    config: str  # the recipe, as it was given
    keys: tuple[str, ...]  # that vary
    fixed: dict[str, Any]  # {key: value} of all keys; those in `keys` have the values of the recipe
    cells: dict[str, dict[str, Any]]  # {name: {key: value}} of keys that vary
    search: dict[str, str] = dataclasses.field(default_factory=dict)  # {key: range} of a search; {}: a grid

    def value(self, name: str, key: str) -> Any:
        """Returns the value of a key in a cell."""
        return self.cells[name].get(key, self.fixed.get(key))


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a cell ended."""

    state: str  # one of RESULTS, or FAILED
    code: int  # exit code
    line: str  # its last line
    step: int | None = None  # of the collapse, or the first one that is not finite
    metrics: str = ''  # digest of its metrics.jsonl
    time: float = dataclasses.field(default_factory=time.time)  # seconds since 1970

    @property
    def is_result(self) -> bool:
        """Whether the cell has a result."""
        return self.state in RESULTS

    @property
    def shown(self) -> str:
        """The ending for people."""
        if self.state == FAILED:
            return f'{FAILED} ({self.code})'
        return f'{self.state} at {self.step:,}' if self.step is not None else self.state


def read_definition(folder: pathlib.Path) -> Definition | None:
    """Returns the definition of a sweep; None if the folder has none. Raises UsageError if it is malformed."""
    path, problem = folder / DEFINITION, 'not the definition of a sweep'
    try:
        values = files.read_json(path, UsageError, problem)
    except FileNotFoundError:
        return None
    with reading(path, UsageError, problem):
        definition = Definition(**values | {'keys': tuple(values['keys'])})
        kinds = (definition.config, str), (definition.fixed, dict), (definition.cells, dict), (definition.search, dict)
        for value, kind in kinds:
            if not isinstance(value, kind):
                raise ValueError(f'{value!r} is not a {kind.__name__}')
        for name, changes in definition.cells.items():
            if not isinstance(changes, dict) or not name or '/' in name or name.startswith('.'):
                raise ValueError(f'{name!r} is not a cell')
    return definition


def write_definition(folder: pathlib.Path, definition: Definition) -> None:
    """Writes the definition of a sweep."""
    outputs.write_json(folder / DEFINITION, dataclasses.asdict(definition))


def cell_file(folder: pathlib.Path, name: str, suffix: str) -> pathlib.Path:
    """Returns the path of a file about a cell: `.json`, `.txt` or `.lock`."""
    return folder / CELLS / f'{name}{suffix}'


def read_ending(run: pathlib.Path) -> Ending | None:
    """Returns how the run in a folder ended as a cell of a sweep.

    None if it has not ended, is no cell, or had a result whose folder is gone. Raises CheckpointError for a malformed
    record.
    """
    path, problem = cell_file(run.parent, run.name, '.json'), 'not how a cell of a sweep ended'
    try:
        values = files.read_json(path, CheckpointError, problem)
    except FileNotFoundError:
        return None
    with reading(path, CheckpointError, problem):
        ending = _checked(values)
    return ending if run.is_dir() or not ending.is_result else None


def _checked(values: Mapping[str, Any]) -> Ending:
    ending = Ending(**values)
    for value, kind in ((ending.state, str), (ending.code, int), (ending.line, str), (ending.metrics, str)):
        if not isinstance(value, kind):
            raise ValueError(f'{value!r} is not of type {kind.__name__}')
    if ending.state not in (*RESULTS, FAILED) or not isinstance(ending.step, int | None):
        raise ValueError(f'{ending.state!r} at step {ending.step!r}')
    return ending


def write_ending(run: pathlib.Path, ending: Ending) -> None:
    """Writes how the run in a folder ended."""
    outputs.write_json(cell_file(run.parent, run.name, '.json'), dataclasses.asdict(ending))


def digest(run: pathlib.Path) -> str:
    """Returns a digest of the metrics.jsonl of a run; of an empty file if there is none."""
    try:
        content = files.read(run / 'metrics.jsonl', CheckpointError, 2**31)
    except FileNotFoundError:
        content = b''
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def check_unedited(run: pathlib.Path, ending: Ending) -> None:
    """Raises UsageError if the metrics.jsonl of a cell is not what it was when the cell ended."""
    if ending.metrics and digest(run) != ending.metrics:
        raise UsageError(
            f'{run / "metrics.jsonl"} is not what the cell has written: it was edited since; remove '
            f'{os.fspath(run)} to train the cell again'
        )

"""The folder of a sweep: what is swept, and how each cell, a run in a folder of its own, has ended.

sweep.json         the definition: what all cells share, and in what each differs
<cell>/            the work directory of a cell
cells/<cell>.json  how it ended; .txt: what it printed; .lock: held while it runs
results/           what `--show` has written
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import time
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from mixln_jax.system import files, outputs
from mixln_jax.system.errors import CheckpointError, Exit, UsageError, reading

DEFINITION, CELLS, SHOWN = 'sweep.json', 'cells', 'results'
LOCK = 'sweep'  # file of CELLS, without suffix: held while the definition is read and written
# The ways out of a damaged file.
ANEW = 'put back a good copy, or remove it and give the training command again, which makes it anew and keeps the cells'
LOOK_AGAIN = 'remove it, and the next training command looks at the cell again'
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
    path, problem = folder / DEFINITION, 'damaged, not the definition of a sweep'
    try:
        with advising(ANEW):
            values = files.read_json(path, UsageError, problem)
            with reading(path, UsageError, problem):
                definition = _make(Definition, values)
                for name, changes in definition.cells.items():
                    if not isinstance(changes, dict) or not name or '/' in name or name.startswith('.'):
                        raise ValueError(f'{name!r} is not a cell')
                return dataclasses.replace(definition, keys=tuple(map(str, definition.keys)))
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def advising(way_out: str) -> Iterator[None]:
    """Turns an Exit into a UsageError that ends with a way out."""
    try:
        yield
    except Exit as error:
        raise UsageError(f'{error}; {way_out}') from None


_KINDS: dict[Any, str] = {str: 'a text', int: 'a whole number', float: 'a number', dict: 'an object', tuple: 'a list'}


def _make(kind: Any, values: Mapping[str, Any]) -> Any:
    """Returns a dataclass with the values of a JSON file. Raises ValueError if one is missing, unknown or of another
    type."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    missing = dataclasses.MISSING
    for name, field in fields.items():
        if name not in values and field.default is missing and field.default_factory is missing:
            raise ValueError(f'{name} is missing')
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f'{name!r} is unknown')
        if not isinstance(value, _json_type(fields[name].type)):
            wanted = typing.get_origin(fields[name].type) or fields[name].type
            raise ValueError(f'{name} is not {_KINDS.get(wanted, "a whole number or null")}')
    return kind(**values)


def _json_type(annotation: Any) -> Any:
    """Returns the type that values of an annotated field have in JSON."""
    origin = typing.get_origin(annotation)
    plain = annotation if origin in (None, types.UnionType) else origin
    return {tuple: list, float: int | float}.get(plain, plain)


def check_is_folder(path: pathlib.Path) -> None:
    """Raises UsageError if a path in a sweep is a file where a folder belongs."""
    if path.exists() and not path.is_dir():
        raise UsageError(f'{path} is a file where a folder of the sweep belongs; remove or rename it')


def recorded_cells(folder: pathlib.Path) -> set[str]:
    """Returns the names of the cells that were begun in a folder and are there, whether or not it has a definition."""
    names = {path.stem for path in (folder / CELLS).glob('[!.]*')} - {LOCK}
    return {name for name in names if (folder / name).is_dir()}


def write_definition(folder: pathlib.Path, definition: Definition) -> None:
    """Writes the definition of a sweep."""
    outputs.write_json(folder / DEFINITION, dataclasses.asdict(definition))


def cell_file(folder: pathlib.Path, name: str, suffix: str) -> pathlib.Path:
    """Returns the path of a file about a cell: `.json`, `.txt` or `.lock`."""
    return folder / CELLS / f'{name}{suffix}'


def read_ending(run: pathlib.Path) -> Ending | None:
    """Returns how the run in a folder ended as a cell of a sweep.

    None if it has not ended, is no cell, or had a result whose folder is gone. Raises UsageError for a malformed
    record.
    """
    path, problem = cell_file(run.parent, run.name, '.json'), 'damaged, not how a cell of a sweep ended'
    try:
        with advising(LOOK_AGAIN):
            values = files.read_json(path, UsageError, problem)
            with reading(path, UsageError, problem):
                ending = _make(Ending, values)
                if ending.state not in (*RESULTS, FAILED):
                    raise ValueError(f'state is {ending.state!r}, not one of {", ".join((*RESULTS, FAILED))}')
    except FileNotFoundError:
        return None
    return ending if run.is_dir() or not ending.is_result else None


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

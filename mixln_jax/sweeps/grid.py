"""The cells of a sweep: what `--over` and `--seeds` say, as a product of changes to a recipe, all of them checked."""

import csv
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.models import families, placements
from mixln_jax.runs.sweep_cells import NOTES, flat
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks import build

Pairs = tuple[tuple[str, str], ...]  # (dotted key, text of its value)
SEEDS = 'seed', 'data.seed'
LONGEST_NAME = 150  # bytes
MAY_BE_EMPTY = {path for path, field in configs.all_fields() if field.default == ''}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    name: str  # of its folder
    changes: Pairs  # to the recipe, those of all cells included
    config: configs.Config

    @property
    def values(self) -> dict[str, Any]:
        """{key: value} of its configuration, flat."""
        return flat(self.config)


def parse_over(groups: Iterable[Sequence[str]]) -> list[list[Pairs]]:
    """Returns the axes of a product, each a list of changes.

    Args:
        groups: the words of each `--over`: one KEY=V1,V2,... or several, which change together (zip). Values are as in
            a CSV file: one that contains a comma stands in double quotes.

    Raises:
        UsageError: a word is malformed, values that change together are not equally many, or a key or a value is there
            twice.
    """
    axes, seen = [], set()
    for words in groups:
        columns = [parse_values(word) for word in words]
        if len({len(values) for _, values in columns}) > 1:
            counts = ', '.join(f'{key} has {len(values)}' for key, values in columns)
            raise UsageError(f'--over: keys that change together need equally many values; {counts}')
        for key, _ in columns:
            if key in seen:
                raise UsageError(f'--over: {key} is given twice')
            seen.add(key)
        rows = list(zip(*([(key, value) for value in values] for key, values in columns), strict=True))
        if twice := next((row for number, row in enumerate(rows) if row in rows[:number]), None):
            raise UsageError(f'--over: {spelled(twice)} is given twice')
        axes.append(rows)
    return axes


def parse_words(groups: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Returns the pairs (key, text) of the words of each `--over`."""
    pairs = [word.partition('=') for words in groups for word in words]
    return [(key.removeprefix('config.'), text) for key, _, text in pairs]


def parse_values(word: str) -> tuple[str, list[str]]:
    """Returns (key, values) of KEY=V1,V2,... Raises UsageError if the word is malformed."""
    key, equals, text = word.partition('=')
    if not (key and equals and text):
        raise UsageError(f'--over {word!r} is not KEY=V1,V2,...')
    try:
        [values] = csv.reader([text], strict=True, skipinitialspace=True)
    except (csv.Error, ValueError) as error:
        raise UsageError(f'--over {word!r}: {error}; a value with a comma stands in double quotes') from None
    key, values = key.removeprefix('config.'), [value.strip() for value in values]
    if '' in values and key not in MAY_BE_EMPTY:
        raise UsageError(f'--over {word!r}: value {values.index("") + 1} of {len(values)} is empty')
    return key, values


def seed_axis(count: int) -> list[Pairs]:
    """Returns the axis of the seeds 0 to `count` - 1: of the weights and of the order of the data."""
    return [tuple((key, f'{number}') for key in SEEDS) for number in range(count)]


def combine(
    fixed: Pairs, own: Sequence[Mapping[str, str]], over: Sequence[Sequence[Pairs]], seeds: int | None = None
) -> list[Pairs]:
    """Returns the changes of each cell: the product of seeds, the axes of `--over` and a recipe's own cells.

    The seeds, or without them the first axis, are slowest, and the recipe's own cells come next. Raises UsageError,
    naming where, if a key is changed twice.
    """
    own_axis = [tuple(changes.items()) for changes in own]
    seed_axes = [seed_axis(seeds)] if seeds else []
    by = {'--over': over, '--seeds': seed_axes, 'sweep() of the recipe': [own_axis]}
    given = {name: {key for axis in axes for changes in axis for key, _ in changes} for name, axes in by.items()}
    for one, other in itertools.combinations(given, 2):
        if both := sorted(given[one] & given[other]):
            raise UsageError(f'config.{both[0]} is given twice, by {one} and {other}')
    for name, keys in given.items():
        check_not_fixed(fixed, keys, name)
    axes = [*seed_axes, *over]
    return [tuple(itertools.chain(*changes)) for changes in itertools.product(*axes[:1], own_axis, *axes[1:])]


def check_not_fixed(fixed: Pairs, keys: Iterable[str], name: str) -> None:
    """Raises UsageError if one of the keys, which `name` varies, is changed for all cells too."""
    if both := [key for key, _ in fixed if key in keys]:
        raise UsageError(f'config.{both[0]} is given twice, by --config.{both[0]} and {name}')


def make_cells(recipe: str, fixed: Pairs, changes: Sequence[Pairs], names: Sequence[str] = ()) -> list[Cell]:
    """Returns the cells of a sweep, each checked as far as that goes without its data and devices.

    Args:
        recipe: FILE[:ARG].
        fixed: changes to the recipe in all cells.
        changes: of each cell.
        names: of the cells; none: they are made of the changes.

    Raises:
        UsageError: a key is unknown, a value is out of range, or two cells are the same run; the cell is named.
    """
    cells: list[Cell] = []
    seen: dict[str, Pairs] = {}
    for own, name in zip(changes, names or name_cells(changes), strict=True):
        cells.append(make_cell(recipe, fixed, own, name))
        same = identity(cells[-1].config)
        if same in seen:
            raise UsageError(f'the cells {spelled(seen[same])} and {spelled(own)} are the same run; leave one out')
        seen[same] = own
    return cells


def make_cell(recipe: str, fixed: Pairs, own: Pairs, name: str) -> Cell:
    """Returns a cell with changes of its `own`, checked. Raises UsageError as `make_cells`."""
    try:
        config = check(configs.build(recipes.load(recipe, (*fixed, *own))))
    except UsageError as error:
        raise UsageError(f'cell {spelled(own) or recipe}: {error}') from None
    return Cell(name, own, config)


def identity(config: configs.Config) -> str:
    """Returns a text that two configurations share if they are of the same run; spelling does not count."""
    model = config.model
    resolved = placements.resolve(model.norm_position, model.num_layers, model.post_ratio)
    return f'{sorted((flat(config) | {"model.norm_position": resolved, "model.post_ratio": None}).items(), key=str)}'


def check(config: configs.Config) -> configs.Config:
    """Returns a configuration that a network and a task can be made of. Raises UsageError for another."""
    build.from_config(config, families.from_config(config.model, num_outputs=config.task.num_outputs))
    return config


def spelled(changes: Pairs) -> str:
    """Returns changes for people, without notes."""
    return ' '.join(f'{key}={value}' for key, value in changes if not key.startswith(NOTES))


def name_cells(changes: Sequence[Pairs]) -> list[str]:
    """Returns the name of each cell: KEY=VALUE of its changes, keys by their last part if that is clear."""
    keys = dict.fromkeys(key for own in changes for key, _ in own if not key.startswith(NOTES))
    together = set(SEEDS) <= keys.keys() and all(dict(own).get(SEEDS[0]) == dict(own).get(SEEDS[1]) for own in changes)
    if together:
        del keys[SEEDS[1]]
    keys = {key: None for key in sorted(keys, key=SEEDS.__contains__)}  # seeds last
    ends = [key.rpartition('.')[2] for key in keys]
    labels = {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}
    names: list[str] = []
    for own in changes:
        values = dict(own)
        name = ','.join(f'{labels[key]}={_plain(values[key])}' for key in labels if key in values) or 'recipe'
        if name in names or len(name.encode()) > LONGEST_NAME:
            name = f'{name.encode()[:LONGEST_NAME].decode(errors="ignore")}~{_digest(own)}'
        names.append(name)
    return names


def _plain(value: str) -> str:
    """Returns a value without characters that have a meaning in paths or in shells."""
    return re.sub(r'[^\w.+-]+', '-', value) or 'none'


def _digest(changes: Pairs) -> str:
    return hashlib.blake2b(repr(changes).encode(), digest_size=4).hexdigest()


def varied(changes: Sequence[Pairs]) -> Iterator[str]:
    """Yields the keys that the changes of cells name, each once, without notes."""
    yield from dict.fromkeys(key for own in changes for key, _ in own if not key.startswith(NOTES))

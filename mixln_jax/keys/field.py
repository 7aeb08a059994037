"""The dataclass fields that describe keys."""

import dataclasses
from collections.abc import Iterator
from typing import Any

LONGEST = 2**20  # tokens in a row; packing keeps 64 rows open
LARGEST_VOCABULARY = 2**24


def key(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    secret: bool = False,
    may_change: bool = False,
    weights: bool = False,
    families: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
) -> Any:
    """Returns the dataclass field of a key.

    Args:
        default: its default value.
        help: its line in --help.
        choices: the values that it may have.
        at_least, above, at_most, below: the range of a number.
        secret: its value is never shown.
        may_change: its value may change when a run continues. With any other key another value means another run.
        weights: its value must be the same in two networks for them to use the same weights in the same way.
        families: the values of `config.model.family` for which it has a meaning; empty: all.
        tasks: the values of `config.task.name` for which it has a meaning; empty: all.
    """
    ranges = {'at least': at_least, 'above': above, 'at most': at_most, 'below': below}
    ranges = {name: bound for name, bound in ranges.items() if bound is not None}
    metadata = {'help': help, 'choices': choices, 'ranges': ranges, 'secret': secret}
    metadata |= {'may_change': may_change, 'weights': weights, 'families': families, 'tasks': tasks}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


def group(cls: type, may_change: bool = False, tasks: tuple[str, ...] = ()) -> Any:
    """Returns the field of a group of keys, `config.<group>.<key>`. `may_change`: all of them may change. `tasks`: for
    which all of them have a meaning, as of `key`."""
    return dataclasses.field(default_factory=cls, metadata={'may_change': may_change, 'tasks': tasks})


def changed_for_tasks(
    keys: Any, prefix: str, tasks: tuple[str, ...] = ()
) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Yields (key, value, tasks) of the keys in a group, and in groups of it, that have a meaning for some tasks alone
    and are not at their default. `prefix`: of the group's keys; `tasks`: those of the group itself."""
    for field in dataclasses.fields(keys):
        path, value = f'{prefix}.{field.name}', getattr(keys, field.name)
        meant_for = field.metadata['tasks'] or tasks
        if dataclasses.is_dataclass(value):
            yield from changed_for_tasks(value, path, meant_for)
        elif meant_for and value != field.default:
            yield path, value, meant_for

"""Which files the splits of jsonl and text sources come from."""

import os
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from mixln_jax import config
from mixln_jax.data import text_files
from mixln_jax.system.errors import UsageError

OF_FILES = 'jsonl', 'text'  # sources that read data.path, and data.validation_path if it is given
State = tuple[tuple[str, int, int], ...]  # files as (path, size, time): changed files are read again


def state(data: config.Data, split: str) -> State | None:
    """Returns the files of a split; without data.validation_path every split has a part of those of data.path. None:
    the source has no files.

    Args:
        data: the keys of a run's config.
        split: 'train', 'validation' or 'all'.

    Raises UsageError for keys that contradict each other; DataError as `text_files.paths_of_source`.
    """
    if data.validation_path:
        _check(data)
    if data.source not in OF_FILES:
        return None
    keys = ['path']
    if data.validation_path:
        keys = {'train': ['path'], 'validation': ['validation_path'], 'all': ['path', 'validation_path']}[split]
    paths = [path for key in keys for path in _paths(data, key)]
    return tuple((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths)


def check_apart(data: config.Data) -> None:
    """Raises UsageError where data.path and data.validation_path name the same file."""
    training = {os.path.realpath(path) for path in _paths(data, 'path')}
    for path in _paths(data, 'validation_path'):
        if os.path.realpath(path) in training:
            raise UsageError(f'config.data.path and config.data.validation_path both name {path}')


def remark(training: Iterable[Hashable], evaluation: Mapping[Any, str]) -> str | None:
    """Returns a line for people if some of what a run evaluates on is what it trains on.

    Args:
        training: what decides the split of each record, such as its text or a hash of it.
        evaluation: the same of the records to evaluate on, with the file and line of each.
    """
    known = {*training}
    both = [origin for unit, origin in evaluation.items() if unit in known]
    if not both:
        return None
    return (
        f'{len(both):,} of the {len(evaluation):,} different records of config.data.validation_path are in '
        f'config.data.path too, the first of them {both[0]}'
    )


def _paths(data: config.Data, key: str) -> list[str]:
    return text_files.paths_of_source(data.source, getattr(data, key), f'config.data.{key}')


def _check(data: config.Data) -> None:
    if data.source not in OF_FILES:
        raise UsageError(
            f'config.data.validation_path has no meaning for config.data.source={data.source}: it is for '
            f'{" and ".join(OF_FILES)}'
        )
    if data.held_out not in (0, config.Data.held_out):
        raise UsageError(
            f'config.data.held_out={data.held_out:g} and config.data.validation_path are both given: one of them says '
            'what to evaluate on'
        )

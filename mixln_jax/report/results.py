"""Checks of the files that a report reads: metrics.jsonl and the result.json of each analysis."""

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mixln_jax.system import files
from mixln_jax.system.errors import CheckpointError, reading

LARGEST = 2**63  # whole numbers in a file are smaller
ANALYSES = ('angular', 'drop', 'gradients', 'variance')


def check_lines(path: pathlib.Path, lines: list[dict[str, Any]]) -> None:
    """Raises CheckpointError if a value of metrics.jsonl is neither a number nor a list of numbers."""
    for line in lines:
        for name, value in line.items():
            if not _numeric(value):
                raise CheckpointError(f'{path}: {name} of step {line["step"]} is not a number')


def read_content(path: pathlib.Path, job: str = '') -> dict[str, Any] | None:
    """Returns the content of a JSON file of a run, None if the file does not exist.

    Args:
        path: the file.
        job: the analysis that wrote the file; empty: the file is not the result of an analysis.

    Raises:
        CheckpointError: the file is malformed, or is not a result of `job`.
    """
    problem = f'not {f"the result of mixln_jax.analysis.{job}" if job else "what a run writes"}'
    try:
        content = files.read_json(path, CheckpointError, problem)
    except FileNotFoundError:
        return None
    if job:
        with reading(path, CheckpointError, problem):
            for name in ('definition', 'unit', 'source'):
                if not isinstance(content.get(name), str | None):
                    raise ValueError(f'{name} is not a text')
            for result in content['results']:
                _check_result(job, result)
            if not content['results']:
                raise ValueError('it has no results')
    return content


def _numeric(value: Any) -> bool:
    """Returns whether a value, or every value in nested lists, is a number or None, which stands for not finite."""
    if isinstance(value, list):
        return all(map(_numeric, value))
    if isinstance(value, float):
        return not 1e100 <= abs(value) < math.inf  # no axis can be drawn for values near the largest float
    return value is None or isinstance(value, int) and abs(value) < LARGEST


def _check_result(job: str, result: Mapping[str, Any]) -> None:
    """Raises ValueError, KeyError or TypeError if an element of `results` is not as the figures need it."""
    _check_layers(result)
    _check_description(result)
    _check_single_values(job, result)
    for quantity, shape in _quantities(job, result):
        _check_quantity(quantity, shape)
    L = len(result['norm_position'])
    if job == 'variance' and result.get('theory') and np.array(result['theory'], float).shape != (L + 1,):
        raise ValueError('the theory has another length than the depths')


def _check_layers(result: Mapping[str, Any]) -> None:
    L = len(result['norm_position'])
    for name, kind in (('norm_position', str), ('layer_index', int)):
        if not (isinstance(result[name], list) and {*map(type, result[name])} == {kind} and len(result[name]) == L):
            raise ValueError(f'{name} is not a list with one entry for each layer')
    if not _numeric(result['layer_index']) or result['layer_index'] != sorted({*result['layer_index']}):
        raise ValueError('layer_index does not increase')


def _check_description(result: Mapping[str, Any]) -> None:
    for name in ('step', 'tokens', 'rows', 'gradients', 'rows_per_gradient', 'theory_constant'):
        if isinstance(result.get(name), list) or not _numeric(result.get(name)):
            raise ValueError(f'{name} is not a number')
    for name, kind in (('label', str | None), ('text', dict | None)):
        if not isinstance(result.get(name), kind):
            raise ValueError(f'{name} has the wrong type')
    if any(isinstance(value, list | dict) for value in [*(result.get('text') or {}).values(), result.get('positions')]):
        raise ValueError('a list where a single value belongs')


def _check_single_values(job: str, result: Mapping[str, Any]) -> None:
    """Checks the values that belong to the network as a whole, or to its weights outside the layers."""
    metrics = result['metrics'].values() if job == 'drop' else ()
    single = [{'mean': metric.get('value'), **metric} for metric in metrics]
    single += (result.get('outside') or {}).values() if job == 'gradients' else []
    for pair in ([value['mean'], value.get('standard_error')] for value in single):
        if any(isinstance(value, list) for value in pair) or not _numeric(pair):
            raise ValueError('a value is not a number')
    if any(f'{int(block)}' != block for metric in metrics for block in metric['drop']):
        raise ValueError('the size of a block is not a number of layers')


def _quantities(job: str, result: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], tuple[int, ...]]]:
    """Yields every quantity that the figures of an analysis draw, with the shape that it must have."""
    L = len(result['norm_position'])
    if job == 'angular':
        yield result['distance'], (L + 1, L + 1)
    elif job == 'gradients':
        yield result['layers'], (L,)
        yield from ((values, (L,)) for values in result['matrices'].values())
    elif job == 'variance':
        yield result['variance'], (L + 1,)
        yield from ((result['contribution'][name], (L,)) for name in ('attention', 'mlp'))
    elif job == 'drop':
        for metric in result['metrics'].values():
            yield from ((quantity, (L + 1 - int(block),)) for block, quantity in metric['drop'].items())


def _check_quantity(quantity: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    if not _numeric([quantity['mean'], quantity.get('standard_error')]):
        raise ValueError('an element of a list of numbers is not a number')
    mean, error = np.array(quantity['mean'], float), quantity.get('standard_error')
    error = np.zeros(shape) if error is None else np.array(error, float)
    if not mean.shape == error.shape == shape:
        raise ValueError(f'shapes {mean.shape} and {error.shape} where {shape} belongs')
    if (error < 0).any():
        raise ValueError('a negative standard error')

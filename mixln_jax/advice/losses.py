"""Losses that a user gives as a file: lines of JSON, or two columns, step and loss."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from mixln_jax.system import files
from mixln_jax.system.errors import DataError, reading

NAMES = 'train/loss', 'loss', 'eval/loss'  # of a loss in a JSON line, the first one that it has
FORM = 'a line is a JSON object with step and loss, or step and loss as two columns'


def read(path: str) -> list[dict[str, Any]]:
    """Returns metrics lines with `step` and `train/loss`, and what else JSON lines have; a loss that is not finite is
    None.

    Raises:
        UsageError: the path is none of this machine.
        DataError: there is no such file, it cannot be read, a line is malformed, steps do not increase, or there are no
            losses.
    """
    try:
        content = files.read(files.local(path, '--losses'), DataError)
    except FileNotFoundError:
        raise DataError(f'--losses: there is no file {path}') from None
    if content.startswith(b'\x1f\x8b'):
        raise DataError(f'{path} is compressed; unpack it first (gunzip)')
    with reading(path, DataError, 'not a text'):
        text = content.decode('utf-8-sig')
    lines: list[dict[str, Any]] = []
    for number, line in _lines(path, text):
        if lines and line['step'] <= lines[-1]['step']:
            last = lines[-1]['step']
            problem = 'is there twice' if line['step'] == last else f'comes after step {last}'
            raise DataError(f'{path}: line {number}: step {line["step"]} {problem}')
        lines.append(line)
    if not lines:
        raise DataError(f'{path} has no losses; {FORM}')
    return lines


def _lines(path: str, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number in the file, metrics line) of the lines that have a loss."""
    first = True
    for number, row in enumerate(text.splitlines(), 1):
        if not row.strip() or row.lstrip().startswith('#'):
            continue
        place = f'{path}: line {number}'
        line = _from_json(row, place) if row.lstrip().startswith('{') else _from_columns(row, place, first)
        first = False
        if line:
            yield number, line


def _from_json(row: str, place: str) -> dict[str, Any] | None:
    """Returns the line of a JSON object; None if it has no loss."""
    with reading(place, DataError, 'not JSON'):
        line = json.loads(row)
    name = next((name for name in NAMES if name in line), None)
    if 'step' not in line:
        raise DataError(f'{place}: no step; {FORM}')
    if name is None:
        return None
    signs = {key: value for key, value in line.items() if key.startswith('stability/')}
    for key, value in signs.items():
        values = value if isinstance(value, list) else [value]
        if not all(one is None or type(one) in (int, float) for one in values):
            raise DataError(f'{place}: {key} is not a number or a list of numbers')
    return {'step': _step(line['step'], place), 'train/loss': _loss(line[name], place)} | signs


def _from_columns(row: str, place: str, first: bool) -> dict[str, Any] | None:
    """Returns the line of two columns; None for the `first` one if it has names."""
    columns = re.split(r'\s*[,;|\t]\s*|\s+', row.strip())
    if len(columns) != 2:
        raise DataError(f'{place}: {len(columns)} column{"s" * (len(columns) > 1)}, not 2; {FORM}')
    if first and columns[0].lower() in ('step', 'steps'):
        return None
    return {'step': _step(columns[0], place), 'train/loss': _loss(columns[1], place)}


def _step(value: object, place: str) -> int:
    number = _number(value)
    if number is None or not number.is_integer() or number < 0:
        raise DataError(f'{place}: {value!r} is not a step; {FORM}')
    return int(number)


def _loss(value: object, place: str) -> float | None:
    """Returns a loss; None if it is not finite, which metrics.jsonl writes as null."""
    if value is None:
        return None
    number = _number(value)
    if number is None or number < 0:
        raise DataError(f'{place}: {value!r} is not a loss; {FORM}')
    return number if math.isfinite(number) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None

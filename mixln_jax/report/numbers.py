"""Numbers as texts for people."""

import math
from typing import Any

import numpy as np


def number(value: Any) -> float:
    """Returns a value of a JSON file as a float: nan where it is not a number."""
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def short(value: float, digits: int = 4) -> str:
    """Returns a finite number with `digits` significant digits, or all digits before the point if there are more.

    Numbers far from 1 are written with powers of ten.
    """
    return f'{value:,.0f}' if 10 ** (digits - 1) <= abs(value) < 1e9 else f'{value:.{digits}g}'


def fixed(value: float, decimals: int) -> str:
    """Returns a number with a fixed number of decimals, as long as that is readable."""
    if not math.isfinite(value):
        return 'not finite'
    return f'{value:,.{decimals}f}' if abs(value) < 1e6 else short(value)


def with_error(value: float | None, error: float | None = None) -> str:
    """Returns a number together with its standard error, if that is known."""
    if value is None or not math.isfinite(value):
        return 'not finite'
    if error is None or not math.isfinite(error):
        return short(value)
    return f'{short(value)} ± {short(error, 2)}'


def value_range(values: Any) -> str:
    """Returns the smallest and the largest finite value, as `from 1 to 2`.

    Args:
        values: numbers or None, in an array or in nested lists.
    """
    numbers = np.array(values, float)
    numbers = numbers[np.isfinite(numbers)]
    return f'from {short(numbers.min(), 3)} to {short(numbers.max(), 3)}' if numbers.size else 'nothing finite'

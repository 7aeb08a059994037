"""Reward functions: what scores the completions of prompts, written by the user.

A function is named as `module:function` and called with keyword arguments, lists of equal length: `prompts`, the text
of the last message before each answer; `completions`, the texts that were generated; and each further field of the
records that it has an argument for, such as `answer`, with None where a record lacks it. It returns a number for each.
Resuming is exact where it is deterministic.
"""

import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mixln_jax.data.records import Prompt
from mixln_jax.system.errors import UsageError, one_line

Reward = Callable[[Sequence[Prompt], Sequence[str]], np.ndarray]  # -> [n] float64, finite
GIVEN = ('prompts', 'completions')


def exact(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Returns 1 for completions that are their record's `answer`, apart from blanks around it, else 0."""
    return [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]


def open_function(name: str, key: str = 'config.task.online.reward') -> Reward:
    """Returns the reward of a function `module:function`; the module is looked for as an import does.

    The reward raises UsageError, naming prompt and completion, where the function raises, or returns what is no finite
    number.

    Args:
        name: of the function.
        key: the setting that names it, for messages.

    Raises UsageError, naming the key: no such function, or one that cannot be called so.
    """
    module, _, attribute = name.partition(':')
    try:
        function = getattr(importlib.import_module(module), attribute)
        parameters = inspect.signature(function).parameters
    except Exception as error:  # importing is the user's code
        raise UsageError(
            f'{key}={name}: cannot be used: {type(error).__name__}: {one_line(error)}; module:function is needed, of a '
            'module that can be imported from here'
        ) from error
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    accepts = lambda field: every or field in parameters  # noqa: E731
    setting = f'{key}={name}'

    def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        fields = dict.fromkeys(field for prompt in prompts for field in prompt.fields)
        columns = {field: [prompt.fields.get(field) for prompt in prompts] for field in fields}
        columns |= {'prompts': [prompt.last for prompt in prompts], 'completions': list(completions)}
        columns = {field: values for field, values in columns.items() if accepts(field)}
        try:
            return _scores(function, columns, len(prompts))
        except Exception as error:
            first = _first_problem(function, columns, len(prompts))
            if first is None:
                raise UsageError(f'{setting}: {_described(error)}') from error
            place, problem = first
            raise UsageError(
                f'{setting}: {problem}: prompt {prompts[place].origin}, completion {completions[place]!r}'
            ) from error

    return reward


def _scores(function: Callable[..., Any], columns: Mapping[str, Sequence[Any]], count: int) -> np.ndarray:
    """Returns the scores of a function. Raises ValueError where they are not `count` finite numbers."""
    found = list(function(**columns))
    if len(found) != count:
        raise ValueError(f'{len(found)} rewards for {count} completions')
    for score in found:
        if not isinstance(score, numbers.Real | np.generic) or not math.isfinite(float(score)):
            raise ValueError(f'a reward is {score!r}, no finite number')
    return np.array(found, np.float64)


def _first_problem(
    function: Callable[..., Any], columns: Mapping[str, Sequence[Any]], count: int
) -> tuple[int, str] | None:
    """Returns (place, problem) of the first completion that a function cannot score alone; None: it can score all."""
    for place in range(count):
        try:
            _scores(function, {name: [values[place]] for name, values in columns.items()}, 1)
        except Exception as error:
            return place, _described(error)
    return None


def _described(error: Exception) -> str:
    return one_line(error) if type(error) is ValueError else f'{type(error).__name__}: {one_line(error)}'

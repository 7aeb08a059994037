"""Reward functions: what scores the completions of prompts, written by the user.

A function is named as `module:function` and called with keyword arguments, lists of equal length: `prompts`, the text
of the last message before each answer; `completions`, the texts that were generated; and each further field of the
records that it has an argument for, such as `answer`, with None where a record lacks it. It returns a number for each:
of Python, numpy, JAX or PyTorch, or an array of them. Resuming is exact where it is deterministic.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np

from mixln_jax.data.records import Prompt
from mixln_jax.system.errors import UsageError, one_line
from mixln_jax.system.signals import from_signal

Reward = Callable[[Sequence[Prompt], Sequence[str]], np.ndarray]  # -> [n] float64, finite
LARGEST = 1e9  # a reward; squares of them, summed over a batch, stay far inside float32


def exact(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Returns 1 for completions that are their record's `answer`, apart from blanks around it, else 0."""
    return [float(text.strip() == wanted) for text, wanted in zip(completions, answer, strict=True)]


class _BadReward(ValueError):
    """A reward that cannot be used. `place`: of its completion."""

    def __init__(self, place: int, problem: str) -> None:
        super().__init__(problem)
        self.place = place


def open_function(name: str, key: str = 'config.task.online.reward') -> Reward:
    """Returns the reward of a function `module:function`; the module is looked for as an import does.

    The reward raises UsageError where the function raises or ends the process, and where it returns what is no number
    from -LARGEST to LARGEST; that one names prompt and completion.

    Args:
        name: of the function.
        key: the setting that names it, for messages.

    Raises UsageError, naming the key: no such function, or one that cannot be called so.
    """
    setting = f'{key}={name}'
    function, parameters = _imported(name, setting)
    every = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    accepts = lambda field: every or field in parameters  # noqa: E731

    def reward(prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        fields = dict.fromkeys(field for prompt in prompts for field in prompt.fields)
        columns = {field: [prompt.fields.get(field) for prompt in prompts] for field in fields}
        columns |= {'prompts': [prompt.last for prompt in prompts], 'completions': list(completions)}
        columns = {field: values for field, values in columns.items() if accepts(field)}
        try:
            with jax.transfer_guard('allow'):  # a run forbids implicit transfers to its own code alone
                return _scores(function(**columns), len(prompts))
        except BaseException as error:  # the user's code may raise anything
            if from_signal(error):
                raise
            place = error.place if isinstance(error, _BadReward) else 0
            sample = f'prompt {prompts[place].origin}, completion {completions[place]!r}'
            if not isinstance(error, _BadReward):
                sample = f'called with {len(prompts):,} completions, the first of them: {sample}'
            raise UsageError(f'{setting}: {_described(error)}: {sample}') from error

    return reward


def _imported(name: str, setting: str) -> tuple[Callable[..., Any], Mapping[str, inspect.Parameter]]:
    """Returns a function `module:function` and its parameters. Raises UsageError, naming the setting."""
    module, _, attribute = name.partition(':')
    try:
        function = getattr(importlib.import_module(module), attribute)
        parameters = inspect.signature(function).parameters
    except BaseException as error:  # importing is the user's code
        if from_signal(error):
            raise
        raise UsageError(
            f'{setting}: cannot be used: {type(error).__name__}: {one_line(error)}; module:function is needed, of a '
            'module that can be imported from here'
        ) from error
    for called in (function, type(function).__call__):
        if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
            raise UsageError(f'{setting}: cannot be used: it is asynchronous, and nothing waits for it')
    return function, parameters


def _scores(returned: Any, count: int) -> np.ndarray:
    """Returns the rewards that a function has returned, [count] float64. Raises TypeError or ValueError for others."""
    if isinstance(returned, Mapping | Set):
        raise TypeError(f'it returns {type(returned).__name__}, not a list of numbers')
    found = list(returned.tolist() if hasattr(returned, 'tolist') else returned)
    if len(found) != count:
        raise ValueError(f'{len(found)} rewards for {count} completions')
    return np.array([_number(value, place) for place, value in enumerate(found)], np.float64)


def _number(value: Any, place: int) -> float:
    """Returns a reward as a number. Raises _BadReward."""
    try:
        number = value.item() if hasattr(value, 'item') else value  # of numpy, JAX or PyTorch
        score = float(number) if hasattr(number, '__float__') else math.nan  # a text has none, nor a complex number
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise _BadReward(place, f'a reward is {value!r}, no finite number')
    if abs(score) > LARGEST:
        raise _BadReward(place, f'a reward is {value!r}, beyond {LARGEST:g}')
    return score


def _described(error: BaseException) -> str:
    kind = () if isinstance(error, _BadReward) else (type(error).__name__,)
    return ': '.join(filter(None, [*kind, one_line(error)]))

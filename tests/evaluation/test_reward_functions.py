"""Reward functions: what they are called with, and the line that names what one of them fails on."""

import functools
import signal
import sys
import types
from decimal import Decimal
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixln_jax.data.records import Prompt
from mixln_jax.evaluation import reward_functions
from mixln_jax.system.errors import Stopped, UsageError


def prompt(number, **fields):
    record = {'prompt': f'p{number}'} | fields
    return Prompt(record, f'a.jsonl:{number}', [{'role': 'user', 'content': record['prompt']}])


PROMPTS = [prompt(1, answer='a', level=3), prompt(2, answer='b')]


@pytest.fixture
def opened(monkeypatch):
    """Opens a function as if it were in a module of the user's."""

    def made(function):
        module = types.ModuleType('users_rewards')
        module.function = function
        monkeypatch.setitem(sys.modules, 'users_rewards', module)
        return reward_functions.open_function('users_rewards:function')

    return made


@pytest.fixture(autouse=True)
def command(monkeypatch):
    """As in a command, whose handler of SIGINT is its own."""
    monkeypatch.setattr(signal, 'getsignal', lambda number: signal.SIG_DFL)


def test_what_it_is_called_with(opened):
    calls = []

    def function(prompts, completions, answer, level):
        calls.append((prompts, completions, answer, level))
        return [1, np.float32(0.5)]

    scores = opened(function)(PROMPTS, ['x', 'y'])
    assert scores.tolist() == [1, 0.5] and scores.dtype == np.float64
    assert calls == [(['p1', 'p2'], ['x', 'y'], ['a', 'b'], [3, None])]


def test_only_with_what_it_takes(opened):
    assert opened(lambda completions: [len(text) for text in completions])(PROMPTS, ['x', 'yy']).tolist() == [1, 2]
    seen = {}
    opened(lambda **fields: seen.update(fields) or [0, 0])(PROMPTS, ['x', 'y'])
    assert sorted(seen) == ['answer', 'completions', 'level', 'prompt', 'prompts']


def test_messages_and_instructions():
    messages = [{'role': 'user', 'content': 'one'}, {'role': 'assistant', 'content': 'two'},
                {'role': 'user', 'content': 'three'}]  # fmt: skip
    calling = {'role': 'assistant', 'tool_calls': [{'name': 'f'}]}  # says nothing
    assert Prompt({'messages': messages}, 'a:1', [*messages, calling]).last == ''
    module = types.ModuleType('users_rewards')
    module.function = lambda prompts, completions: [float(text == 'three') for text in prompts]
    sys.modules['users_rewards'] = module
    reward = reward_functions.open_function('users_rewards:function')
    assert reward([Prompt({'messages': messages}, 'a:1', messages)], ['x']).tolist() == [1]


def test_exact():
    reward = reward_functions.open_function('mixln_jax.evaluation.reward_functions:exact')
    assert reward(PROMPTS, [' a\n', 'ab']).tolist() == [1, 0]


def fails_on_y(completions):
    if 'y' in completions:
        raise KeyError('lost')
    return [1.0] * len(completions)


def ends(completions):
    sys.exit()


def interrupts(completions):
    raise KeyboardInterrupt


async def judged(completions):
    return [1.0] * len(completions)


class Judged:
    async def __call__(self, completions):
        return [1.0] * len(completions)


ALL = "called with 2 completions, the first of them: prompt a.jsonl:1, completion 'x'"
ONE = "prompt a.jsonl:2, completion 'y'"
of_y = lambda value, other=0: lambda completions: [value if text == 'y' else other for text in completions]  # noqa: E731
BAD = {
    'raises': (fails_on_y, f"KeyError: 'lost': {ALL}"),
    'ends the process': (ends, f'SystemExit: {ALL}'),
    'interrupts': (interrupts, f'KeyboardInterrupt: {ALL}'),
    'nan': (of_y(np.nan), f'a reward is nan, no finite number: {ONE}'),
    'infinite': (lambda completions: [-np.inf for _ in completions], "prompt a.jsonl:1, completion 'x'"),
    'none': (of_y(None, 1), f'a reward is None, no finite number: {ONE}'),
    'text': (lambda completions: ['1' for _ in completions], "a reward is '1', no finite number"),
    'text of numpy': (of_y(np.str_('1')), ONE),
    'complex': (of_y(1j), f'a reward is 1j, no finite number: {ONE}'),
    'complex of numpy': (of_y(np.complex64(1)), ONE),
    'complex array': (lambda completions: np.ones(2, complex), 'no finite number'),
    'huge': (of_y(-1e10), f'a reward is -10000000000.0, beyond 1e+09: {ONE}'),
    'an integer that no float holds': (of_y(10**400), f'no finite number: {ONE}'),
    'several numbers': (of_y(np.ones(2)), ONE),
    'a column': (lambda completions: np.ones((2, 1)), 'a reward is [1.0], no finite number'),
    'nan of jax': (lambda completions: jnp.array([0, jnp.nan]), f'a reward is nan, no finite number: {ONE}'),
    'too few': (lambda completions: [1.0], f'1 rewards for 2 completions: {ALL}'),
    'a number': (lambda completions: 1.0, 'TypeError'),
    'an array without axes': (lambda completions: np.float32(1), 'TypeError'),
    'by completion': (lambda completions: dict.fromkeys(completions, 1), 'TypeError: it returns dict, not a list'),
    'an argument that no record has': (lambda completions, wanted: [1] * len(completions), "'wanted'"),
}  # fmt: skip


@pytest.mark.parametrize('function, message', BAD.values(), ids=BAD)
def test_failures_are_named(opened, function, message):
    """The batch's own error, with the completion if it is known; nothing is called again, as judges may cost money."""
    calls = []

    @functools.wraps(function)
    def counted(**columns):
        calls.append(columns)
        return function(**columns)

    with pytest.raises(UsageError) as error:
        opened(counted)(PROMPTS, ['x', 'y'])
    assert str(error.value).startswith('config.task.online.reward=users_rewards:function: ')
    assert message in str(error.value) and '\n' not in str(error.value) and len(calls) == 1


NUMBERS = {
    'of numpy': lambda completions: [np.float16(1), np.array(2)],
    'an array of numpy': lambda completions: np.array([1, 2], np.int8),
    'of jax': lambda completions: [jnp.float32(1), jnp.ones(()) * 2],
    'an array of jax': lambda completions: jnp.arange(1, 3, dtype=jnp.bfloat16),
    'exact ones': lambda completions: [Fraction(1), Decimal(2)],
    'a generator': lambda completions: (float(n) for n in (1, 2)),
    'a truth value': lambda completions: [True, 2],
}


@pytest.mark.parametrize('function', NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_any_library(opened, function):
    """Also where a run forbids implicit transfers to devices."""
    with jax.transfer_guard('disallow'):
        assert opened(function)(PROMPTS, ['x', 'y']).tolist() == [1, 2]


@pytest.mark.parametrize('function', [judged, Judged()], ids=['function', 'object'])
def test_asynchronous_functions_are_refused(opened, function):
    with pytest.raises(UsageError, match='cannot be used: it is asynchronous'):
        opened(function)


@pytest.mark.parametrize('line', ['import sys; sys.exit(5)', 'raise KeyboardInterrupt', 'exit()'])
def test_a_module_that_ends_the_process(tmp_path, monkeypatch, line):
    (tmp_path / 'ending_rewards.py').write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match='ending_rewards:f: cannot be used: (SystemExit|KeyboardInterrupt)'):
        reward_functions.open_function('ending_rewards:f')


def test_signals_go_through(opened):
    def stopped(completions):
        raise Stopped('stopped by SIGTERM')

    with pytest.raises(Stopped):
        opened(stopped)(PROMPTS, ['x', 'y'])


@pytest.mark.parametrize(
    'name', ['nowhere:f', 'math:nothing', 'math', ':', 'math:pi', 'a b:c', '', '..:x', 'mixln_jax.nowhere:f']
)
def test_no_such_function(name):
    with pytest.raises(UsageError, match='config.task.online.reward=.*cannot be used'):
        reward_functions.open_function(name)

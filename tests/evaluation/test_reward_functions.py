"""Reward functions: what they are called with, and the line that names what one of them fails on."""

import sys
import types

import numpy as np
import pytest

from mixln_jax.data.records import Prompt
from mixln_jax.evaluation import reward_functions
from mixln_jax.system.errors import UsageError


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


BAD = {
    'raises': (fails_on_y, "KeyError: 'lost': prompt a.jsonl:2, completion 'y'"),
    'nan': (lambda completions: [np.nan if text == 'y' else 0 for text in completions],
            "a reward is nan, no finite number: prompt a.jsonl:2, completion 'y'"),
    'infinite': (lambda completions: [-np.inf for _ in completions], "prompt a.jsonl:1, completion 'x'"),
    'none': (lambda completions: [None if text == 'y' else 1 for text in completions],
             "a reward is None, no finite number: prompt a.jsonl:2, completion 'y'"),
    'text': (lambda completions: ['1' for _ in completions], "a reward is '1', no finite number"),
    'too few': (lambda completions: [1.0], '1 rewards for 2 completions'),
    'a number': (lambda completions: 1.0, 'TypeError'),
    'an argument that no record has': (lambda completions, wanted: [1] * len(completions), "'wanted'"),
}  # fmt: skip


@pytest.mark.parametrize('function, message', BAD.values(), ids=BAD)
def test_failures_name_prompt_and_completion(opened, function, message):
    with pytest.raises(UsageError) as error:
        opened(function)(PROMPTS, ['x', 'y'])
    assert str(error.value).startswith('config.task.online.reward=users_rewards:function: ')
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'name', ['nowhere:f', 'math:nothing', 'math', ':', 'math:pi', 'a b:c', '', '..:x', 'mixln_jax.nowhere:f']
)
def test_no_such_function(name):
    with pytest.raises(UsageError, match='config.task.online.reward=.*cannot be used'):
        reward_functions.open_function(name)

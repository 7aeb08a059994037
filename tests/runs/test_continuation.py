"""Learning rates on both sides of a change of schedule, and which checkpoint a run goes on from."""

import pytest

from mixln_jax import config as configs
from mixln_jax.runs import continuation
from mixln_jax.system.errors import UsageError


def values(num_steps, **optim):
    given = {'learning_rate': 1.0, 'min_ratio': 0.0, 'warmup_steps': 1} | optim
    return configs.public(configs.build({'num_steps': num_steps, 'optim': given}))


def test_rates_around_a_checkpoint():
    """By hand: the old rate is that of the checkpoint's last update, the new one that of the next."""
    old, new = values(5, schedule='linear'), values(8, schedule='constant', learning_rate=0.25)
    first, last = continuation.rates(configs.flatten(old), 2, 4)
    assert first > last > 0
    assert continuation.rates_around(3, old, new) == (first, 0.25)
    assert continuation.rates_around(3, old, old) is None
    assert continuation.rates_around(7, old, new)[1] == 0.25 and continuation.rates_around(8, old, new) is None


@pytest.mark.parametrize('schedule, expected', [('constant', None), ('wsd', 2)])
def test_only_a_decay_is_undone(schedule, expected):
    """Not a plateau that the longer run would leave before the newest checkpoint."""
    old = values(4, schedule=schedule, **({'decay_steps': 2} if schedule == 'wsd' else {}))
    new = values(8, schedule='wsd', decay_steps=6 if schedule == 'constant' else 2)
    if expected:
        assert continuation.check_continues('run', old, new, 'out', [2, 4]) == expected
    else:
        with pytest.raises(UsageError, match='the learning rate of update'):
            continuation.check_continues('run', old, new, 'out', [2, 4])

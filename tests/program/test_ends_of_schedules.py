"""The last learning rate of schedules that decay along a line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax.program import optim


@pytest.mark.parametrize('schedule', ['linear', 'wsd'])
@pytest.mark.parametrize('steps', [7, 41, 100, 1357, 2500])
def test_it_ends_at_zero_and_never_below(schedule, steps):
    keys = configs.Optim(schedule=schedule, min_ratio=0.0, learning_rate=3e-4, warmup_ratio=0.0)
    rates = np.asarray(jax.jit(jax.vmap(optim.schedule(keys, steps)))(jnp.arange(steps)))
    assert rates[-1] == 0 and (rates[:-1] > 0).all()

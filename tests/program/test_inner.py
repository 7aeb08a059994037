"""Several updates by the same completions: against updates one by one, accumulation, what counts, and bad steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import MODEL

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models import families
from mixln_jax.program import inner, optim, step
from mixln_jax.tasks.online import Online, Rollout
from mixln_jax.tasks.task import Context

T, ROWS = 12, 8


def task(**changes):
    online = configs.Online(reward='a:b', **{'completions': 4, 'beta': 0.0} | changes)
    return Online(families.from_config(MODEL, 'float32'), 'pad', T, online)


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    rollouts = [
        Rollout(
            rng.integers(0, 11, rng.integers(1, 5)), rng.integers(0, 11, rng.integers(1, 7)), rng.normal(), 0, True, i
        )
        for i in range(ROWS)
    ]
    return jax.tree.map(jnp.asarray, task().collect(rollouts, ROWS))


@functools.cache
def made(algorithm='rloo', updates=2, accumulate=1, learning_rate=0.05):
    """(state before, state after, metrics) of a step."""
    learner, optimizer = task(algorithm=algorithm, updates=updates), optim.optimizer(configs.Optim())
    state = step.init_state(learner, optimizer, jax.random.key(0))
    options = dict(task=learner, optimizer=optimizer, schedule=lambda s: learning_rate / (1 + s), accumulate=accumulate)
    after, metrics = jax.jit(functools.partial(inner.train_step, **options))(state, batch_of())
    return state, after, metrics


def differences(one, other):
    return max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize('algorithm', ['rloo', 'grpo'])
def test_updates_are_those_made_one_by_one(algorithm):
    state, after, metrics = made(algorithm)
    learner, optimizer = task(algorithm=algorithm, updates=2), optim.optimizer(configs.Optim())
    batch = learner.with_advantages(learner.recorded(state.params, batch_of(), Context(train=True)))
    losses = []
    update = jax.jit(functools.partial(step.train_step, task=learner, optimizer=optimizer, schedule=lambda s: 0.05))
    one = state
    for _ in range(2):
        one, found = update(one.replace(step=jnp.int32(0)), batch)
        losses.append(float(found['loss']))
    assert differences(after.params, one.params) < 1e-5 < differences(after.params, state.params)
    assert float(metrics['loss']) == pytest.approx(np.mean(losses), abs=1e-6) and abs(losses[0] - losses[1]) > 1e-3
    assert jax.tree.leaves(after.opt_state)[0] == jax.tree.leaves(one.opt_state)[0]


@pytest.mark.parametrize('updates', [1, 3])
def test_a_step_counts_once(updates):
    state, after, metrics = made(updates=updates)
    assert (int(state.step), int(after.step), int(after.bad_step)) == (0, 1, 0)
    assert float(metrics['learning_rate']) == pytest.approx(0.05)
    counts = {int(leaf.max()) for name, leaf in trees.named_leaves(after.opt_state) if name.endswith('count')}
    assert counts == {updates}


def test_accumulation_changes_nothing():
    _, one, metrics = made()
    _, four, others = made(accumulate=4)
    assert differences(one.params, four.params) < 1e-5
    for name in metrics:
        np.testing.assert_allclose(metrics[name], others[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_bad_update_undoes_the_whole_step():
    """The first update is too large for the second one to be finite."""
    state, after, metrics = made(learning_rate=1e30)
    assert metrics['bad_step'] == after.bad_step == 1 and after.step == 0
    assert differences(after.params, state.params) == differences(after.opt_state, state.opt_state) == 0
    _, fine, _ = made(updates=1, learning_rate=1e30)
    assert fine.bad_step == 0

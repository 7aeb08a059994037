"""Advantages, the clipped ratio and the KL divergence against cases computed by hand, gradients too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixln_jax.tasks import policy

REWARDS = np.array([[1.0, 2, 3, 6], [0, 0, 1, 0], [5, 5, 5, 5]], np.float32)


def test_rloo():
    got = policy.leave_one_out(REWARDS, None)
    np.testing.assert_allclose(got[0], [-8 / 3, -4 / 3, 0, 4], atol=1e-6)
    others = [[np.delete(row, i).mean() for i in range(4)] for row in REWARDS]
    np.testing.assert_allclose(got, REWARDS - others, atol=1e-6)


def test_grpo():
    got = policy.standardized(REWARDS, None)
    deviation = np.sqrt((4 + 1 + 0 + 9) / 3)
    np.testing.assert_allclose(got[0], np.array([-2, -1, 0, 3]) / (deviation + 1e-4), atol=1e-6)
    np.testing.assert_allclose(got[1], np.array([-1, -1, 3, -1]) / 4 / (0.5 + 1e-4), atol=1e-6)
    np.testing.assert_array_equal(got[2], 0)  # equal rewards teach nothing


def test_remax():
    baselines = np.array([[2.0] * 4, [0] * 4, [5] * 4], np.float32)
    np.testing.assert_array_equal(policy.above_baseline(REWARDS, baselines), REWARDS - baselines)


def test_one_completion_each_under_remax():
    np.testing.assert_array_equal(policy.above_baseline(np.float32([[3.0]]), np.float32([[1.0]])), [[2]])


def test_kl():
    """k3 of two log-probabilities, and that its mean over the tokens is the divergence."""
    p, q = np.array([0.7, 0.2, 0.1], np.float32), np.array([0.5, 0.25, 0.25], np.float32)
    got = policy.kl_estimates(jnp.log(p), jnp.log(q))
    np.testing.assert_allclose(got, q / p - 1 - np.log(q / p), atol=1e-6)
    assert float((p * got).sum()) == pytest.approx(float((p * np.log(p / q)).sum()), abs=1e-6)
    assert (np.asarray(got) >= 0).all()
    np.testing.assert_array_equal(policy.kl_estimates(jnp.log(p), jnp.log(p)), 0)


RNG = np.random.default_rng(0)
OLD = RNG.normal(-2, 0.5, (6, 5)).astype(np.float32)
NEW = OLD + RNG.normal(0, 0.2, OLD.shape).astype(np.float32)
MASK = (np.arange(5) < np.array([5, 3, 1, 4, 2, 0])[:, None]).astype(np.float32)
ADVANTAGES = np.array([1.5, -0.5, -2, 0.3, -1, 7], np.float32)
CLIP = 0.2


def surrogate(log_probs, per):
    ratios = policy.log_ratios(log_probs, OLD, MASK, per)
    losses, clipped = policy.clipped_losses(ratios, jnp.asarray(ADVANTAGES), CLIP)
    counted = MASK if per == 'tokens' else MASK.max(-1, keepdims=True)
    return (losses * counted).sum(), clipped * counted


def by_hand(per):
    """(loss, gradient, clipped) in float64: a ratio whose clipped product is the smaller one has no gradient."""
    loss, gradient, clipped = 0.0, np.zeros(OLD.shape), []
    for row in range(6):
        length = int(MASK[row].sum())
        groups = [[t] for t in range(length)] if per == 'tokens' else [[*range(length)]][: length > 0]
        for places in groups:
            ratio, A = np.exp(np.float64(NEW - OLD)[row, places].sum()), np.float64(ADVANTAGES[row])
            bounded = min(max(ratio, 1 - CLIP), 1 + CLIP)
            loss -= min(ratio * A, bounded * A)
            clipped.append(bounded * A < ratio * A)
            if not clipped[-1]:
                gradient[row, places] -= ratio * A
    return loss, gradient, sum(clipped)


@pytest.mark.parametrize('per', ['tokens', 'completions'])
def test_clipped_ratio(per):
    (loss, clipped), gradient = jax.value_and_grad(surrogate, has_aux=True)(jnp.asarray(NEW), per)
    wanted, wanted_gradient, count = by_hand(per)
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(gradient, wanted_gradient, atol=1e-5)
    assert int(clipped.sum()) == count > 0
    assert count < MASK.sum() if per == 'tokens' else count < 5


@pytest.mark.parametrize('per', ['tokens', 'completions'])
def test_before_an_update_the_gradient_is_that_of_reinforce(per):
    gradient = jax.grad(lambda log_probs: surrogate(log_probs, per)[0])(jnp.asarray(OLD))
    np.testing.assert_allclose(gradient, -ADVANTAGES[:, None] * MASK, atol=1e-6)

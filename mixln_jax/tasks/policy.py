"""Policy gradients from rewards of whole completions: advantages, the clipped ratio, the KL divergence.

N prompts with G completions each make B = N G rows, those of a prompt one after the other; T positions. A mask [B, T]
is 1 at the tokens of the completions. Log-probabilities are in nats.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

SMALLEST = 1e-4  # added to a standard deviation, as in TRL


class Objective(NamedTuple):
    """What an algorithm optimises.

    `advantages`: (rewards [N, G], baselines [N, G]) -> [N, G]. `per`: what the loss is the mean of: `tokens`, each with
    a ratio of its own, or `completions`, with the ratio of their whole probabilities. `kl`: where the KL divergence
    counts by default.
    """

    advantages: Callable[[jax.Array, jax.Array], jax.Array]
    per: str
    kl: str


def leave_one_out(rewards: jax.Array, baselines: jax.Array) -> jax.Array:
    """Returns the rewards [N, G] minus the mean of the other rewards of the prompt.

    Ahmadian et al. 2024 (RLOO, arXiv 2402.14740), equation 8.
    """
    del baselines
    count = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdims=True)) * (count / (count - 1))


def standardized(rewards: jax.Array, baselines: jax.Array) -> jax.Array:
    """Returns the rewards [N, G] minus their mean over the prompt, divided by their standard deviation (of a sample,
    with G - 1) plus SMALLEST.

    Shao et al. 2024 (GRPO, arXiv 2402.03300), section 4.1.2.
    """
    del baselines
    return (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True, ddof=1) + SMALLEST)


def above_baseline(rewards: jax.Array, baselines: jax.Array) -> jax.Array:
    """Returns the rewards [N, G] minus the reward of the likeliest completion of the prompt.

    Li et al. 2023 (ReMax, arXiv 2310.10505), algorithm 2.
    """
    return rewards - baselines


OBJECTIVES = {
    'rloo': Objective(leave_one_out, 'completions', 'reward'),
    'grpo': Objective(standardized, 'tokens', 'loss'),
    'remax': Objective(above_baseline, 'completions', 'reward'),
}


def kl_estimates(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns an estimate [B, T] of the KL divergence from the reference at each sampled token: exp(d) - d - 1 with
    d = reference - log_probs. It is never negative, and unbiased for tokens drawn by `log_probs`.

    Schulman 2020 (Approximating KL Divergence), k3; Shao et al. 2024, equation 4.
    """
    difference = reference - log_probs
    return jnp.expm1(difference) - difference


def log_ratios(log_probs: jax.Array, old: jax.Array, mask: jax.Array, per: str) -> jax.Array:
    """Returns the logarithm of the ratio of new and old probability: [B, T] of each token, or [B, 1] of each
    completion."""
    ratios = (log_probs - old) * mask
    return ratios if per == 'tokens' else ratios.sum(-1, keepdims=True)


def clipped_losses(log_ratio: jax.Array, advantages: jax.Array, clip: float) -> tuple[jax.Array, jax.Array]:
    """Returns -min(r A, clip(r, 1 - c, 1 + c) A), and where the clipped one is less, so that there is no gradient.

    Schulman et al. 2017 (PPO, arXiv 1707.06347), equation 7.

    Args:
        log_ratio: log r, [B, T] or [B, 1].
        advantages: A, [B].
        clip: c.
    """
    ratio, advantages = jnp.exp(log_ratio), advantages[:, None]
    plain, bounded = ratio * advantages, jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    return -jnp.minimum(plain, bounded), bounded < plain

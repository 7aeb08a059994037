"""Collapse: a network that knows the frequencies of tokens alone."""

import sys

from mixln_jax.system import console
from mixln_jax.system.errors import NumericsError


class Collapse:
    """Sees when a network knows the frequencies of tokens alone: the state of Post-LN networks that have collapsed.

    Looked for, behind the warm-up, are WINDOW steps whose second half has a mean loss within NEAR of the entropy of the
    tokens, as a share of it, and is no better than the first half by PROGRESS of that.
    """

    WINDOW, NEAR, PROGRESS = 200, 0.05, 0.01

    def __init__(self, action, warmup, entropy):
        """`action`: warn, stop or ignore; `warmup`: steps; `entropy`: () -> nats, asked once."""
        self._action, self._start, self._entropy = action, warmup, entropy
        self._losses, self._level = [], None

    def see(self, step, loss):
        """Takes a step's loss. Raises NumericsError, or warns once, where the network has collapsed."""
        if self._action == 'ignore' or step <= self._start:
            return
        self._losses.append(loss)
        if len(self._losses) < self.WINDOW:
            return
        self._level = self._level or self._entropy()
        half = self.WINDOW // 2
        before, mean = (sum(losses) / half for losses in (self._losses[:half], self._losses[half:]))
        self._losses = []
        if abs(mean / self._level - 1) < self.NEAR and before - mean < self.PROGRESS * self._level:
            problem = (
                f'step {step}: the mean loss of {half} steps, {mean:.2f}, stays near the {self._level:.2f} of the '
                "tokens' frequencies alone: the network has collapsed; a longer warm-up (config.optim.warmup_ratio), "
                'a lower learning rate or fewer Post-LN layers may help'
            )
            if self._action == 'stop':
                raise NumericsError(problem)
            self._action = 'ignore'
            console.say(f'mixln_jax: warning: {problem}', file=sys.stderr)

"""Collapse: a network that predicts the frequencies of tokens and nothing else."""

import sys
from collections.abc import Callable

from mixln_jax.system import console
from mixln_jax.system.errors import NumericsError

COLLAPSED = 'the network has collapsed'  # in the line that says so, which sweeps look for


class Collapse:
    """Detects a network that predicts the frequencies of tokens and nothing else, as collapsed Post-LN networks do.

    The losses after the warm-up are judged WINDOW steps at a time. The network has collapsed if the mean loss of the
    second half differs from the entropy of the tokens by less than the share NEAR of it, and is not lower than the mean
    of the first half by the share PROGRESS of it.
    """

    WINDOW, NEAR, PROGRESS = 200, 0.05, 0.01

    def __init__(self, action: str, warmup: int, entropy: Callable[[], float | None]) -> None:
        """`action`: warn, stop or ignore; `warmup`: steps; `entropy`: of the tokens, in nats, None: it means nothing;
        called once."""
        self._action, self._start, self._entropy = action, warmup, entropy
        self._losses: list[float] = []
        self._level: float | None = None

    def add(self, step: int, loss: float) -> None:
        """Takes the loss of a step. If the network has collapsed, warns once or raises NumericsError."""
        if self._action == 'ignore' or step <= self._start:
            return
        self._losses.append(loss)
        if len(self._losses) < self.WINDOW:
            return
        level = self._level = self._level or self._entropy()
        if level is None:
            self._action = 'ignore'
            return
        half = self.WINDOW // 2
        before, mean = (sum(losses) / half for losses in (self._losses[:half], self._losses[half:]))
        self._losses = []
        if abs(mean / level - 1) < self.NEAR and before - mean < self.PROGRESS * level:
            problem = (
                f'step {step}: the mean loss of {half} steps, {mean:.2f}, stays near {level:.2f}, the loss of a '
                f'network that knows only how frequent each token is: {COLLAPSED}; a longer warm-up '
                '(config.optim.warmup_ratio), a lower learning rate or fewer Post-LN layers may help'
            )
            if self._action == 'stop':
                raise NumericsError(problem)
            self._action = 'ignore'
            console.say(f'mixln_jax: warning: {problem}', file=sys.stderr)

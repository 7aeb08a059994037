"""Collapse: a network that predicts the frequencies of tokens and nothing else."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mixln_jax.analysis import stability
from mixln_jax.system import console
from mixln_jax.system.errors import NumericsError

COLLAPSED = 'the network has collapsed'  # in the line that says so, which sweeps look for


class Collapse:
    """Detects a network that predicts the frequencies of tokens and nothing else, as collapsed Post-LN networks do.

    The losses after the warm-up are judged WINDOW steps at a time. The network has collapsed if the mean loss of the
    second half differs from the entropy of the tokens by less than the share NEAR of it, and is not lower than the mean
    of the first half by the share PROGRESS of it.
    """

    WINDOW, NEAR, PROGRESS = 200, stability.NEAR, 0.01

    def __init__(
        self,
        action: str,
        warmup: int,
        entropy: Callable[[], float | None],
        step: int = 0,
        losses: Sequence[float] = (),
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to watch a run.

        Args:
            action: warn, stop or ignore.
            warmup: steps.
            entropy: of the tokens, in nats; None: it means nothing. Called once.
            step: of the checkpoint that a run continues from.
            losses: of the steps up to that one, at least WINDOW of them where there are as many.
            record: what `record` returned then.
        """
        self._action, self._start, self._entropy = action, warmup, entropy
        pending = max(0, step - warmup) % self.WINDOW
        self._losses = list(losses)[-pending:] if pending else []
        self._level: float | None = None
        self._sound = tuple((record or {}).get('sound', (0, math.inf)))  # (step, loss) of the best checkpoint

    def keep(self, step: int, loss: float) -> int | None:
        """Returns the step whose checkpoint has to stay when `step` is saved, the one with the lowest loss; None: none.

        `loss`: the mean of the last few steps. As long as a network learns, its newest checkpoint is the one.
        """
        if self._action != 'stop':
            return None
        self._sound = min((step, loss), self._sound, key=lambda one: one[1])  # of equal ones the newest
        return self._sound[0]

    def record(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps for a run that continues."""
        return {'sound': self._sound} if self._sound[0] else {}

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
                sound, lowest = self._sound
                kept = f'checkpoint {sound}' if lowest < level * (1 - self.NEAR) else 'no checkpoint'
                raise NumericsError(f'{problem}; {kept} is from before the collapse')
            self._action = 'ignore'
            console.say(f'mixln_jax: warning: {problem}', file=sys.stderr)

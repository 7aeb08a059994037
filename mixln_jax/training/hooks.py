"""What happens between the steps of training, and when."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax

from mixln_jax.program.step import State
from mixln_jax.runs import checkpoint, log
from mixln_jax.system import console
from mixln_jax.system.errors import NumericsError


class Hook(Protocol):
    """Called with a step's number and the state after it, where that step is due."""

    every: int

    def due(self, step: int, last: int) -> bool:
        """Returns whether it is called after `step`, of `last` in all."""

    def __call__(self, step: int, state: State):
        """Does it."""


@dataclasses.dataclass
class _Every:
    """Due every `every` steps (0: never) and after the last one."""

    every: int

    def due(self, step: int, last: int) -> bool:
        """Returns whether it is called after `step`, of `last` in all."""
        return step == last or bool(self.every and step % self.every == 0)


@dataclasses.dataclass
class Evaluation(_Every):
    """Evaluates the weights into the step's metrics line and prints one line. Raises NumericsError for a loss that is
    not finite."""

    evaluate: Callable[[Any, jax.Array], dict[str, float | None]]  # (weights, step) -> values of a metrics line
    headline: str  # the number that people look at first
    metrics: log.Metrics

    def __call__(self, step: int, state: State):
        values = self.evaluate(state.params, state.step)
        if not math.isfinite(values['eval/loss']):
            raise NumericsError(f'step {step}: the evaluation loss is not finite')
        self.metrics.add(step, values)
        console.say(
            f'eval at step {step}: loss {values["eval/loss"]:.4f}  {self.headline} '
            f'{values[f"eval/{self.headline}"]:.2f}  ({values["eval/tokens"]:,} tokens)'
        )


@dataclasses.dataclass
class Analysis(_Every):
    """Measures what each layer does into the step's metrics line."""

    measure: Callable[[Any, jax.Array], dict[str, Any]]  # (weights, step) -> values of a metrics line
    metrics: log.Metrics

    def __call__(self, step: int, state: State):
        self.metrics.add(step, self.measure(state.params, state.step))


@dataclasses.dataclass
class Saving(_Every):
    """Saves a checkpoint once the metrics up to its step are on disk."""

    checkpoints: checkpoint.Checkpoints
    metrics: log.Metrics
    about: Callable[[], dict[str, Any]]  # what a checkpoint holds besides the state

    def __call__(self, step: int, state: State, complete: bool = True, wait: bool = False):
        """Saves `step` unless it is saved; `complete`: its metrics line is; `wait`: until everything is on disk."""
        if complete:
            self.metrics.flush()
        if self.checkpoints.latest() != step:
            record = {'open_line': self.metrics.open_line, 'metrics': self.metrics.seal()}
            self.checkpoints.save(step, state, self.about() | record)
        if wait:
            self.checkpoints.wait()


def profiled(batches: Iterator, first_step: int, start: int, steps: int, workdir: str | pathlib.Path) -> Iterator:
    """Passes `batches` on and records steps `start` to `start + steps - 1` with jax.profiler into workdir/profile.

    Close it, as any generator, when the run ends.
    """
    running = False
    try:
        for step, batch in enumerate(batches, first_step):
            if steps and step == start:
                jax.profiler.start_trace(str(pathlib.Path(workdir) / 'profile'))
                running = True
            if running and step == start + steps:
                jax.profiler.stop_trace()
                running = False
            yield batch
    finally:  # also where the run ends inside the window
        if running:
            jax.profiler.stop_trace()

"""What happens between the steps of training, and when."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import jax

from mixln_jax.program.step import State
from mixln_jax.runs import checkpoint, log
from mixln_jax.system import console
from mixln_jax.system.errors import NumericsError


class Hook(Protocol):
    """Something that is done after some of the steps."""

    every: int

    def due(self, step: int, last: int) -> bool:
        """Returns whether the hook is to run after `step`; the run ends with step `last`."""

    def __call__(self, step: int, state: State) -> None:
        """Runs the hook with the state after `step`."""


@dataclasses.dataclass
class _Every:
    """A hook that is due every `every` steps (0: never) and after the last step."""

    every: int

    def due(self, step: int, last: int) -> bool:
        """Returns whether the hook is to run after `step`; the run ends with step `last`."""
        return step == last or bool(self.every and step % self.every == 0)


@dataclasses.dataclass
class Evaluation(_Every):
    """Evaluates the weights, adds the results to the step's metrics line and prints one line."""

    evaluate: Callable[[Any, Any], dict[str, float | None]]  # (weights, step) -> values of a metrics line
    headline: str  # the task's most important metric
    metrics: log.Metrics

    def __call__(self, step: int, state: State) -> None:
        """Evaluates `state`. Raises NumericsError if the loss is not finite."""
        values = self.evaluate(state.averaged, state.step)
        loss = values['eval/loss']
        if loss is None or not math.isfinite(loss):
            raise NumericsError(f'step {step}: the evaluation loss is not finite')
        self.metrics.add(step, values)
        console.say(
            f'eval at step {step}: loss {loss:.4f}  {self.headline} '
            f'{values[f"eval/{self.headline}"]:.2f}  ({values["eval/tokens"]:,} tokens)'
        )


@dataclasses.dataclass
class Analysis(_Every):
    """Measures each layer and adds the results to the step's metrics line."""

    measure: Callable[[Any, jax.Array], dict[str, Any]]  # (weights, step) -> values of a metrics line
    metrics: log.Metrics

    def __call__(self, step: int, state: State) -> None:
        """Measures `state`."""
        self.metrics.add(step, self.measure(state.averaged, state.step))


@dataclasses.dataclass
class Saving(_Every):
    """Saves a checkpoint once the metrics up to its step are on disk."""

    checkpoints: checkpoint.Checkpoints
    metrics: log.Metrics
    about: Callable[[], dict[str, Any]]  # -> further values of a checkpoint's JSON object

    def __call__(self, step: int, state: State, complete: bool = True, wait: bool = False) -> None:
        """Saves `state` unless `step` is saved already.

        `complete`: the step's metrics line is complete; `wait`: until everything is on disk.
        """
        if complete:
            self.metrics.flush()
        if self.checkpoints.latest() != step:
            record = {'open_line': self.metrics.open_line, 'metrics': self.metrics.seal()}
            self.checkpoints.save(step, state.own, self.about() | record)
        if wait:
            self.checkpoints.wait()


def profiled(
    batches: Iterator[Any], first_step: int, start: int, steps: int, workdir: str | os.PathLike
) -> Generator[Any]:
    """Yields `batches` and records steps `start` to `start + steps - 1` with jax.profiler into workdir/profile.

    `first_step` is the number of the first batch. Close the generator when the run ends.
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
    finally:  # the run may end inside the window
        if running:
            jax.profiler.stop_trace()

"""What happens between the steps of training, and when."""

import dataclasses
import math
import os
import pathlib
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import jax

from mixln_jax.distributed import processes
from mixln_jax.program.step import State, reference
from mixln_jax.runs import checkpoint, log
from mixln_jax.runs.best import best_step
from mixln_jax.system import console, outputs
from mixln_jax.system.errors import NumericsError
from mixln_jax.tasks.task import Task


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

    evaluate: Callable[[State], dict[str, float | None]]  # state -> values of a metrics line
    task: Task
    metrics: log.Metrics

    def __call__(self, step: int, state: State) -> None:
        """Evaluates `state`. Raises NumericsError if the loss is not finite."""
        values = self.evaluate(state)
        loss = values['eval/loss']
        if loss is None or not math.isfinite(loss):
            raise NumericsError(f'step {step}: the evaluation loss is not finite')
        self.metrics.add(step, values)
        headline, number = self.task.headline, values[f'eval/{self.task.headline}']
        shown = f'loss {loss:.4f}  {headline} {number:.{self.task.digits}f}'
        count = self.task.units(values['eval/tokens'] or 0)
        console.say(f'eval at step {step}: {shown}  ({count:,.0f} {self.task.unit})')


@dataclasses.dataclass
class Analysis(_Every):
    """Measures each layer and adds the results to the step's metrics line."""

    measure: Callable[[Any, jax.Array, Any], dict[str, Any]]  # (weights, step, reference) -> values of a metrics line
    task: Task
    metrics: log.Metrics

    def __call__(self, step: int, state: State) -> None:
        """Measures `state`."""
        network = state.averaged
        compared = reference(self.task, network, state.reference)
        self.metrics.add(step, self.measure(network, state.step, compared))


@dataclasses.dataclass
class Probe:
    """Measures what the training kernels hide, on rows of the last batch, and adds the results to the step's metrics
    line. It is due every `every` steps (0: never)."""

    every: int
    measure: Callable[[Any, Any, jax.Array], dict[str, jax.Array]]  # (weights, batch, step) -> signs by name
    batch: Callable[[], Any]  # -> the last batch; None: a run that continues has none yet
    metrics: log.Metrics

    def due(self, step: int, last: int) -> bool:
        """Returns whether the hook is to run after `step`; not after the `last` one as such."""
        del last
        return bool(self.every and step % self.every == 0)

    def __call__(self, step: int, state: State) -> None:
        """Measures `state`. Where the step was cut short and has no batch any more, its line has the results."""
        if (batch := self.batch()) is not None:
            signs = jax.device_get(self.measure(state.network, batch, state.step))
            self.metrics.add(step, {f'stability/{name}': values.tolist() for name, values in signs.items()})


@dataclasses.dataclass
class Samples(_Every):
    """Writes continuations of texts to a file for each step."""

    write: Callable[[Any, jax.Array], bytes]  # (weights, step) -> JSON lines
    folder: pathlib.Path

    def __call__(self, step: int, state: State) -> None:
        """Writes `<folder>/<step>.jsonl` with the weights of `state`."""
        outputs.write(self.folder / f'{step}.jsonl', self.write(state.averaged, state.step))


@dataclasses.dataclass
class Saving(_Every):
    """Saves a checkpoint once the metrics up to its step are on disk, also `minutes` after the last one (0: never).

    The clock is that of process 0. It is read every `look_every` steps, for all processes wait for it.
    """

    checkpoints: checkpoint.Checkpoints
    metrics: log.Metrics
    about: Callable[[], dict[str, Any]]  # -> further values of a checkpoint's JSON object
    minutes: float = 0.0
    look_every: int = 1
    keep: Callable[[int], int | None] = lambda step: None  # step to be saved -> the one that stays, see Collapse.keep
    _saved_at: float = dataclasses.field(default_factory=lambda: time.monotonic(), init=False)

    def due(self, step: int, last: int) -> bool:
        """Returns whether to save `step`; the run ends with step `last`. Every process has to call it."""
        return super().due(step, last) or self._time_is_up(step)

    def _time_is_up(self, step: int) -> bool:
        if not self.minutes or step % self.look_every:
            return False
        return bool(processes.of_first(time.monotonic() - self._saved_at >= 60 * self.minutes))

    def __call__(self, step: int, state: State, complete: bool = True, wait: bool = False) -> None:
        """Saves `state` unless `step` is saved already.

        `complete`: the step's metrics line is complete; `wait`: until everything is on disk.
        """
        if complete:
            self.metrics.flush()
        if self.checkpoints.latest() != step:
            self.checkpoints.keep_sound(self.keep(step))
            record = {'open_line': self.metrics.open_line, 'metrics': self.metrics.seal()}
            self.checkpoints.save(step, state.own, self.about() | record)
            self._saved_at = time.monotonic()
        if wait:
            self.checkpoints.wait()


@dataclasses.dataclass
class Best(_Every):
    """Saves a step whose evaluation is better than those of all checkpoints, and keeps the best of them.

    It is due where the evaluation is, and runs after it. Process 0, which has all lines, decides.
    """

    metric: str
    task: Task
    saving: Saving

    def __call__(self, step: int, state: State) -> None:
        """Saves `state` if it is the best."""
        self.saving.metrics.flush()
        if self.choose(step) == step:
            self.saving(step, state)

    def choose(self, *steps: int) -> int | None:
        """Returns the best of `steps` and those that are saved, which stays from now on."""
        checkpoints = self.saving.checkpoints
        found = best_step(self.saving.metrics.lines, self.metric, {*checkpoints.saved(), *steps}, self.task)
        checkpoints.best = processes.of_first(found or 0) or None
        return checkpoints.best


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

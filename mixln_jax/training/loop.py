"""The training loop."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax

from mixln_jax.program.step import State
from mixln_jax.system import console
from mixln_jax.system.errors import NumericsError, Stopped, one_line, to_exit
from mixln_jax.system.signals import Stop
from mixln_jax.training.hooks import Hook
from mixln_jax.training.meter import Meter

Step = Callable[[State, Mapping[str, jax.Array]], tuple[State, dict[str, jax.Array]]]


class Save(Protocol):
    """Saves a step; does nothing if it is saved already."""

    def __call__(self, step: int, state: State, complete: bool = True, wait: bool = False) -> None:
        """Saves `state`; `complete`: the step's metrics line is complete; `wait`: until everything is on disk."""


@dataclasses.dataclass(frozen=True)
class _Pause:
    """What happens between two steps: hooks, and the answer to a signal."""

    hooks: Sequence[Hook]
    last: int
    meter: Meter
    save: Save
    stop: Stop

    def due(self, step: int) -> bool:
        """Returns whether a signal or a hook needs the state after `step`. Every process has to call it."""
        return self.stop.reached(step) or any(hook.due(step, self.last) for hook in self.hooks)

    def run(self, step: int, state: State) -> None:
        """Runs the hooks that are due after `step`. If a signal has arrived, saves `step` and raises Stopped."""
        with self.meter.paused():
            try:
                for hook in self.hooks:
                    if hook.due(step, self.last):
                        hook(step, state)
            except NumericsError:  # weights that an update has ruined are noticed here first
                self.meter.debug(step, state)
                raise
            except BaseException as error:
                if _alone() or isinstance(error, Stopped):
                    self.rescue(step, state, complete=False)
                raise
            self.meter.flush()
            if self.stop.requested:
                self.save(step, state)
                self.stop.check()

    def rescue(self, step: int, state: State, complete: bool = True) -> None:
        """Saves `step` after an error. If that fails too, it is reported, and the first error is raised on."""
        try:
            self.save(step, state, complete=complete, wait=True)
            console.say(f'step {step} is saved')
        except Exception as error:
            problem = one_line(to_exit(error))
            console.say(f'mixln_jax: warning: step {step} cannot be saved: {problem}', file=sys.stderr)


def _alone() -> bool:
    """Returns whether this is the only process. Several save together: one with an error would wait for ever."""
    return jax.process_count() == 1


def fit(
    state: State,
    step: Step,
    batches: Iterator[Any],
    hooks: Sequence[Hook],
    *,
    first: int,
    last: int,
    meter: Meter,
    save: Save,
    stop: Stop,
    resume_hooks: bool = False,
    collect: Callable[[State, Any], Any] = lambda state, batch: batch,
) -> State:
    """Runs steps `first` to `last` and returns the final state.

    The metrics of a step are fetched while the next one runs, unless a hook needs the finished step. After a signal the
    loop ends with the current step, or while it waits for a batch, and saves a checkpoint.

    Args:
        state: the state to begin with; it is donated.
        step: (state, batch) -> (state, metrics), compiled.
        batches: batches on devices; the first one is that of step `first`.
        hooks: run in this order after the steps that they are due at.
        first, last: numbers of steps; the first step of a run is 1.
        meter: takes the metrics of every step.
        save: for a stop or an error.
        stop: the flag that signals set.
        resume_hooks: first run the hooks of step `first - 1`, which a signal has cut short.
        collect: (state, batch) -> the batch that the state learns from, where it depends on the state.

    Raises:
        Stopped: a signal has arrived.
        NumericsError: a value is not finite, or the network has collapsed.
        Exception: whatever a reader, `collect` or a hook raises, after a checkpoint of the last complete step.
    """
    pause = _Pause(hooks, last, meter, save, stop)
    if resume_hooks:
        pause.run(first - 1, state)
    previous = None
    for number in range(first, last + 1):
        try:
            with meter.waiting(previous):
                batch = next(batches)
            batch = collect(state, batch)
        except BaseException:
            if previous:
                meter.add(*previous, state)
            if number > first and _alone():
                pause.rescue(number - 1, state)
            raise
        state, values = step(state, batch)
        if previous:
            meter.add(*previous, state)
            meter.flush()
        previous = number, values, batch
        if pause.due(number):
            meter.add(*previous, state)
            previous = None
            pause.run(number, state)
    return state

"""The training loop."""

import sys

import jax

from mixln_jax.system import console
from mixln_jax.system.errors import NumericsError, Stopped, one_line, to_exit


def fit(state, step, batches, hooks, *, first, last, meter, save, stop, resume_hooks=False):
    """Runs steps `first` to `last`.

    The metrics of a step are fetched while the next one runs, except where a hook needs the finished step. A signal
    ends the loop after the step at hand, or in the wait for a batch, after a checkpoint.

    Args:
        state: State; donated.
        step: (state, batch) -> (state, metrics), compiled.
        batches: iterator of batches on devices, the first of them for step `first`.
        hooks: in order; see hooks.py.
        first, last: numbers of steps, from 1.
        meter: Meter, given each step's metrics.
        save: (step, state, complete), idempotent, for a stop outside the plan.
        stop: signals.Stop.
        resume_hooks: run the hooks of step `first - 1`, which a signal had cut short.

    Returns:
        The final State.

    Raises:
        Stopped; NumericsError; whatever reading or a hook raises, after a checkpoint of the last whole step.
    """
    alone = jax.process_count() == 1  # several save together: one that has an error by itself would wait for ever

    def run_hooks(number, state):
        with meter.paused():
            try:
                for hook in hooks:
                    if hook.due(number, last):
                        hook(number, state)
            except NumericsError:  # weights that an update has ruined show here first
                meter.debug(number, state)
                raise
            except BaseException as error:
                if alone or isinstance(error, Stopped):
                    rescue(number, state, complete=False)
                raise
            meter.flush()
            if stop.requested:
                save(number, state)
                stop.check()

    def rescue(number, state, **options):
        """Saves what an error would lose. Where that fails too it is said, and the error stands."""
        try:
            save(number, state, wait=True, **options)
            console.say(f'step {number} is saved')
        except Exception as error:
            problem = one_line(to_exit(error))
            console.say(f'mixln_jax: warning: step {number} cannot be saved: {problem}', file=sys.stderr)

    if resume_hooks:
        run_hooks(first - 1, state)
    previous = None
    for number in range(first, last + 1):
        try:
            with meter.waiting(previous):
                batch = next(batches)
        except BaseException:
            if previous:
                meter.add(*previous, state)
            if number > first and alone:
                rescue(number - 1, state)  # what is trained is trained
            raise
        state, values = step(state, batch)
        if previous:
            meter.add(*previous, state)
            meter.flush()
        previous = number, values, batch
        if stop.reached(number) or any(hook.due(number, last) for hook in hooks):
            meter.add(*previous, state)
            previous = None
            run_hooks(number, state)
    return state

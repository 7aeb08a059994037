"""When something happens during training.

A hook is (every, fn): fn(step, state) runs after every `every` steps (0: never) and after the last one.
"""

import math
import pathlib

import jax

from mixln_jax.system import console
from mixln_jax.system.errors import NumericsError


def evaluation(every, evaluate, metrics):
    """Evaluates the weights into the step's metrics line and prints one line."""

    def run(step, state):
        values = evaluate(state.params)
        if not math.isfinite(values['eval/loss']):
            raise NumericsError(f'step {step}: the evaluation loss is not finite')
        metrics.add(step, values)
        console.say(
            f'eval at step {step}: loss {values["eval/loss"]:.4f}  perplexity {values["eval/perplexity"]:.2f}  '
            f'({values["eval/tokens"]:,} tokens)'
        )

    return every, run


def analysis(every, analyse, metrics):
    """Measures what each layer does, (params) -> values, into the step's metrics line."""

    def run(step, state):
        metrics.add(step, analyse(state.params))

    return every, run


def saving(every, checkpoints, metrics, extra):
    """Saves a checkpoint once the metrics up to it are on disk; `extra()` gives what goes with the state."""

    def run(step, state, complete=True, wait=False):
        if complete:
            metrics.flush()
        if checkpoints.latest() != step:
            about = extra() | {'open_line': metrics.open_line, 'metrics': metrics.seal()}
            checkpoints.save(step, state, about)
        if wait:
            checkpoints.wait()

    return every, run


def profiled(batches, first_step, start, steps, workdir):
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

"""The training loop."""

import contextlib
import json
import pathlib
import sys
import time

import jax
import numpy as np

from mixln_jax import measures, record
from mixln_jax import mesh as meshes
from mixln_jax import metrics as formulas
from mixln_jax.exits import NumericsError, Stopped, first_line

LONGEST_WAIT = 0.05  # share of the time; beyond it the input holds the device up
PATIENCE = 30  # seconds of training before that is said


def fit(state, step, batches, hooks, *, first, last, meter, save, stop, resume_hooks=False):
    """Runs steps `first` to `last`.

    The metrics of a step are fetched while the next one runs, except where a hook needs the finished step. A signal
    ends the loop after the step at hand, or in the wait for a batch, after a checkpoint.

    Args:
        state: State; donated.
        step: (state, batch) -> (state, metrics), compiled.
        batches: iterator of batches on devices, the first of them for step `first`.
        hooks: [(every, fn)], in order; see hooks.py.
        first, last: numbers of steps, from 1.
        meter: Meter, given each step's metrics.
        save: (step, state, complete), idempotent, for a stop outside the plan.
        stop: exits.Stop.
        resume_hooks: run the hooks of step `first - 1`, which a signal had cut short.

    Returns:
        The final State.

    Raises:
        Stopped; NumericsError; whatever reading or a hook raises, after a checkpoint of the last whole step.
    """
    alone = jax.process_count() == 1  # several save together: one that has an error by itself would wait for ever

    def due(number):
        return [hook for every, hook in hooks if number == last or (every and number % every == 0)]

    def run_hooks(number, state):
        with meter.paused():
            try:
                for hook in due(number):
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
            record.say(f'step {number} is saved')
        except Exception as error:
            record.say(f'mixln_jax: step {number} cannot be saved: {first_line(error)}', file=sys.stderr)

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
        if stop.reached(number) or due(number):
            meter.add(*previous, state)
            previous = None
            run_hooks(number, state)
    return state


class Meter:
    """Turns the steps' metrics into metrics lines and progress lines, counts tokens, stops a run that has gone bad."""

    def __init__(
        self,
        metrics,
        workdir,
        *,
        num_steps,
        log_every,
        log_also,
        tokens,
        flops_per_position,
        devices,
        first_line,
        collapse,
        save_debug,
    ):
        """`log_also`: (step) -> whether a step off the rhythm of `log_every` has a line; `tokens`: seen before;
        `first_line`: what only the first line says, such as the compile time; `collapse`: Collapse; `save_debug`:
        (state), keeps it for debug/."""
        self._collapse, self._save_debug = collapse, save_debug
        self.tokens = tokens
        self._metrics, self._workdir = metrics, pathlib.Path(workdir)
        self._num_steps, self._log_every, self._log_also = num_steps, log_every, log_also
        self._flops_per_position, self._devices, self._first_line = flops_per_position, devices, first_line
        self._recent = []  # the last two batches, for debug/
        self._waited = None  # seconds in all, and of them waiting for data
        self._warned = False
        self._start_window()

    def add(self, step, values, batch, state):
        """Takes the metrics of a finished step. One that was not finite: writes debug/ and raises NumericsError."""
        values = jax.device_get(values)
        self._recent = [*self._recent[-1:], (step, batch, values)]
        if bad := int(values['bad_step']):
            self.debug(bad, state)
            raise NumericsError(
                f'step {bad}: the loss or a gradient is not finite; weights are untouched since step {bad - 1}, '
                'debug/ in the work directory holds the batches and the norms of every layer'
            )
        tokens, positions = round(float(values['tokens'])), batch['inputs'].size
        self.tokens += tokens
        self._window_steps += 1
        self._window_tokens += tokens
        self._window_positions += positions
        self._collapse.see(step, float(values['loss']))
        if step % self._log_every == 0 or self._log_also(step):
            loss, speed = float(values['loss']), self._speed()
            self._warn_of_waiting(step, speed)
            self._metrics.add(
                step,
                {
                    'tokens': self.tokens,
                    'train/loss': loss,
                    'train/perplexity': formulas.perplexity(loss),
                    'train/grad_norm': float(values['grad_norm']),
                    'train/learning_rate': float(values['learning_rate']),
                    'train/tokens_per_step': tokens,
                    'train/positions_per_step': positions,
                    'train/real_token_frac': tokens / positions,
                    **speed,
                    'layers/grad_norm': [float(norm) for norm in values['layer_grad_norm']],
                },
            )
            if step % self._log_every == 0 or step == self._num_steps:
                record.say(record.progress_line(self._metrics.open_line, self._num_steps))

    def flush(self):
        """The line at hand is complete."""
        self._metrics.flush()

    @contextlib.contextmanager
    def waiting(self, previous):
        """Times the wait for a batch, which counts, all of it, where the devices were through with the step before when
        it came: what they waited at most. `previous` is that step as `add` takes it, None: known to be done."""
        start = time.perf_counter()
        yield
        if not previous or previous[1]['loss'].is_ready():
            self._window_wait += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self):
        """Leaves the time of hooks out of the speed."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._window_paused += time.perf_counter() - start

    def _warn_of_waiting(self, step, speed):
        """Once, of all lines but the first, which may be the start of reading."""
        if self._waited is None:
            self._waited = np.zeros(2)
            return
        seconds = self._log_every * speed['perf/step_time']
        self._waited += [seconds, seconds * speed['perf/data_wait_frac']]
        share = self._waited[1] / self._waited[0]
        if not self._warned and self._waited[0] >= PATIENCE and share > LONGEST_WAIT:
            self._warned = True
            record.say(
                f'mixln_jax: warning: step {step}: {share:.0%} of the time goes into waiting for data: raise '
                'config.data.workers, or prepare tokens once (python -m mixln_jax.data.prepare)',
                file=sys.stderr,
            )

    def _start_window(self):
        self._window_start = time.perf_counter()
        self._window_steps = self._window_tokens = self._window_positions = 0
        self._window_wait = self._window_paused = 0.0

    def _speed(self):
        """`perf/*` of the steps since the last line."""
        seconds = time.perf_counter() - self._window_start - self._window_paused
        count = len(self._devices)
        speed = {
            'perf/tokens_per_sec': self._window_tokens / seconds,
            'perf/tokens_per_sec_per_device': self._window_tokens / seconds / count,
            'perf/step_time': seconds / self._window_steps,
            'perf/mfu': formulas.mfu(
                self._flops_per_position * self._window_positions / seconds, self._devices[0].device_kind, count
            ),
            'perf/data_wait_frac': self._window_wait / seconds,
            'perf/peak_memory_gb': _peak_memory(jax.local_devices(backend=self._devices[0].platform)[0]),
            **self._first_line,
        }
        self._first_line = {}
        self._start_window()
        return speed

    def debug(self, step, state):
        """Writes debug/: the bad step, the last two batches, the norms of every layer's gradient and weights."""
        folder = self._workdir / 'debug'
        folder.mkdir(exist_ok=True)
        weights, _ = jax.device_get(jax.jit(measures.layer_norms)(state.params))
        report = {'step': step, 'layers/weight_norm': [repr(norm) for norm in weights.tolist()], 'steps': []}
        for number, batch, values in self._recent:
            np.savez(folder / f'batch_{number}.npz', **meshes.fetch(batch))
            report['steps'].append(
                {
                    'step': number,
                    'train/loss': repr(float(values['loss'])),
                    'train/grad_norm': repr(float(values['grad_norm'])),
                    'layers/grad_norm': [repr(float(norm)) for norm in values['layer_grad_norm']],
                }
            )
        (folder / 'report.json').write_text(json.dumps(report, indent=1), encoding='utf-8')
        with contextlib.suppress(NumericsError):  # weights that are themselves not finite
            self._save_debug(state)
        self._metrics.flush()


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
            record.say(f'mixln_jax: warning: {problem}', file=sys.stderr)


def _peak_memory(device):
    stats = device.memory_stats() or {}
    return stats['peak_bytes_in_use'] / 2**30 if 'peak_bytes_in_use' in stats else None

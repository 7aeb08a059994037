"""Metrics lines, progress lines and speed."""

import contextlib
import json
import pathlib
import sys
import time

import jax
import numpy as np

from mixln_jax import trees
from mixln_jax.distributed import mesh as meshes
from mixln_jax.runs import log
from mixln_jax.system import console, hardware
from mixln_jax.system.errors import NumericsError

LONGEST_WAIT = 0.05  # share of the time; beyond it the input holds the device up
PATIENCE = 30  # seconds of training before that is said


class Meter:
    """Turns the steps' metrics into metrics lines and progress lines, counts tokens, stops a run that has gone bad."""

    def __init__(
        self,
        metrics,
        workdir,
        *,
        task,
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
        """`task`: whose numbers the lines show; `log_also`: (step) -> whether a step off the rhythm of `log_every` has
        a line; `tokens`: seen before; `first_line`: what only the first line says, such as the compile time;
        `collapse`: Collapse; `save_debug`: (state), keeps it for debug/."""
        self._collapse, self._save_debug = collapse, save_debug
        self.tokens = tokens
        self._metrics, self._workdir = metrics, pathlib.Path(workdir)
        self._task = task
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
            speed = self._speed()
            self._warn_of_waiting(step, speed)
            self._metrics.add(
                step,
                {
                    'tokens': self.tokens,
                    **{f'train/{name}': value for name, value in self._summary(values).items()},
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
                line = log.progress_line(
                    self._metrics.open_line, self._num_steps, self._task.label, self._task.headline
                )
                console.say(line)

    def _summary(self, values):
        """What the task makes of a step's means."""
        weight = max(float(values['weight']), 1.0)
        means = {name: float(values[name]) / weight for name in self._task.metrics}
        return self._task.summary(means | {'sum': float(values['loss']), 'weight': 1.0})

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
            console.say(
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
            'perf/mfu': hardware.mfu(
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
        weights, _ = jax.device_get(jax.jit(trees.layer_norms)(state.params))
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


def _peak_memory(device):
    stats = device.memory_stats() or {}
    return stats['peak_bytes_in_use'] / 2**30 if 'peak_bytes_in_use' in stats else None

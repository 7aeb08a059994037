"""The meter: metrics lines, progress lines and speed."""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mixln_jax import trees
from mixln_jax.distributed import mesh as meshes
from mixln_jax.program.step import State
from mixln_jax.runs import log
from mixln_jax.system import console, hardware
from mixln_jax.system.errors import NumericsError
from mixln_jax.tasks.task import Task
from mixln_jax.training.signs import Signs

LONGEST_WAIT = 0.05  # share of the time; a longer wait for data is worth a warning
PATIENCE = 30  # seconds of training before the warning

Values = Mapping[str, Any]  # metrics of a step
Batch = Mapping[str, Any]


class Meter:
    """Turns the metrics of steps into metrics lines and progress lines, counts tokens, and ends a run whose values are
    not finite."""

    def __init__(
        self,
        metrics: log.Metrics,
        workdir: str | os.PathLike,
        *,
        task: Task,
        num_steps: int,
        log_every: int,
        log_also: Callable[[int], bool],
        tokens: int,
        positions_per_step: int,
        flops_per_position: float,
        devices: Sequence[jax.Device],
        first_line: dict[str, Any],
        signs: Signs,
        save_debug: Callable[[State], None],
    ) -> None:
        """Starts to measure.

        Args:
            metrics: takes the metrics lines.
            workdir: work directory, for debug/.
            task: its metrics are shown.
            num_steps: steps of the run.
            log_every: steps between lines.
            log_also: step -> whether a step in between has a metrics line, too.
            tokens: tokens of the steps before.
            positions_per_step: of all rows, padding included.
            flops_per_position: model FLOPs of a training step per position.
            devices: all devices of the run.
            first_line: values of the first line alone, such as the compile time.
            signs: takes the metrics of every step.
            save_debug: saves a state in debug/.
        """
        self._signs, self._save_debug = signs, save_debug
        self.tokens = tokens
        self._metrics, self._workdir = metrics, pathlib.Path(workdir)
        self._task = task
        self._num_steps, self._log_every, self._log_also = num_steps, log_every, log_also
        self._positions_per_step, self._flops_per_position = positions_per_step, flops_per_position
        self._devices, self._first_line = devices, first_line
        self._recent: list[tuple[int, Batch, Values]] = []  # the last two steps, for debug/
        self._waited: np.ndarray | None = None  # [seconds of training, seconds of waiting for data]
        self._warned = False
        self._start_window()

    def add(self, step: int, values: Values, batch: Batch, state: State) -> None:
        """Takes the metrics of a finished step.

        Raises NumericsError, after writing debug/, if they are not finite.
        """
        values = jax.device_get(values)
        self._recent = [*self._recent[-1:], (step, batch, values)]
        if bad := int(values['bad_step']):
            self.debug(bad, state)
            raise NumericsError(
                f'step {bad}: the loss or a gradient is not finite; the weights are still those of step {bad - 1}; '
                'debug/ in the work directory holds the batches and the norms of every layer'
            )
        tokens, positions = round(float(values['tokens'])), self._positions_per_step
        self.tokens += tokens
        self._window_steps += 1
        self._window_tokens += tokens
        self._signs.add(step, values)
        if step % self._log_every == 0 or self._log_also(step):
            speed = self._speed()
            self._warn_of_waiting(step, speed)
            with self.paused():  # the first line counts tokens
                signs = self._signs.line(values)
            line = {
                'tokens': self.tokens,
                **{f'train/{name}': value for name, value in self._summary(values).items()},
                'train/grad_norm': float(values['grad_norm']),
                'train/learning_rate': float(values['learning_rate']),
                'train/tokens_per_step': tokens,
                'train/positions_per_step': positions,
                'train/real_token_frac': tokens / positions,
                **speed,
                'layers/grad_norm': [float(norm) for norm in values['layer_grad_norm']],
                **signs,
            }
            self._metrics.add(step, line)
            if step % self._log_every == 0 or step == self._num_steps:
                shown = {'step': step, **log.finite(line)}
                console.say(log.progress_line(shown, self._num_steps, self._task))

    def _summary(self, values: Values) -> dict[str, float | None]:
        """Returns the task's metrics of a step."""
        weight = max(float(values['weight']), 1.0)
        means = {name: float(values[name]) / weight for name in self._task.metrics}
        return self._task.summary(means | {'sum': float(values['loss']), 'weight': 1.0})

    @property
    def last_batch(self) -> Batch | None:
        """The batch of the last step on the devices; None: no step was added yet."""
        return self._recent[-1][1] if self._recent else None

    def flush(self) -> None:
        """Completes the current metrics line."""
        self._metrics.flush()

    @contextlib.contextmanager
    def waiting(self, previous: tuple[int, Values, Batch] | None) -> Iterator[None]:
        """Times the wait for a batch.

        The whole wait counts if the devices had finished the step before by its end; it is thus the longest time that
        they may have been idle. `previous` is that step's number, metrics and batch; None: it had finished before.
        """
        start = time.perf_counter()
        yield
        if not previous or previous[1]['loss'].is_ready():
            self._window_wait += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the block, in which hooks run, from the speed."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._window_paused += time.perf_counter() - start

    def _warn_of_waiting(self, step: int, speed: Mapping[str, Any]) -> None:
        """Warns once if steps wait too long for data. The first line does not count: readers may still be starting."""
        if self._waited is None:
            self._waited = np.zeros(2)
            return
        seconds = self._log_every * speed['perf/step_time']
        self._waited += [seconds, seconds * speed['perf/data_wait_frac']]
        share = self._waited[1] / self._waited[0]
        if not self._warned and self._waited[0] >= PATIENCE and share > LONGEST_WAIT:
            self._warned = True
            of_texts = ', or prepare tokens once (python -m mixln_jax.data.prepare)'
            console.say(
                f'mixln_jax: warning: step {step}: {share:.0%} of the time is spent waiting for data: raise '
                f'config.data.workers{of_texts if self._task.reads == "texts" else ""}',
                file=sys.stderr,
            )

    def _start_window(self) -> None:
        self._window_start = time.perf_counter()
        self._window_steps = self._window_tokens = 0
        self._window_wait = self._window_paused = 0.0

    def _speed(self) -> dict[str, Any]:
        """Returns `perf/*` of the steps since the last line."""
        seconds = time.perf_counter() - self._window_start - self._window_paused
        count = len(self._devices)
        speed = {
            'perf/tokens_per_sec': self._window_tokens / seconds,
            'perf/tokens_per_sec_per_device': self._window_tokens / seconds / count,
            'perf/step_time': seconds / self._window_steps,
            'perf/mfu': hardware.mfu(
                self._flops_per_position * self._positions_per_step * self._window_steps / seconds,
                self._devices[0].device_kind,
                count,
            ),
            'perf/data_wait_frac': self._window_wait / seconds,
            'perf/peak_memory_gb': _peak_memory(jax.local_devices(backend=self._devices[0].platform)[0]),
            **self._first_line,
        }
        self._first_line = {}
        self._start_window()
        return speed

    def debug(self, step: int, state: State) -> None:
        """Writes debug/: the bad step, the last two batches, and the norms of every layer's weights and gradients."""
        folder = self._workdir / 'debug'
        folder.mkdir(exist_ok=True)
        weights, _ = jax.device_get(jax.jit(trees.layer_norms)(state.network))
        steps = []
        for number, batch, values in self._recent:
            np.savez(folder / f'batch_{number}.npz', **meshes.fetch(batch))
            steps.append(
                {
                    'step': number,
                    'train/loss': repr(float(values['loss'])),
                    'train/grad_norm': repr(float(values['grad_norm'])),
                    'layers/grad_norm': [repr(float(norm)) for norm in values['layer_grad_norm']],
                }
            )
        report = {'step': step, 'layers/weight_norm': [repr(norm) for norm in weights.tolist()], 'steps': steps}
        (folder / 'report.json').write_text(json.dumps(report, indent=1), encoding='utf-8')
        with contextlib.suppress(NumericsError):  # weights that are not finite are not saved
            self._save_debug(state)
        self._metrics.flush()


def _peak_memory(device: jax.Device) -> float | None:
    """Returns the most memory that was in use on a device, in GiB, if it is known."""
    stats = device.memory_stats() or {}
    return stats['peak_bytes_in_use'] / 2**30 if 'peak_bytes_in_use' in stats else None

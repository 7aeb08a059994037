"""Metrics of a run: metrics.jsonl, TensorBoard events, progress lines and the final table."""

import contextlib
import gc
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson
import tensorboardX

from mixln_jax.system import files, outputs
from mixln_jax.system.errors import CheckpointError, UsageError, reading
from mixln_jax.tasks.task import Task

LOST = 'put the file back as it was, or continue in another --workdir with config.resume_from'
LARGEST = 2**33  # bytes of a metrics.jsonl, which may have a line for every step
Line = dict[str, Any]


class Metrics:
    """Writes metrics.jsonl and TensorBoard events: at most one line per step, steps strictly increasing.

    `add` puts values into the line of a step. The line is written once it is complete: at `flush`, or when the line of
    a later step begins. The first `add` of a step has to provide `tokens`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        resume_from: int = 0,
        open_line: Line | None = None,
        pictures: Mapping[str, Callable[[Any], np.ndarray]] | None = None,
    ) -> None:
        """Opens both files and removes the lines after step `resume_from`.

        Args:
            workdir: work directory of the run.
            resume_from: step of the checkpoint that the run continues from; 0: it starts.
            open_line: the line of that step, if it was not complete when the checkpoint was saved.
            pictures: {name: function} for values that TensorBoard shows as images; each returns `[H, W, 3]` uint8.
        """
        self._pictures = pictures or {}
        self._path = pathlib.Path(workdir) / 'metrics.jsonl'
        # The first step whose line is not written yet. A start writes all of them, that of step 0 too.
        first = resume_from + (open_line is None and resume_from > 0)
        kept = _lines_before(self._path, first)
        if self._path.exists():
            outputs.write(self._path, ''.join(f'{text}\n' for _, text in kept).encode())
        self.lines: list[Line] = [line for line, _ in kept]
        self.open_line = open_line
        self._digest = _digest(text for _, text in kept)
        self._file = self._path.open('a', encoding='utf-8')
        # purge_step makes TensorBoard drop the values of removed lines.
        # Names of event files contain the time in seconds: a run that continues within one would overwrite its own.
        suffix = f'.{time.time_ns()}'
        self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=first, filename_suffix=suffix)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Puts `values` into the line of `step`."""
        if self.open_line and self.open_line['step'] != step:
            self.flush()
        self.open_line = (self.open_line or {'step': step}) | finite(dict(values))

    def flush(self) -> None:
        """Completes the open line. Everything is on disk when this returns."""
        if self.open_line:
            self.check()
            text = json.dumps(self.open_line)
            self._file.write(f'{text}\n')
            self.lines.append(self.open_line)
            _digest([text], self._digest)
            self._show(self.open_line)
            self.open_line = None
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.flush()

    def check(self) -> None:
        """Raises UsageError if the file no longer exists: whatever is written to it would be lost."""
        if not self._path.exists():
            raise UsageError(f'{self._path} is missing: the work directory was moved or removed while the run used it')

    def seal(self) -> dict[str, Any]:
        """Returns what identifies the lines on disk. A checkpoint keeps it for `check_metrics`."""
        self.check()
        return {'lines': len(self.lines), 'digest': self._digest.hexdigest()}

    def close(self) -> None:
        """Closes both files. An open line is dropped, for it is not complete."""
        self._file.close()
        self._board.close()

    def _show(self, line: Line) -> None:
        for name, value in line.items():
            if name in self._pictures:
                self._board.add_image(name, self._pictures[name](value), line['step'], dataformats='HWC')
            elif isinstance(value, list):
                for number, item in enumerate(value, 1):
                    if item is not None:
                        self._board.add_scalar(f'{name}/{number:03}', item, line['step'])
            elif value is not None and name != 'step':
                self._board.add_scalar(name, value, line['step'])


def read_metrics(path: str | os.PathLike) -> list[Line]:
    """Returns the lines of a metrics.jsonl, without a last line that a kill has cut short.

    Raises CheckpointError, naming the line, for a line that is not a JSON object with a step, or whose step is not
    later than that of the line before it.
    """
    return [line for line, _ in _lines_before(path, math.inf)]


def _lines_before(path: str | os.PathLike, first: float) -> list[tuple[Line, str]]:
    """Returns (object, text) of every line before step `first`."""
    try:
        content = files.read(path, CheckpointError, LARGEST)
    except FileNotFoundError:
        return []
    with reading(path, CheckpointError, 'not text'):
        texts = content.decode().splitlines(keepends=True)
    with _no_collection():
        return [(line, text) for line, text in _checked_lines(path, texts) if line['step'] < first]


def _checked_lines(path: str | os.PathLike, texts: Sequence[str]) -> list[tuple[Line, str]]:
    """Returns (object, text) of every line, without a last line that a kill has cut short."""
    lines: list[tuple[Line, str]] = []
    last = -1
    for number, text in enumerate(texts, 1):
        try:
            line = orjson.loads(text)  # fast, for each start reads all lines
            step = line['step'] + 0
            if not abs(step) < 2**63:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            if number == len(texts) and not text.endswith('\n'):
                break
            raise CheckpointError(f'{path}:{number} is not a JSON object with a step') from None
        if not step > last:
            raise CheckpointError(f'{path}:{number} is step {step}, after step {last}; {LOST}')
        lines.append((line, text.strip()))
        last = step
    return lines


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Pauses Python's garbage collector, which with JAX's objects in memory takes most of the time to read JSON."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def check_metrics(path: str | os.PathLike, first: int, seal: Mapping[str, Any] | None) -> list[Line]:
    """Returns the lines of a metrics.jsonl before step `first`.

    `seal` is what the checkpoint has kept of them; None: it was saved by a version without seals. Raises
    CheckpointError if they are not the lines that the checkpoint was saved with.
    """
    lines = _lines_before(path, first)
    if seal and len(lines) != seal['lines']:
        raise CheckpointError(f'{path} has {len(lines)} lines before step {first}, not {seal["lines"]}; {LOST}')
    if seal and _digest(text for _, text in lines).hexdigest() != seal['digest']:
        raise CheckpointError(f'{path}: a line before step {first} is not what the run has written; {LOST}')
    return [line for line, _ in lines]


def _digest(texts: Iterable[str], digest: Any = None) -> Any:
    """Returns a digest of metrics lines, or `digest` updated with them."""
    digest = digest or hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(f'{text}\n'.encode())
    return digest


def progress_line(line: Line, num_steps: int, task: Task) -> str:
    """Returns the progress line for a metrics line that has `train/*` and `perf/*`."""
    speed = line['perf/tokens_per_sec_per_device']
    speed = None if speed is None else task.units(speed)
    headline = f'{task.label} {_number(line[f"train/{task.headline}"], f".{task.digits}f")}'
    shown = [
        f'step {line["step"]:>{len(str(num_steps))}}/{num_steps} {100 * line["step"] / num_steps:3.0f}%',
        f'loss {_number(line["train/loss"], ".4f")}',
        headline,
        f'grad {_number(line["train/grad_norm"], ".3f")}',
        f'lr {line["train/learning_rate"]:.2e}',
        f'{_number(speed, ",.0f")} {task.short_unit}/s/device',
        f'mfu {_number(line["perf/mfu"], ".1%")}',
        f'data wait {_number(line["perf/data_wait_frac"], ".1%")}',
        f'eta {_duration((num_steps - line["step"]) * (line["perf/step_time"] or 0))}',
    ]
    return '  '.join(shown)


def summary_table(line: Line, norm_position: Sequence[str]) -> str:
    """Returns the table that ends a run, from its last metrics line.

    It shows what is known of the evaluation and, for every layer, the gradient norm and the angular distance across the
    layer, if that was measured.
    """
    results = {name.removeprefix('eval/'): value for name, value in line.items() if name.startswith('eval/')}
    results = {name: value for name, value in results.items() if name != 'tokens' and value is not None}
    shown = [f'{name.replace("_", " ")} {value:.4g}' for name, value in results.items()]
    grad_norms = line['layers/grad_norm']
    distances = line.get('analysis/angular_distance', [None] * len(norm_position))
    width = max(10, *map(len, norm_position))
    rows = [
        f'eval {"   ".join(shown)}',
        f'{"layer":>5}  {"placement":<{width}} {"gradient norm":<24} angular distance across it',
    ]
    for number, (name, grad, distance) in enumerate(zip(norm_position, grad_norms, distances, strict=True), 1):
        rows.append(
            f'{number:>5}  {name:<{width}} {_number(grad, "8.4f")} {_bar(grad, grad_norms):<14}'
            f'  {_number(distance, "7.4f")} {_bar(distance, distances)}'
        )
    return '\n'.join(rows)


def _bar(value: float | None, values: Sequence[float | None], width: int = 14) -> str:
    """Returns a bar whose length is that of `value` relative to the largest of `values`."""
    largest = max((one for one in values if one is not None), default=0.0)
    eighths = round(8 * width * value / largest) if value and largest else 0
    return '█' * (eighths // 8) + ('', *'▏▎▍▌▋▊▉')[eighths % 8]


def _number(value: float | None, form: str) -> str:
    return '-' if value is None else format(value, form)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}'


def finite(value: Any) -> Any:
    """Returns a number, or a nested list or dict of numbers, with None in place of NaN and infinity, which JSON does
    not have."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What a run leaves behind beside its weights: its environment, metrics.jsonl, TensorBoard events, lines for people."""

import contextlib
import gc
import hashlib
import json
import math
import os
import pathlib
import time

import orjson
import tensorboardX

from mixln_jax.system import files, outputs
from mixln_jax.system.errors import CheckpointError, UsageError, reading

LOST = 'put back the file as it was, or go on in another --workdir with config.resume_from'
LARGEST = 2**33  # bytes of a metrics.jsonl, which has a line for every step


class Metrics:
    """metrics.jsonl and TensorBoard. One line a step, steps strictly increasing.

    `add` puts values into the line of a step; the line is written when it is complete: at `flush`, or when a later
    step's begins. What a line lacks of the contract (`step`, `tokens`) its first `add` brings.
    """

    def __init__(self, workdir, resume_from=0, open_line=None, pictures=None):
        """Cuts what lies behind step `resume_from`; `open_line` is that step's own line where it was not complete.

        `pictures`: {name: function} of values that TensorBoard shows as images, each giving [H,W,3] uint8."""
        self._pictures = pictures or {}
        self._path = pathlib.Path(workdir) / 'metrics.jsonl'
        first = resume_from + (open_line is None)  # the first step whose line is still to come
        kept = _lines_before(self._path, first)
        if self._path.exists():
            outputs.write(self._path, ''.join(f'{text}\n' for _, text in kept).encode())
        self.lines, self.open_line = [line for line, _ in kept], open_line
        self._digest = _digest(text for _, text in kept)
        self._file = self._path.open('a', encoding='utf-8')
        # purge_step makes TensorBoard forget what a cut line had shown.
        # The names of event files count seconds: a run that goes on within one would write over its own.
        suffix = f'.{time.time_ns()}'
        self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=first, filename_suffix=suffix)

    def add(self, step, values):
        """Puts `values` into the line of `step`."""
        if self.open_line and self.open_line['step'] != step:
            self.flush()
        self.open_line = (self.open_line or {'step': step}) | finite(values)

    def flush(self):
        """Completes the open line; everything is on disk when this returns."""
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

    def check(self):
        """Raises UsageError where the file has gone: what is written now would be lost with it."""
        if not self._path.exists():
            raise UsageError(f'{self._path} has gone: the work directory was moved or removed while the run used it')

    def seal(self) -> dict:
        """What tells the lines on disk from all others; a checkpoint keeps it for `check_metrics`."""
        self.check()
        return {'lines': len(self.lines), 'digest': self._digest.hexdigest()}

    def close(self):
        """Closes both files; an open line is lost, as its step was not complete."""
        self._file.close()
        self._board.close()

    def _show(self, line):
        for name, value in line.items():
            if name in self._pictures:
                self._board.add_image(name, self._pictures[name](value), line['step'], dataformats='HWC')
            elif isinstance(value, list):
                for number, item in enumerate(value, 1):
                    if item is not None:
                        self._board.add_scalar(f'{name}/{number:03}', item, line['step'])
            elif value is not None and name != 'step':
                self._board.add_scalar(name, value, line['step'])


def read_metrics(path: str | pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out.

    Raises CheckpointError, naming the line, for one that is no JSON object with a step, or no later step than the line
    before it.
    """
    return [line for line, _ in _lines_before(path, math.inf)]


def _lines_before(path, first):
    """Of every line before step `first` the object and its text."""
    try:
        content = files.read(path, CheckpointError, LARGEST)
    except FileNotFoundError:
        return []
    with reading(path, CheckpointError, 'not text'):
        texts = content.decode().splitlines(keepends=True)
    with _no_collection():
        return [(line, text) for line, text in _checked_lines(path, texts) if line['step'] < first]


def _checked_lines(path, texts):
    """Of every line the object and its text; a last line that a kill cut short is left out."""
    lines, last = [], 0
    for number, text in enumerate(texts, 1):
        try:
            line = orjson.loads(text)  # a start reads all of them
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
def _no_collection():
    """Inside, Python looks for no garbage: with JAX's objects in memory that takes most of the time of reading JSON."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def check_metrics(path, first: int, seal: dict | None) -> list[dict]:
    """The lines of a metrics.jsonl before step `first`.

    Raises CheckpointError where they are not those that were there when a checkpoint was saved, which kept their
    `seal`; None: it is of a version that kept none.
    """
    lines = _lines_before(path, first)
    if seal and len(lines) != seal['lines']:
        raise CheckpointError(f'{path} has {len(lines)} lines before step {first}, not {seal["lines"]}; {LOST}')
    if seal and _digest(text for _, text in lines).hexdigest() != seal['digest']:
        raise CheckpointError(f'{path}: a line before step {first} is not what the run has written; {LOST}')
    return [line for line, _ in lines]


def _digest(texts, digest=None):
    """A digest of metrics lines, or `digest` with them added."""
    digest = digest or hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(f'{text}\n'.encode())
    return digest


def progress_line(line: dict, num_steps: int, label: str, headline: str) -> str:
    """Returns the line that a person sees, of a metrics line with `train/*` and `perf/*`.

    `label` is the short name of the number `headline`, which is the task's."""
    shown = [
        f'step {line["step"]:>{len(str(num_steps))}}/{num_steps} {100 * line["step"] / num_steps:3.0f}%',
        f'loss {_number(line["train/loss"], ".4f")}',
        f'{label} {_number(line[f"train/{headline}"], ".2f")}',
        f'grad {_number(line["train/grad_norm"], ".3f")}',
        f'lr {line["train/learning_rate"]:.2e}',
        f'{_number(line["perf/tokens_per_sec_per_device"], ",.0f")} tok/s/device',
        f'mfu {_number(line["perf/mfu"], ".1%")}',
        f'data wait {_number(line["perf/data_wait_frac"], ".1%")}',
        f'eta {_duration((num_steps - line["step"]) * (line["perf/step_time"] or 0))}',
    ]
    return '  '.join(shown)


def summary_table(line, norm_position):
    """What ends a run, of its last metrics line: the evaluation, and per layer the gradient norm and, where it was
    measured, the angular distance across the layer."""
    found = {name.removeprefix('eval/'): value for name, value in line.items() if name.startswith('eval/')}
    shown = [f'{name.replace("_", " ")} {_number(found[name], ".4g")}' for name in found if name != 'tokens']
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


def _bar(value, among, width=14):
    largest = max((one for one in among if one is not None), default=0)
    eighths = round(8 * width * value / largest) if value and largest else 0
    return '█' * (eighths // 8) + ('', *'▏▎▍▌▋▊▉')[eighths % 8]


def _number(value, form):
    return '-' if value is None else format(value, form)


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}'


def finite(value):
    """A number, or lists and dicts of them, as JSON can say them, which has no NaN and no infinity: None."""
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value

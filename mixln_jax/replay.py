"""What happened at a bad step: `python -m mixln_jax.replay --workdir DIR` runs the batches in DIR/debug again.

It uses one device, float32 by default, and the weights from before the bad step. It prints the highest loss of a row,
the size of the stream and of the gradient in each layer, and the first number that was not finite.
"""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, and for good: what is written is whole or not there

# ruff: noqa: E402
import argparse
import functools
import math
import pathlib
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.data import batches, layout
from mixln_jax.models import families, transformer
from mixln_jax.program import inner, step
from mixln_jax.runs import checkpoint, checkpoint_folders, frozen
from mixln_jax.system import cli, console, files
from mixln_jax.system.errors import CheckpointError, UsageError, reading
from mixln_jax.tasks import build
from mixln_jax.tasks.task import Batch, Context, Task


def replay(folder: str, compute_dtype: str | None) -> None:
    """Prints what happens in the batches of a debug/ folder. Raises UsageError if there is nothing to replay."""
    debug = files.local(folder, '--workdir') / 'debug'
    stored = sorted(debug.glob('batch_[0-9]*.npz'), key=_number)
    steps = checkpoint_folders.steps(debug / 'checkpoints')
    if not stored or not steps:
        raise UsageError(f'{debug} holds no batches and weights of a bad step')
    _check_complete(debug, stored)
    params, about = checkpoint.read_params(debug / f'checkpoints/{steps[-1]}', average=False)
    params = trees.join(params, frozen.read_here(debug.parent, about))
    config = configs.from_resolved(about['config'])
    task = _task(config, compute_dtype or 'float32')
    model = task.model
    console.say(f'weights of step {about["step"]}, {model.compute_dtype}, {len(model.norm_position)} layers')
    reference = frozen.read_reference(debug.parent) if task.needs_reference else None
    measured = jax.jit(functools.partial(_measured, task))
    for path in stored:
        before = transformer.needed_step(model, _number(path) - 1)  # updates done when it was trained on
        stored_batch: Any = read_batch(path, config)
        batch = task.prepare(stored_batch, step.step_key(config.seed, _number(path) - 1), True)
        if task.collect is not None:
            batch = inner.recorded(params, batch, before, reference, task, accumulate=config.accumulate)
        micro = step.micro_batches(batch, config.accumulate)
        if _number(path) <= about['step']:
            console.say(f'\nbatch {_number(path)} came before these weights, which it has helped to make:')
        measurements = [
            jax.device_get(measured(params, jax.tree.map(lambda a, i=i: a[i], micro), before, reference))
            for i in range(config.accumulate)
        ]
        _show(_number(path), model.norm_position, jax.tree.map(lambda *a: np.stack(a), *measurements))


def _check_complete(folder: pathlib.Path, batches: Sequence[pathlib.Path]) -> None:
    """Raises CheckpointError if the batch of the bad step, which report.json names, is missing."""
    try:
        report = files.read_json(folder / 'report.json', CheckpointError)
    except FileNotFoundError:
        return
    bad = folder / f'batch_{report.get("step")}.npz'
    if bad not in batches:
        raise CheckpointError(f'{bad} is missing: the batch of the step that was not finite')


def read_batch(path: pathlib.Path, config: configs.Config) -> dict[str, np.ndarray]:
    """Returns the arrays [B, ...] of a stored batch of this configuration.

    Raises CheckpointError, naming file and array, for anything else.
    """
    spec = _task(config).batch_spec(config.batch_size)
    marks = batches.marks(np.arange(config.batch_size), np.ones(config.batch_size, bool))  # earlier versions had none
    try:
        files.regular(path, CheckpointError)
    except FileNotFoundError as error:
        raise CheckpointError(f'{path}: not a batch: {error.strerror}') from error
    with reading(path, CheckpointError, 'not a batch'), zipfile.ZipFile(path), np.load(path) as stored:
        renamed = {name: layout.FORMER_NAMES.get(name, name) for name in stored.files}
        if {*renamed.values()} | {*marks} != {*spec}:
            raise ValueError(f'it holds {", ".join(stored.files)}, not {", ".join(spec)}')
        largest = max(math.prod(array.shape) for array in spec.values()) * 8 + 2**16
        for member in stored.zip.infolist():  # before it is unpacked
            if member.file_size > largest:
                raise ValueError(f'{member.filename} has {member.file_size:,} bytes, more than an array of the batch')
        batch = marks | {name: stored[former] for former, name in renamed.items()}
        for name, values in batch.items():
            kind, shape = spec[name].dtype.kind, spec[name].shape
            if values.shape != shape or values.dtype.kind != kind:
                raise ValueError(f'{name} is {values.dtype} {list(values.shape)}, not {spec[name].dtype} {list(shape)}')
        for name in {'inputs', 'targets'} & {*spec}:
            if not 0 <= batch[name].min() <= batch[name].max() < config.model.vocab_size:
                raise ValueError(f'an id is not in 0..{config.model.vocab_size - 1}')
        return batch


def _task(config: configs.Config, compute_dtype: str = 'float32') -> Task:
    return build.from_config(
        config, families.from_config(config.model, compute_dtype, num_outputs=config.task.num_outputs)
    )


def _measured(task: Task, params: Any, batch: Batch, before: jax.Array | None, reference: Any) -> dict[str, jax.Array]:
    """Returns the losses of rows (nats per token), and for each layer the largest norms of stream and branches, and the
    norm of the gradient."""

    context = Context(train=task.collect is not None, step=before, reference=reference)

    def loss(params: Any) -> tuple[jax.Array, Any]:
        _, out = task.model.apply({'params': params}, batch, capture=True, step=before, method='backbone')
        losses = task.losses(params, batch, context)
        rows = losses.per_example / jnp.maximum(losses.example_weight, 1)
        mean = losses.sum / jnp.maximum(losses.weight, 1)
        return mean, (rows, out['branches'], jnp.linalg.norm(out['hidden'][1:], axis=-1))

    grads, (rows, branches, stream) = jax.grad(loss, has_aux=True)(params)
    largest = lambda norms: norms.max(axis=(-2, -1))  # noqa: E731
    return {
        'rows': rows,
        'stream': largest(stream),
        'branch': largest(branches['norm']),
        'gradient': trees.layer_norms(grads)[0],
    }


def _show(number: int, norm_position: Sequence[str], measurements: Mapping[str, np.ndarray]) -> None:
    """Prints the arrays of `_measured`, stacked over micro-batches [A, ...]."""
    rows = measurements['rows'].T.reshape(-1)  # micro-batch i has rows i, i + A, ...
    bad = np.flatnonzero(~np.isfinite(rows))
    highest = int(np.argmax(np.where(np.isfinite(rows), rows, -np.inf)))
    width = max(16, *map(len, norm_position))
    console.say(
        f'\nbatch {number}: '
        + (f'loss not finite in rows {", ".join(map(str, bad[:20]))}' if len(bad) else 'all finite'),
        f'highest loss of a row {rows[highest]:.4f} (row {highest}), mean {np.mean(rows):.4f}',
        f'{"layer":>5}  {"placement":<{width}} {"attention adds":>14} {"MLP adds":>14} {"stream":>14} {"gradient":>14}',
    )
    attention, mlp = np.moveaxis(measurements['branch'].max(axis=0), -1, 0)
    stream, gradient = measurements['stream'].max(axis=0), measurements['gradient'].max(axis=0)
    for l, name in enumerate(norm_position):
        numbers = ' '.join(f'{value:14.6g}' for value in (attention[l], mlp[l], stream[l], gradient[l]))
        console.say(f'{l + 1:>5}  {name:<{width}} {numbers}')
    for l in range(len(norm_position)):
        for what, value in (('attention', attention[l]), ('MLP', mlp[l]), ('stream after', stream[l])):
            if not np.isfinite(value):
                console.say(f'the first number that is not finite: {what} of layer {l + 1}')
                return


def _number(path: pathlib.Path) -> int:
    return int(re.findall(r'\d+', path.name)[0])


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m mixln_jax.replay', description=__doc__, allow_abbrev=False)
    parser.add_argument('--workdir', required=True, metavar='DIR', help='of a run that ended with exit code 6')
    parser.add_argument('--compute_dtype', choices=('float32', 'bfloat16'), help='type of activations [float32]')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def job() -> None:
        options = cli.parse(parser, argv)
        replay(options.workdir, options.compute_dtype)

    return cli.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

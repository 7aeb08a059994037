"""Norm of the gradient in every layer and matrix: `python -m mixln_jax.analysis.gradients`.

Pre-LN gives deep layers small gradients, Post-LN the first ones; Mix-LN evens them out (Mix-LN, Figures 3e and 6a).
`--steps init,all` measures the network at initialisation and at every checkpoint.
"""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, and for good: what is written is whole or not there

# ruff: noqa: E402
import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from mixln_jax import trees
from mixln_jax.analysis import command
from mixln_jax.analysis.subjects import Subject
from mixln_jax.distributed import mesh as meshes
from mixln_jax.models.network import Network
from mixln_jax.report import figures
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks.task import Batch, Context, Task

NAME = 'gradients'
DEFINITION = (
    'Euclidean norm, over all weights of a layer or over one matrix, of the gradient of the mean loss of a batch, '
    'before clipping; the mean over batches'
)
UNIT = 'nats a token or image, by unit of weight'
SOURCE = 'Li, Yin, Liu 2025, Mix-LN (arXiv 2412.13795), Figures 3e and 6a'
ROWS = 32


@functools.partial(jax.jit, static_argnames='task')
def _gradient(
    params: Any, batch: Batch, step: jax.Array | None, reference: Any, *, task: Task
) -> tuple[Any, jax.Array]:
    """Returns the gradient of the summed losses of a batch, and what it is to be divided by."""
    context = Context(step=step, reference=reference)
    losses = lambda params: task.losses(params, batch, context)[:2]  # noqa: E731
    grads, weight = jax.grad(losses, has_aux=True)(params)
    shardings = meshes.state_shardings(task.model.stream_sharding.mesh, grads)
    return jax.lax.with_sharding_constraint(grads, shardings), weight


@functools.partial(jax.jit, donate_argnums=0)
def _sum(first: Any, second: Any) -> Any:
    return jax.tree.map(jnp.add, first, second)


@functools.partial(jax.jit, static_argnames='model')
def _norms(sums: Any, *, model: Network) -> Any:
    grads, count = sums
    mean = jax.tree.map(lambda grad: grad / count, grads)
    return command.everywhere({'layers': trees.layer_norms(mean)[0], 'matrices': trees.matrix_norms(mean)}, model)


def measure(
    task: Task,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    rows: int | None = None,
    step: jax.Array | None = None,
    reference: Any = None,
) -> dict[str, Any]:
    """Returns the norms of gradients by layer and by matrix.

    Args:
        task, params, batches, step: as angular.measure; reference: as drop.measure.
        rows: number of rows that share one gradient, a multiple of a batch's; fewer, at the end, are left out. None:
            all rows share one.

    Returns:
        {'layers': [L], 'matrices': {name: [L]}, 'outside': {name: scalar}}, each {'mean', 'standard_error'} over the
        gradients (the error of a single one is None), and the sample's 'gradients' (their number), 'rows_per_gradient',
        'rows' and 'tokens'.

    Raises:
        UsageError: there are fewer than `rows` rows.
    """
    model = task.model
    gradients, tokens = [], 0
    sums, summed_tokens, summed_rows = None, 0, 0  # of the gradient that is being summed
    for batch in batches:
        gradient = _gradient(params, meshes.to_devices(batch, model.stream_sharding), step, reference, task=task)
        sums = _sum(sums, gradient) if sums else gradient
        counts = command.position_mask(task, batch).sum(-1)
        summed_tokens, summed_rows = summed_tokens + int(counts.sum()), summed_rows + int((counts > 0).sum())
        if summed_rows == rows:
            gradients.append(jax.device_get(_norms(sums, model=model)))
            tokens, sums, summed_tokens, summed_rows = tokens + summed_tokens, None, 0, 0
    if rows is None:
        gradients.append(jax.device_get(_norms(sums, model=model)))
        tokens, rows = summed_tokens, summed_rows
    if not gradients:
        raise UsageError(
            f'the sample has {summed_rows} rows, one gradient takes {rows}: raise --tokens or lower --rows'
        )

    def mean_and_error(*values: Any) -> dict[str, Any]:
        stacked = np.asarray(values, np.float64)
        error = stacked.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None
        return {'mean': stacked.mean(0), 'standard_error': error}

    norms = jax.tree.map(mean_and_error, *gradients)
    inside = {name: norm for name, norm in norms['matrices'].items() if np.ndim(norm['mean'])}
    return {
        'layers': norms['layers'],
        'matrices': inside,
        'outside': {name: norm for name, norm in norms['matrices'].items() if name not in inside},
        'gradients': len(gradients),
        'rows_per_gradient': rows,
        'rows': rows * len(gradients),
        'tokens': tokens,
    }


def whole(numbers: Mapping[str, Any]) -> list[Any]:
    """Returns what must be finite."""
    return [numbers['layers']['mean']]


def columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns {title: [L]} of an entry of result.json."""
    return {'gradient norm': result['layers']['mean']}


def draw(results: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Returns {name: figure} of the results in a result.json."""
    return {NAME: figures.gradients(results), 'matrices': figures.gradient_matrices(results)}


def add_options(add: Callable[..., Any]) -> None:
    """Adds the options of this job."""
    add('--rows', type=int, metavar='N', default=ROWS, help=f'rows of text that share one gradient [{ROWS}]')


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""

    def check(options: argparse.Namespace) -> None:
        if options.rows < 1 or options.rows % options.batch_size:
            raise UsageError(f'--rows {options.rows} is not a multiple of --batch_size {options.batch_size}')

    def work(subject: Subject, options: argparse.Namespace, sample: command.Sample) -> dict[str, Any]:
        return measure(subject.task, subject.params, sample.batches(), options.rows, subject.step, subject.reference)

    return command.run(sys.modules[__name__], work, argv, add_options, check)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

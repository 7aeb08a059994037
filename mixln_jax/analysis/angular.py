"""Angular distance between the residual stream at any two depths: `python -m mixln_jax.analysis.angular`.

A layer that hardly turns the stream, d(x_{l-1}, x_l) near 0, does little; many such layers are a sign of wasted depth
(Mix-LN, Figures 2, 3 and 5).
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
import numpy as np
from matplotlib.figure import Figure

from mixln_jax.analysis import command, statistics
from mixln_jax.analysis.subjects import Subject
from mixln_jax.report import figures
from mixln_jax.tasks.task import Batch, Task

NAME = 'angular'
DEFINITION = (
    'd(x_a, x_b) = arccos(cosine of x_a and x_b) / pi, of the raw residual stream before the final norm: '
    'depth 0 is what layer 1 sees, depth l what layer l gives; the mean over tokens'
)
UNIT = 'share of pi: 0 parallel, 1/2 orthogonal, 1 opposite'
SOURCE = 'Gromov et al. 2024 (arXiv 2403.17887), equation 4; Mix-LN (arXiv 2412.13795), Figures 2, 3, 5'


@functools.partial(jax.jit, static_argnames='task')
def _distances(params: Any, batch: Batch, step: jax.Array | None, *, task: Task) -> Any:
    """Returns sums over the positions of each row [B,L+1,L+1], and the number of these positions [B]."""
    _, out = task.model.apply({'params': params}, batch, capture=True, step=step, method='backbone')
    mask = command.position_mask(task, batch)
    return command.everywhere((statistics.distance_matrix(out['hidden'], mask), mask.sum(-1)), task.model)


def measure(
    task: Task, params: Any, batches: Iterable[Mapping[str, np.ndarray]], step: jax.Array | None = None
) -> dict[str, Any]:
    """Returns the distance between any two depths.

    Args:
        task: of a network with `stream_sharding`.
        params: the network's weights.
        batches: batches of numpy arrays; see samples.sample.
        step: number of updates that made the weights, int32 on the devices, where the network has a ramp; None: its
            `trained_steps`.

    Returns:
        {'distance': {'mean', 'standard_error'}}, [L+1,L+1] each.
    """
    sums, counts = command.by_row(lambda batch: _distances(params, batch, step, task=task), task.model, batches)
    return {'distance': statistics.mean_and_error(sums, counts)}


def whole(numbers: Mapping[str, Any]) -> list[Any]:
    """Returns what must be finite."""
    return [numbers['distance']['mean']]


def columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns {title: [L]} of an entry of result.json."""
    matrix = result['distance']['mean']
    return {'angular distance': [matrix[l][l + 1] for l in range(len(matrix) - 1)]}


def draw(results: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Returns {name: figure} of the results in a result.json."""
    return {NAME: figures.angular(results)}


def add_options(add: Callable[..., Any]) -> None:
    """Adds the options of this job."""
    add('--positions', choices=('all', 'last'), default='all', help='tokens that count, or the last of each row [all]')


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""

    def work(subject: Subject, options: argparse.Namespace, sample: command.Sample) -> dict[str, Any]:
        batches = sample.batches(last=options.positions == 'last')
        return measure(subject.task, subject.params, batches) | {'positions': options.positions}

    return command.run(sys.modules[__name__], work, argv, add_options)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

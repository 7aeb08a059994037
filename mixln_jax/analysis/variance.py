"""Growth of the residual stream with depth, and what sub-layers add to it: `python -m mixln_jax.analysis.variance`.

Where the variance grows, a Pre-LN sub-layer, whose output does not grow, adds ever less in comparison: the layer nears
the identity (Sun et al. 2025, The Curse of Depth).
"""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, and for good: what is written is whole or not there

# ruff: noqa: E402
import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from mixln_jax.analysis import command, statistics
from mixln_jax.models import placements, transformer
from mixln_jax.report import figures
from mixln_jax.tasks.task import Batch, Task

NAME = 'variance'
DEFINITION = (
    'variance: of the raw residual stream over the features of a token, the mean over tokens, at depth 0 (what layer 1 '
    'sees) to L; contribution: |F(x)| / |x|, what a sub-layer adds over the stream before it, the mean over tokens; '
    'theory: var_l = var_{l-1} (1 + c f_l / sqrt(var_{l-1})) in Pre-LN layers (f = 1) and under LayerNorm Scaling '
    '(f_l = 1/sqrt(l)), c fitted'
)
UNIT = 'variance: squared units of the stream; contribution: a ratio'
SOURCE = 'Sun et al. 2025, The Curse of Depth (arXiv 2502.05795), sections 3 and 4'


@functools.partial(jax.jit, static_argnames='task')
def _sums(params: Any, batch: Batch, step: jax.Array | None, *, task: Task) -> Any:
    """Returns sums over the tokens of each row: variance [B,L+1], contribution [B,L,2]; and their number [B]."""
    _, out = task.model.apply({'params': params}, batch, capture=True, step=step, method='backbone')
    mask = command.position_mask(task, batch)
    sums = statistics.stream_variance(out['hidden'], mask), statistics.contribution(out['branches'], mask)
    return command.everywhere((sums, mask.sum(-1)), task.model)


def measure(
    task: Task, params: Any, batches: Iterable[Mapping[str, np.ndarray]], step: jax.Array | None = None
) -> dict[str, Any]:
    """Returns the variance of the stream and the contribution of the sub-layers; arguments as those of angular.measure.

    Returns:
        {'variance': [L+1], 'contribution': {'attention', 'mlp'}: [L]}, each {'mean', 'standard_error'}, 'theory' [L+1],
        NaN where there is none, and 'theory_constant'.
    """
    (variance, contribution), counts = command.by_row(
        lambda batch: _sums(params, batch, step, task=task), task.model, batches
    )
    variance, model = statistics.mean_and_error(variance, counts), task.model
    config, steps = model.config, model.trained_steps if step is None else int(jax.device_get(step))
    factors = placements.growth_factors(
        model.norm_position, model.layer_index, model.depth, config.ramp_steps, transformer.total_step(config, steps)
    )
    theory, constant = statistics.variance_theory(variance['mean'], factors)
    return {
        'variance': variance,
        'contribution': {
            name: statistics.mean_and_error(contribution[..., number], counts)
            for number, name in enumerate(('attention', 'mlp'))
        },
        'theory': np.asarray(theory),
        'theory_constant': constant,
    }


def whole(numbers: Mapping[str, Any]) -> list[Any]:
    """Returns what must be finite."""
    return [numbers['variance']['mean'], *(part['mean'] for part in numbers['contribution'].values())]


def columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns {title: [L]} of an entry of result.json."""
    shares = {f'{name} adds': part['mean'] for name, part in result['contribution'].items()}
    return {'variance after': result['variance']['mean'][1:]} | shares


def draw(results: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Returns {name: figure} of the results in a result.json."""
    return {NAME: figures.variance(results), 'contribution': figures.contribution(results)}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    work = lambda subject, _, sample: measure(subject.task, subject.params, sample.batches())  # noqa: E731
    return command.run(sys.modules[__name__], work, argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

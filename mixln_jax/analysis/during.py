"""The four analyses during training, on a fixed sample of the text to evaluate on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.analysis import angular, drop, gradients, samples, variance
from mixln_jax.data.examples import Examples
from mixln_jax.distributed import mesh as meshes
from mixln_jax.models import transformer
from mixln_jax.program import lora
from mixln_jax.report import figures
from mixln_jax.tasks.task import Task

POSITIONS = 2048  # of a device at a time: every layer's stream is kept

# Drawn by matplotlib, for TensorBoard.
PICTURES = {'analysis/angular_matrix': lambda matrix: figures.image(figures.heat_map(matrix))}


class Analyses:
    """Measures weights at their step: a call returns the values of a metrics line.

    Lists have a number for each layer: `analysis/angular_distance` across it, `analysis/<headline>_drop` without it (of
    language modelling `perplexity_drop`; `loss_drop` where the headline is not a function of the loss),
    `analysis/grad_norm` of the sample's mean loss, `analysis/variance` of the stream after it,
    `analysis/contribution_attention` and `_mlp`; `analysis/angular_matrix` [L+1,L+1] is between any two depths.
    """

    def __init__(self, config: configs.Config, task: Task, examples: Examples, watched: Callable = iter):
        """Takes the sample.

        Args:
            config: of the run; `analysis.tokens` is the size of the sample.
            task: of the run.
            examples: the sample is drawn from them.
            watched: wraps the sample's batches whenever they are read; may raise to stop.
        """
        model = task.model.clone(compute_dtype='float32')
        self._task, self._watched = dataclasses.replace(task, model=model), watched
        parts = meshes.row_parts(model.stream_sharding.mesh)
        length = model.row_length(config.seq_length)
        wanted = -(-config.analysis.tokens // length)
        size = parts * max(1, min(POSITIONS // length, -(-wanted // parts)))
        self._batches = samples.sample(self._task, examples, config.analysis.tokens, size, parts=parts)

    def __call__(self, params: Any, step: Any, reference: Any = None) -> dict[str, Any]:
        step = transformer.needed_step(self._task.model, step)
        params = _merged(params)

        def measure(job: Any, **more: Any) -> dict[str, Any]:
            return job.measure(self._task, params, self._watched(self._batches), step=step, **more)

        distances, stream = measure(angular), measure(variance)
        dropped, norms = (measure(job, reference=reference) for job in (drop, gradients))
        matrix = distances['distance']['mean']
        headline = self._task.headline if self._task.headline_of_loss else 'loss'
        return {
            'analysis/angular_distance': matrix.diagonal(1).tolist(),
            'analysis/angular_matrix': matrix.tolist(),
            f'analysis/{headline}_drop': dropped[headline]['drop']['1']['mean'].tolist(),
            'analysis/grad_norm': norms['layers']['mean'].tolist(),
            'analysis/variance': stream['variance']['mean'][1:].tolist(),
            **{f'analysis/contribution_{name}': part['mean'].tolist() for name, part in stream['contribution'].items()},
        }


def _merged(network: Any) -> Any:
    """Returns a network without adapters, as analyses after the run see it."""
    if not any(lora.is_adapter(name) for name, _ in trees.named_leaves(network)):
        return network
    like = jax.tree.map(lambda leaf: leaf.sharding, lora.base(network))
    return jax.jit(lora.merged, out_shardings=like)(network)


def share(config: configs.Config, flops_per_position: float, row_length: int) -> float:
    """Returns the FLOPs of the analyses as a share of those of training, by formula.

    A position of the sample costs L+6 forward passes (one for angles and one for variances, three for the gradient, L+1
    with each layer removed or none), and 8 (L+1)^2 D for the angles; a position in training costs three.

    Args:
        flops_per_position: of training.
        row_length: positions of a row.
    """
    L, D = config.model.num_layers, config.model.hidden_size
    analyses = config.analysis.tokens * ((L + 6) * flops_per_position / 3 + 8 * (L + 1) ** 2 * D)
    times = -(-config.num_steps // (config.analysis.every or config.num_steps))  # the last one after the last step
    return times * analyses / (flops_per_position * config.batch_size * row_length * config.num_steps)

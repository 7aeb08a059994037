"""The change without each layer of a network: `python -m mixln_jax.analysis.drop`.

Every layer, and with --blocks every block of n neighbours, is removed in turn by a mask, so one compilation serves
all (Mix-LN, Figures 2 and 3). `python -m mixln_jax.export --remove_layers` writes such a network.
"""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, and for good: what is written is whole or not there

# ruff: noqa: E402
import argparse
import functools
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from mixln_jax.analysis import command, statistics
from mixln_jax.analysis.subjects import Subject
from mixln_jax.distributed import mesh as meshes
from mixln_jax.evaluation.harness_options import add_task_options, open_harness
from mixln_jax.report import figures
from mixln_jax.system import cli
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks.task import Batch, Context, Task

NAME = 'drop'
DEFINITION = (
    'change without the layer: the metric without the removed layers minus the metric with all; a removed layer is the '
    'identity, its norms included. A layer is needed where perplexity and loss rise, and where accuracies fall'
)
UNIT = 'that of the metric: perplexity, nats a token or image, a share of questions or images, of SQuAD percent of them'
SOURCE = 'Mix-LN (arXiv 2412.13795), section 3 and Figures 2, 3; Gromov et al. 2024 (arXiv 2403.17887)'


def masks(layers: int, block: int = 1) -> np.ndarray:
    """Returns [L-block+1, L] bool: which layers stay when each block of neighbours is removed in turn."""
    numbers = np.arange(layers)
    first = np.arange(layers - block + 1)[:, None]
    return (numbers < first) | (numbers >= first + block)


@functools.partial(jax.jit, static_argnames='task')
def _losses(
    params: Any, batch: Batch, layer_masks: jax.Array, step: jax.Array | None, reference: Any, *, task: Task
) -> Any:
    """Returns summed losses of each row [B,K], one for each of `layer_masks` [K,L], and what to divide them by [B]."""

    def losses(layer_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = task.losses(params, batch, Context(layer_mask, step=step, reference=reference))
        return losses.per_example, losses.example_weight

    sums, weights = jax.lax.map(losses, layer_masks)
    return command.everywhere((sums.T, weights[0]), task.model)


def measure(
    task: Task,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    blocks: Sequence[int] = (1,),
    step: jax.Array | None = None,
    reference: Any = None,
) -> dict[str, Any]:
    """Returns the loss with and without layers, and the headline of a task where it is a function of the loss.

    Arguments as those of angular.measure; `reference`: the network that training began with, of which no layer is
    removed, where the losses depend on it.

    Returns:
        {'loss', headline}: {'value', 'standard_error', 'drop': {block: {'mean', 'standard_error'}, [L-block+1]}}.
    """
    L = len(task.model.norm_position)
    removed = [masks(L, block) for block in blocks]
    layer_masks = np.concatenate([np.ones((1, L), bool), *removed])
    layer_masks = meshes.to_devices(layer_masks, meshes.replicated(task.model.stream_sharding.mesh))
    sums, weights = command.by_row(
        lambda batch: _losses(params, batch, layer_masks, step, reference, task=task), task.model, batches
    )
    of_loss = {task.headline: task.headline_of_loss} if task.headline_of_loss else {}
    metrics = statistics.drops(sums, weights, of_loss)
    return {name: metric | {'drop': _by_block(metric['drop'], blocks, L)} for name, metric in metrics.items()}


def _by_block(drop: Mapping[str, np.ndarray], blocks: Sequence[int], layers: int) -> dict[str, Any]:
    """Returns a drop of all removals, one after the other, as {size of block: drop}."""
    ends = np.cumsum([layers - block + 1 for block in blocks])[:-1]
    split = {name: np.split(values, ends) for name, values in drop.items()}
    return {str(block): {name: parts[i] for name, parts in split.items()} for i, block in enumerate(blocks)}


def measure_scores(
    evaluate: Callable[[np.ndarray], Mapping[str, np.ndarray]], layers: int, blocks: Sequence[int]
) -> dict[str, Any]:
    """Returns the drops of scores that every question has; each network is evaluated once.

    Args:
        evaluate: (keep [L] bool) -> {metric: [Q] in 0..1}.
        layers: L.
        blocks: sizes of blocks to remove.

    Returns:
        As `measure`, by metric, in percent. Errors are those of paired questions.
    """
    keeps = np.concatenate([np.ones((1, layers), bool), *(masks(layers, block) for block in blocks)])
    evaluations = [evaluate(keep) for keep in tqdm(keeps, desc='networks', leave=False, disable=None)]
    metrics = {}
    for name in evaluations[0]:
        scores = 100 * np.stack([evaluation[name] for evaluation in evaluations], axis=-1)
        counts = np.ones(len(scores))
        whole = statistics.mean_and_error(scores[:, 0], counts)
        drop = statistics.mean_and_error(scores[:, 1:] - scores[:, :1], counts)
        metrics[name] = {
            'value': whole['mean'],
            'standard_error': whole['standard_error'],
            'drop': _by_block(drop, blocks, layers),
        }
    return metrics


def measure_metrics(
    evaluate: Callable[[np.ndarray], Mapping[str, tuple[float, float]]], layers: int, blocks: Sequence[int]
) -> dict[str, Any]:
    """Returns the drops of any metrics; each network is evaluated once.

    Args:
        evaluate: (keep [L] bool) -> {metric: (value, standard error or NaN)}.
        layers: L.
        blocks: sizes of blocks to remove.

    Returns:
        As `measure`, by metric. Errors of drops are those of two independent values, so they overestimate: both are
        measured on the same questions.
    """
    whole = evaluate(np.ones(layers, bool))
    pruned = {block: [evaluate(keep) for keep in masks(layers, block)] for block in blocks}
    metrics = {}
    for name, (value, error) in whole.items():
        without = [evaluation[name] for evaluations in pruned.values() for evaluation in evaluations]
        drop = {
            'mean': np.array([pruned_value - value for pruned_value, _ in without]),
            'standard_error': np.array([math.hypot(pruned_error, error) for _, pruned_error in without]),
        }
        metrics[name] = {'value': value, 'standard_error': error, 'drop': _by_block(drop, blocks, layers)}
    return metrics


def whole(numbers: Mapping[str, Any]) -> list[Any]:
    """Returns what must be finite: the metrics of the network with all its layers."""
    return [metric['value'] for metric in numbers['metrics'].values()]


def columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns {title: [L]} of an entry of result.json."""
    metrics = result['metrics'].items()
    return {f'change in {name}': metric['drop']['1']['mean'] for name, metric in metrics if '1' in metric['drop']}


def draw(results: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Returns {name: figure} of the results in a result.json: a chart of every metric and block, of the loss where it
    is the only one."""
    metrics = {name: set(metric['drop']) for result in results for name, metric in result['metrics'].items()}
    return {
        '_'.join([name.replace('/', '_'), *([block] if block != '1' else [])]): figures.drop(
            [result for result in results if block in result['metrics'].get(name, {}).get('drop', ())], name, int(block)
        )
        for name, blocks in metrics.items()
        if name != 'loss' or len(metrics) == 1
        for block in sorted(blocks, key=int)
    }


def add_options(add: Callable[..., Any]) -> None:
    """Adds the options of this job."""
    add('--blocks', default='1', metavar='N,...', help='sizes of blocks of neighbouring layers to remove [1]')
    add_task_options(add)


def _blocks(text: str) -> list[int]:
    """Returns the numbers of --blocks. Raises UsageError if they are not distinct positive integers."""
    blocks = [cli.parse_decimal(part) or 0 for part in cli.split_list(text)]
    if min(blocks, default=0) < 1 or len(set(blocks)) < len(blocks):
        raise UsageError(f'--blocks {text}: give distinct integers, at least 1')
    return blocks


def _tasks(subject: Subject, harness: Callable[..., Any]) -> Callable[[np.ndarray], dict[str, tuple[float, float]]]:
    """Returns a function (layer_mask) -> {task/metric: (value, standard error)} that evaluates in the harness."""
    model, evaluate = harness(subject.weights)

    def metrics(layer_mask: np.ndarray) -> dict[str, tuple[float, float]]:
        model.layer_mask, pairs = layer_mask, {}  # the harness has a mesh of its own
        for task, values in evaluate()[1]['results'].items():
            for key, value in values.items():
                metric, _, filtered = key.partition(',')
                if isinstance(value, float) and not metric.endswith('_stderr'):
                    error = values.get(f'{metric}_stderr,{filtered}')
                    name = f'{task}/{metric}' + (f',{filtered}' if filtered != 'none' else '')
                    pairs[name] = value, error if isinstance(error, float) else math.nan
        return pairs

    return metrics


def _scores(subject: Subject, options: argparse.Namespace, examples: Any, blocks: Sequence[int]) -> dict[str, Any]:
    """Returns the scores of a network on all questions, and the numbers of tokens, rows and questions."""

    def score(layer_mask: np.ndarray) -> dict[str, np.ndarray]:
        assert subject.task.score is not None
        return subject.task.score(subject.params, examples, options.batch_size, layer_mask)

    metrics = measure_scores(score, len(subject.model.norm_position), blocks)
    tokens = int(subject.task.position_mask(examples.batch(range(len(examples)))).sum())
    return {'tokens': tokens, 'rows': len(examples), 'questions': len(examples.questions), 'metrics': metrics}


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    harness = None

    def check(options: argparse.Namespace) -> None:
        nonlocal harness
        _blocks(options.blocks)
        for name in ('tasks', 'tokens'):
            if options.squad and getattr(options, name) is not None:
                raise UsageError(f'--{name} has no meaning with --squad, of which all questions are asked')
        harness = open_harness(options)

    def work(subject: Subject, options: argparse.Namespace, sample: command.Sample) -> dict[str, Any]:
        L, blocks = len(subject.model.norm_position), _blocks(options.blocks)
        if max(blocks) > L:
            raise UsageError(f'--blocks {options.blocks}: {subject.weights.where} has {L} layers')
        if subject.task.score:
            return _scores(subject, options, sample.examples, blocks)
        metrics = measure(subject.task, subject.params, sample.batches(), blocks, subject.step, subject.reference)
        if harness:
            metrics |= measure_metrics(_tasks(subject, harness), L, blocks)
        return {'metrics': metrics}

    return command.run(sys.modules[__name__], work, argv, add_options, check)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""The sections of a report: text, tables and figures of runs and their training."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mixln_jax.report import figures
from mixln_jax.report.classes import class_section
from mixln_jax.report.inputs import Headline, Run, headlines
from mixln_jax.report.measured import measured
from mixln_jax.report.numbers import fixed, number, value_range
from mixln_jax.report.page import Picture, Section, Table, without_empty_columns
from mixln_jax.report.sweeps import sweep_section
from mixln_jax.report.tasks import task_section
from mixln_jax.report.texts import listed

MOST_POINTS = 60  # in a line, and columns of a heat map, over the training: more cannot be seen


def compose(runs: Sequence[Run], comparison: Section) -> list[Section]:
    """Returns the sections of a report.

    Args:
        runs: from `inputs.read`.
        comparison: the section that compares them; it comes first.
    """
    sections = [
        comparison,
        Section('Runs', tables=(_runs(runs),)),
        sweep_section(runs),
        task_section(runs),
        class_section(runs),
        _training(runs),
        *measured(runs),
        _evolution(runs),
    ]
    return [section for section in sections if section]


def _runs(runs: Sequence[Run]) -> Table:
    """Returns a table with a row for every run."""
    seeds = [name for name in ('seed', 'data.seed') if len({run.keys[name] for run in runs}) > 1]
    columns = headlines(runs)
    rows = []
    for run in runs:
        commit, devices = run.environment.get('commit'), run.environment.get('devices')
        revision = f'{commit[:10]}{"-dirty" * commit.endswith("-dirty")}' if isinstance(commit, str) else '-'
        device = '-'
        if isinstance(devices, dict):
            count = f'{devices["count"]} x ' if devices.get('count', 1) != 1 else ''
            device = f'{count}{devices.get("kind", "-")}'
        _, value = run.evaluation
        shown = '-' if value is None else fixed(value, run.headline.digits)
        rows.append(
            (run.name, *(shown if one == run.headline else '-' for one in columns),
             *(f'{run.keys[name]}' for name in seeds), run.placement, f'{run.config.model.num_layers}', run.steps,
             revision, device)
        )  # fmt: skip
    labels = [one.label for one in columns]
    head = ('run', *labels, *seeds, 'placement', 'layers', 'steps', 'commit', 'device')
    return Table('What was run', *without_empty_columns(head, rows))


def _training(runs: Sequence[Run]) -> Section:
    """Returns the section with the curves of losses, gradients and evaluations."""
    if not any(run.lines for run in runs):
        return Section('Training', texts=('No step is logged yet.',))
    evaluations = [
        _chart(
            [run for run in runs if run.headline == one], one.key, one.label, f'{one.label.capitalize()} in evaluation.'
        )
        for one in headlines(runs)
    ]
    pictures = (
        _chart(runs, 'train/loss', 'loss (nats)', 'Loss in training; circles: in evaluation.', marked='eval/loss'),
        *evaluations,
        _chart(runs, 'train/grad_norm', 'gradient norm', 'Norm of the whole gradient, before clipping.'),
        _chart(runs, 'train/learning_rate', 'learning rate', 'Learning rate.', log=False),
    )
    note = f'Lines are means over equal parts of a run, {MOST_POINTS} at most.'
    return Section('Training', notes=(note,), pictures=pictures, tables=_evaluations(runs))


def _chart(
    runs: Sequence[Run], key: str, label: str, caption: str, marked: str | None = None, log: bool | None = None
) -> Picture:
    """Returns a picture of one metric over the tokens, or over the images if all runs read them: a line for each run,
    and points for the metric `marked`."""
    series, unit = [], 'images' if all(run.reads_images for run in runs) else 'tokens'
    for run in runs:
        lines = [line | {'images': run.config.batch_size * line['step']} for line in run.lines]
        x, y = _thinned(*_numbers(lines, key, unit))
        points = _numbers(lines, marked, unit) if marked else ((), ())
        curve = {'label': run.name, 'colour': run.colour, 'x': x, 'y': y}
        series.append(curve | {'points': points if len(points[0]) else None})
    alt = f'Lines of {label} over the {unit}, one for each of {listed(runs)}.'
    return Picture(figures.curves(series, unit, label, log), alt, caption)


def _evaluations(runs: Sequence[Run]) -> tuple[Table, ...]:
    """Returns a table for each headline: its value at every step that was evaluated."""
    return tuple(
        table
        for one in headlines(runs)
        if (table := _evaluations_table([run for run in runs if run.headline == one], one))
    )


def _evaluations_table(runs: Sequence[Run], compared: Headline) -> Table | None:
    by_step = [{line['step']: line for line in run.lines if compared.key in line} for run in runs]
    rows = [
        (
            f'{step:,}',
            *(fixed(number(lines[step][compared.key]), compared.digits) if step in lines else '-' for lines in by_step),
        )
        for step in sorted(set().union(*by_step))
    ]
    if not rows:
        return None
    head, rows = without_empty_columns(('step', *(run.name for run in runs)), rows)
    return Table(f'{compared.label.capitalize()} in evaluation, by step', head, rows, folded=len(rows) > 8)


def _layer_metrics(runs: Sequence[Run]) -> Iterator[tuple[str, str, str]]:
    """Yields the metrics with a number for each layer: the key in metrics.jsonl, a heading, the label of an axis."""
    yield 'analysis/angular_distance', 'Angular distance across each layer', 'angular distance (share of π)'
    names = {one.name: one.label for one in headlines(runs)}
    for name, label in (names | {'loss': 'loss'}).items():
        change = f'change in {label}'
        yield f'analysis/{name}_drop', f'{change.capitalize()} without each layer', f'{change}\nwithout the layer'
    yield 'analysis/grad_norm', 'Gradient norm of each layer, on a fixed sample', 'gradient norm'
    yield 'layers/grad_norm', 'Gradient norm of each layer, on the batch of the step', 'gradient norm'
    yield 'stability/update_ratio', 'Update of each layer in relation to its weights', 'norm of update : weights'
    yield 'stability/attention_logits', 'Largest attention logit of each layer', 'logit'
    yield 'analysis/variance', 'Variance of the residual stream after each layer', 'variance'


def _evolution(runs: Sequence[Run]) -> Section | None:
    """Returns the section of what was measured layer by layer during the training; None if nothing was."""
    parts = []
    for key, heading, quantity in _layer_metrics(runs):
        series = []
        for run in runs:
            lines = [line for line in run.lines if isinstance(line.get(key), list)]
            L = len(lines[-1][key]) if lines else 0
            lines = [line for line in lines if len(line[key]) == L]
            if L:
                some = np.unique(np.linspace(0, len(lines) - 1, min(MOST_POINTS, len(lines))).round().astype(int))
                steps = [lines[i]['step'] for i in some]
                series.append((run, steps, [[number(value) for value in lines[i][key]] for i in some]))
        if series:
            parts.append(Section(heading, pictures=tuple(_evolution_pictures(series, heading, quantity))))
    return Section('Layer by layer during the training', parts=tuple(parts)) if parts else None


def _evolution_pictures(
    series: Sequence[tuple[Run, list[int], list[list[float]]]], heading: str, quantity: str
) -> Iterator[Picture]:
    """Yields lines of all runs at the last step that was measured, and a heat map of each run with several steps.

    Args:
        series: (run, steps [S], values [S, L]) of each run.
        heading: names the quantity in the description of a picture.
        quantity: the label of an axis.
    """
    last = [values[-1] for _, _, values in series]
    last_steps = {steps[-1] for _, steps, _ in series}
    first, newest = min(last_steps), max(last_steps)
    when = f'the last step that was measured of each, from {first:,} to {newest:,}'
    ranges = '; '.join(f'{run.name} {value_range(values)}' for (run, _, _), values in zip(series, last, strict=True))
    named = [{'label': run.name, 'colour': run.colour} for run, _, _ in series]
    yield Picture(
        figures.by_layer(last, named, quantity),
        f'Lines over the layers, one for each of {listed([run for run, _, _ in series])}: {heading.lower()}: {ranges}.',
        f'At {when if first < newest else f"step {newest:,}"}.',
    )
    among = [values for _, steps, values in series if len(steps) > 1]
    for run, steps, values in series:
        if len(steps) > 1:
            yield Picture(
                figures.evolution(values, steps, run.name, quantity, among),
                f'Heat map of {run.name}: {heading.lower()} at {len(steps)} steps, {value_range(values)}.',
            )


def _numbers(lines: Sequence[dict[str, Any]], key: str, unit: str = 'tokens') -> tuple[list[float], list[float]]:
    """Returns (tokens, values) of the metrics lines that have `key`; nan where a value is not a number. `unit` is the
    key of what is returned in place of tokens."""
    pairs = [(number(line[unit]), number(line[key])) for line in lines if key in line and unit in line]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns the means of a curve's finite values over at most MOST_POINTS equal parts."""
    parts = np.array_split(np.arange(len(x)), min(MOST_POINTS, len(x))) if x else []
    curve = np.array(x, float), np.array(y, float)

    def means(values: np.ndarray) -> list[float]:
        finite = [values[part][np.isfinite(values[part])] for part in parts]
        return [float(some.mean()) if some.size else math.nan for some in finite]

    return means(curve[0]), means(curve[1])

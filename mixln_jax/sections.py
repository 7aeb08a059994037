"""What the report says of runs, section by section: text, tables and figures."""

import math
import shlex

import numpy as np

from mixln_jax import config as configs
from mixln_jax import figures
from mixln_jax.page import Picture, Section, Table

# Lists over layers in metrics.jsonl: key, heading, what the bar of colours says.
EVOLUTIONS = (
    ('analysis/angular_distance', 'Angular distance across each layer', 'angular distance (share of π)'),
    ('analysis/perplexity_drop', 'Change in perplexity without each layer', 'change in perplexity'),
    ('analysis/grad_norm', 'Gradient norm of each layer, on a fixed sample', 'gradient norm'),
    ('layers/grad_norm', 'Gradient norm of each layer, of the batch of the step', 'gradient norm'),
    ('analysis/variance', 'Variance of the residual stream behind each layer', 'variance'),
)
MOST_POINTS = 60  # of a line, and columns of a heat map, over the training: more are not seen


def compose(runs, columns, rows):
    """The Sections of a report.

    Args:
        runs: of `report.read`.
        columns, rows: the table of perplexities, texts.
    """
    sections = [
        Section('Runs', tables=(_runs(runs),)),
        Section('Perplexity', tables=(Table('Perplexity of the last evaluation, beside the paper', columns, rows),)),
        _settings(runs),
        _training(runs),
        _analysis(runs, 'angular', 'Angular distance', _angular),
        _analysis(runs, 'drop', 'Without a layer', _drop),
        _analysis(runs, 'gradients', 'Gradients', _gradients),
        _analysis(runs, 'variance', 'Growth of the residual stream', _variance),
        _evolution(runs),
    ]
    return [section for section in sections if section]


def _runs(runs):
    rows = []
    for run in runs:
        commit, devices = run.environment.get('commit'), run.environment.get('devices')
        short = f'{commit[:10]}{"-dirty" * commit.endswith("-dirty")}' if isinstance(commit, str) else '-'
        device = '-'
        if isinstance(devices, dict):
            count = f'{devices["count"]} x ' if devices.get('count', 1) != 1 else ''
            device = f'{count}{devices.get("kind", "-")}'
        rows.append((run.name, run.placement, f'{run.config.model.num_layers}', short, device, run.tokens))
    return Table('What was run', ('run', 'placement', 'layers', 'commit', 'device', 'tokens'), rows)


def _settings(runs):
    flat = [configs.flatten(run.config) | {'model.norm_position': run.placement} for run in runs]
    rows = [
        (name, *(f'{values[name]}' or '(empty)' for values in flat))
        for name in flat[0]
        if len({values[name] for values in flat}) > 1 and not name.startswith('expected.')
    ]
    if not rows:
        return Section('Settings', texts=('One run.' if len(runs) == 1 else 'All settings are equal.',))
    return Section('Settings', tables=(Table('Settings that differ', ('key', *(run.name for run in runs)), rows),))


def _training(runs):
    def chart(key, label, what, points=None, log=None):
        series = []
        for run in runs:
            x, y = _thinned(*_numbers(run.lines, key))
            marked = _numbers(run.lines, points) if points else ()
            named = {'label': run.name, 'colour': run.colour}
            series.append(named | {'x': x, 'y': y, 'points': marked if len(marked) and len(marked[0]) else None})
        alt = f'Lines of {label} over the tokens, one for each of {_names(runs)}.'
        return Picture(figures.curves(series, 'tokens', label, log), alt, what)

    if not any(run.lines for run in runs):
        return Section('Training', texts=('No step is logged yet.',))
    pictures = (
        chart('train/loss', 'loss (nats)', 'Loss in training; circles: in evaluation.', 'eval/loss'),
        chart('eval/perplexity', 'perplexity', 'Perplexity in evaluation.'),
        chart('train/grad_norm', 'gradient norm', 'Norm of the whole gradient, before clipping.'),
        chart('train/learning_rate', 'learning rate', 'Learning rate.', log=False),
    )
    note = f'Lines are means over equal parts of a run, {MOST_POINTS} at most.'
    return Section('Training', notes=(note,), pictures=pictures, tables=_evaluations(runs))


def _evaluations(runs):
    by_step = [{line['step']: line for line in run.lines if 'eval/perplexity' in line} for run in runs]
    steps = sorted(set().union(*by_step))
    rows = [
        (f'{step:,}', *(_text(_number(lines[step]['eval/perplexity'])) if step in lines else '-' for lines in by_step))
        for step in steps
    ]
    head = ('step', *(run.name for run in runs))
    return (Table('Perplexity in evaluation, by step', head, rows, folded=len(rows) > 8),) if rows else ()


def _analysis(runs, job, heading, show):
    """The section of an analysis: `show(results)` gives (pictures, tables, parts) of the newest step of every run."""
    measured = [run for run in runs if job in run.analyses]
    contents = [run.analyses[job] for run in measured]
    texts = tuple(dict.fromkeys(_sentence(content['definition']) for content in contents if content.get('definition')))
    notes = [
        f'{name.capitalize()}: {text}'
        for name in ('unit', 'source')
        for text in dict.fromkeys(f'{content[name]}' for content in contents if content.get(name))
    ]
    if missing := [run for run in runs if run not in measured]:
        command = shlex.join(
            ['python', '-m', f'mixln_jax.analysis.{job}', '--checkpoint', *(r.folder for r in missing)]
        )
        notes.append(f'Not measured yet: {_names(missing)}. `{command}` does it.')
    if not measured:
        return Section(heading, notes=tuple(notes))
    results = [run.results(job)[-1] for run in measured]
    pictures, tables, parts = show([run.results(job) for run in measured], results)
    names = ('step', 'tokens', 'rows', 'positions', 'gradients', 'rows_per_gradient', 'theory_constant')
    shown = [name for name in names if any(result.get(name) is not None for result in results)]
    rows = [(result['label'], f'{result["checkpoint_label"] or "-"}', *_about(result, shown)) for result in results]
    if differ := _differences([result.get('text') for result in results]):
        notes.append(f'Not measured on the same text: {differ}. So these numbers are not of one kind.')
    about = Table('What was measured', ('run', 'checkpoint', *(name.replace('_', ' ') for name in shown)), rows)
    return Section(heading, texts, tuple(notes), tuple(pictures), (about, *tables), tuple(parts))


def _differences(texts):
    """In what the texts differ that results were measured on, '' where in nothing; None: unknown."""
    texts = [text or {} for text in texts]
    names = dict.fromkeys(name for text in texts for name in text)
    said = {'source': 'the documents', 'seq_length': 'the length of rows', 'mode': 'how rows are made'}
    return ', '.join(said.get(name, f'the {name}') for name in names if len({f'{t.get(name)}' for t in texts}) > 1)


def _about(result, names):
    values = [result.get(name) for name in names]
    return [
        '-' if v is None else f'{v:,}' if isinstance(v, int) else f'{v:.4g}' if isinstance(v, float) else f'{v}'
        for v in values
    ]


def _angular(every, results):
    pictures = [
        Picture(
            figures.angular([result], among=results),
            f'Heat map of {result["label"]}: angular distance over n layers from layer l, '
            f'{_range(figures.span_cells(result["distance"]["mean"]).compressed())}.',
        )
        for result in results
    ]
    neighbours = [{'mean': np.array(result['distance']['mean'], float).diagonal(1)} for result in results]
    return pictures, [_by_layer('Angular distance across each layer (n = 1)', results, neighbours)], ()


def _drop(every, results):
    parts = []
    metrics = dict.fromkeys(name for result in results for name in result['metrics'])
    for metric in sorted(metrics, key=lambda name: (name != 'perplexity', name == 'loss')):
        having = [result for result in results if metric in result['metrics']]
        blocks = {int(block) for result in having for block in result['metrics'][metric]['drop']}
        whole = [result['metrics'][metric] for result in having]
        note = '; '.join(
            f'{result["label"]} {_text(of.get("value"), of.get("standard_error"))}'
            for result, of in zip(having, whole, strict=True)
        )
        for block in sorted(blocks):
            of_block = [result for result in having if f'{block}' in result['metrics'][metric]['drop']]
            quantities = [result['metrics'][metric]['drop'][f'{block}'] for result in of_block]
            what = f'change in {metric} without {"each layer" if block == 1 else f"{block} layers in a row"}'
            pictures = tuple(
                Picture(
                    figures.drop([result], metric, block, among=of_block),
                    f'Bars of {result["label"]}: {what}, {_range(quantity["mean"])}.',
                )
                for result, quantity in zip(of_block, quantities, strict=True)
            )
            table = _by_layer(what.capitalize(), of_block, quantities, what='layer' if block == 1 else 'first layer')
            parts.append(Section(what.capitalize(), (), (f'With all layers: {note}.',), pictures, (table,)))
    return (), (), parts


def _gradients(every, results):
    def charts(results):
        alt = f'Lines over the layers, one for each of {_labels(results)}: norm of the gradient'
        ranges = '; '.join(f'{result["label"]} {_range(result["layers"]["mean"])}' for result in results)
        return (
            Picture(figures.gradients(results), f'{alt}: {ranges}.', 'All weights of a layer.'),
            Picture(figures.gradient_matrices(results), f'{alt} of the seven matrices.', 'By matrix.', wide=True),
        )

    def table(results):
        return _by_layer('Gradient norm by layer', results, [result['layers'] for result in results])

    tables = [table(results)]
    if outside := list(dict.fromkeys(name for result in results for name in result.get('outside') or ())):
        empty = {'mean': None}
        rows = [
            (name, *(_text(of['mean'], of.get('standard_error')) for of in
                     ((result.get('outside') or {}).get(name, empty) for result in results)))
            for name in outside
        ]  # fmt: skip
        head = ('weights', *(result['label'] for result in results))
        tables.append(Table('Gradient norm outside the layers', head, rows, folded=True))
    first = [of_run[0] for of_run in every if len(of_run) > 1]
    parts = []
    if first:
        steps = {result.get('step') for result in first}
        when = 'At initialisation' if steps == {0} else f'At step {", ".join(f"{step}" for step in sorted(steps))}'
        parts.append(Section(when, pictures=charts(first), tables=(table(first),)))
    return charts(results), tables, parts


def _variance(every, results):
    ranges = '; '.join(f'{result["label"]} {_range(result["variance"]["mean"])}' for result in results)
    pictures = (
        Picture(
            figures.variance(results),
            f'Lines over the depth, one for each of {_labels(results)}: variance of the residual stream: {ranges}.',
            'Variance with depth; dashed: the theory.',
        ),
        Picture(
            figures.contribution(results),
            f'Lines over the layers, one for each of {_labels(results)}: what attention and MLP add over the stream.',
            'What attention and MLP add, relative to the stream.',
        ),
    )
    depths = [range(len(result['variance']['mean'])) for result in results]
    tables = [_by_layer('Variance at each depth', results, [r['variance'] for r in results], depths, what='depth')]
    for name, shown in (('attention', 'attention'), ('mlp', 'MLP')):
        quantities = [result['contribution'][name] for result in results]
        tables.append(_by_layer(f'|F(x)| / |x| of {shown} by layer', results, quantities))
    return pictures, tables, ()


def _evolution(runs):
    parts = []
    for key, heading, quantity in EVOLUTIONS:
        found = []
        for run in runs:
            lines = [line for line in run.lines if isinstance(line.get(key), list)]
            L = len(lines[-1][key]) if lines else 0
            lines = [line for line in lines if len(line[key]) == L]
            if L:
                some = np.unique(np.linspace(0, len(lines) - 1, min(MOST_POINTS, len(lines))).round().astype(int))
                steps = [lines[i]['step'] for i in some]
                found.append((run, steps, [[_number(value) for value in lines[i][key]] for i in some]))
        among = [values for _, _, values in found]
        pictures = tuple(
            Picture(
                figures.evolution(values, steps, run.name, quantity, among),
                f'Heat map of {run.name}: {heading.lower()} at {len(steps)} steps, {_range(values)}.',
            )
            for run, steps, values in found
        )
        if found:
            parts.append(Section(heading, pictures=pictures))
    return Section('Layer by layer during the training', parts=tuple(parts)) if parts else None


def _by_layer(caption, results, quantities, numbers=None, what='layer'):
    """A folded table: a row a layer (or what else `numbers` counts), a column a result."""
    columns = []
    for quantity, of in zip(quantities, numbers or [result['layer_index'] for result in results], strict=True):
        mean, error = quantity['mean'], quantity.get('standard_error')
        errors = [None] * len(mean) if error is None else error
        columns.append({number: _text(*of_one) for number, *of_one in zip(of, mean, errors, strict=False)})
    rows = [(f'{at}', *(column.get(at, '') for column in columns)) for at in sorted(set().union(*columns))]
    return Table(caption, (what, *(result['label'] for result in results)), rows, folded=True)


def _numbers(lines, key):
    """(tokens, values) of the metrics lines that have `key`; nan where it is no number."""
    found = [(line['tokens'], _number(line[key])) for line in lines if key in line and 'tokens' in line]
    return tuple(map(list, zip(*found, strict=True))) if found else ([], [])


def _thinned(x, y):
    """Means over MOST_POINTS equal parts of a curve at most, of what is finite."""
    parts = np.array_split(np.arange(len(x)), min(MOST_POINTS, len(x))) if x else []
    x, y = np.array(x, float), np.array(y, float)
    mean = lambda values: values[np.isfinite(values)].mean() if np.isfinite(values).any() else math.nan  # noqa: E731
    return [mean(x[part]) for part in parts], [mean(y[part]) for part in parts]


def _sentence(text):
    text = f'{text}'.strip()
    return f'{text[:1].upper()}{text[1:]}{"" if text.endswith(".") else "."}'


def _number(value):
    return float(value) if isinstance(value, int | float) else math.nan


def _text(value, error=None):
    """A number and its standard error for people."""
    if value is None or not math.isfinite(value):
        return 'not finite'
    known = error is not None and math.isfinite(error)
    return f'{value:.4g} ± {error:.2g}' if known else f'{value:.4g}'


def _range(values):
    values = np.array(values, float)
    values = values[np.isfinite(values)]
    return f'from {values.min():.3g} to {values.max():.3g}' if values.size else 'nothing finite'


def _names(runs):
    return ', '.join(run.name for run in runs)


def _labels(results):
    return ', '.join(result['label'] for result in results)

"""What the report says of runs, section by section: text, tables and figures."""

import math
import shlex

import numpy as np

from mixln_jax.report import figures
from mixln_jax.report.page import Picture, Section, Table

# Lists over layers in metrics.jsonl: key, heading, what the bar of colours says.
EVOLUTIONS = (
    ('analysis/angular_distance', 'Angular distance across each layer', 'angular distance (share of π)'),
    ('analysis/perplexity_drop', 'Change in perplexity without each layer', 'change in perplexity\nwithout the layer'),
    ('analysis/grad_norm', 'Gradient norm of each layer, on a fixed sample', 'gradient norm'),
    ('layers/grad_norm', 'Gradient norm of each layer, of the batch of the step', 'gradient norm'),
    ('analysis/variance', 'Variance of the residual stream after each layer', 'variance'),
)
# What a part of a text's description is called.
PARTS = {
    'source': 'the documents',
    'mode': 'how rows are made',
    'seq_length': 'the length of rows',
    'amount': 'the number of tokens to evaluate on',
}
MOST_POINTS = 60  # of a line, and columns of a heat map, over the training: more are not seen


def compose(runs, compared):
    """The Sections of a report.

    Args:
        runs: of `report.read`.
        compared: the Section that compares them.
    """
    sections = [
        compared,
        Section('Runs', tables=(_runs(runs),)),
        _training(runs),
        _analysis(runs, 'angular', 'Angular distance', _angular),
        _analysis(runs, 'drop', 'Change without a layer', _drop),
        _analysis(runs, 'gradients', 'Gradients', _gradients),
        _analysis(runs, 'variance', 'Growth of the residual stream', _variance),
        _evolution(runs),
    ]
    return [section for section in sections if section]


def _runs(runs):
    """A row for every run."""
    seeds = [name for name in ('seed', 'data.seed') if len({run.keys[name] for run in runs}) > 1]
    rows = []
    for run in runs:
        commit, devices = run.environment.get('commit'), run.environment.get('devices')
        short = f'{commit[:10]}{"-dirty" * commit.endswith("-dirty")}' if isinstance(commit, str) else '-'
        device = '-'
        if isinstance(devices, dict):
            count = f'{devices["count"]} x ' if devices.get('count', 1) != 1 else ''
            device = f'{count}{devices.get("kind", "-")}'
        evaluated, perplexity = run.last('eval/perplexity')
        rows.append(
            (run.name, '-' if evaluated is None else fixed(perplexity, 2), *(f'{run.keys[name]}' for name in seeds),
             run.placement, f'{run.config.model.num_layers}', run.steps, short, device)
        )  # fmt: skip
    head = ('run', 'perplexity', *seeds, 'placement', 'layers', 'steps', 'commit', 'device')
    return Table('What was run', *filled(head, rows))


def filled(head, rows):
    """(head, rows) of a table without the columns in which nothing stands."""
    kept = [number for number, column in enumerate(zip(*rows, strict=True)) if not {*column} <= {'-', ''}]
    return tuple(head[number] for number in kept), [tuple(row[number] for number in kept) for row in rows]


def _training(runs):
    def chart(key, label, what, points=None, log=None):
        series = []
        for run in runs:
            x, y = _thinned(*_numbers(run.lines, key))
            marked = _numbers(run.lines, points) if points else ()
            named = {'label': run.name, 'colour': run.colour}
            series.append(named | {'x': x, 'y': y, 'points': marked if len(marked) and len(marked[0]) else None})
        alt = f'Lines of {label} over the tokens, one for each of {listed(runs)}.'
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
        (
            f'{step:,}',
            *(fixed(number(lines[step]['eval/perplexity']), 2) if step in lines else '-' for lines in by_step),
        )
        for step in steps
    ]
    if not rows:
        return ()
    head, rows = filled(('step', *(run.name for run in runs)), rows)
    return (Table('Perplexity in evaluation, by step', head, rows, folded=len(rows) > 8),)


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
        notes.append(f'Not measured yet: {listed(missing)}. `{command}` does it.')
    if not measured:
        return Section(heading, notes=tuple(notes))
    results = [run.results(job)[-1] for run in measured]
    pictures, tables, parts = show([run.results(job) for run in measured], results)
    names = ('step', 'tokens', 'rows', 'positions', 'gradients', 'rows_per_gradient', 'theory_constant')
    shown = [name for name in names if any(result.get(name) is not None for result in results)]
    rows = [(result['label'], f'{result["checkpoint_label"] or "-"}', *_about(result, shown)) for result in results]
    warnings = ()
    if differ := differences([result['label'] for result in results], [result.get('text') for result in results]):
        warnings = (f'Not measured on the same text, so not to be compared. The results differ in {differ}.',)
    about = Table('What was measured', ('run', 'checkpoint', *(name.replace('_', ' ') for name in shown)), rows)
    return Section(heading, texts, tuple(notes), tuple(pictures), (about, *tables), tuple(parts), warnings)


def differing(texts):
    """The parts, such as the tokenizer, in which the texts of runs or results differ; None: unknown."""
    texts = [text or {} for text in texts]
    names = dict.fromkeys(name for text in texts for name in text)
    return [name for name in names if len({f'{text.get(name)}' for text in texts}) > 1]


def differences(names, texts):
    """In what texts differ, and who differs from whom, for people: '' where in nothing."""
    said = []
    for part in differing(texts):
        sides = {}
        for name, text in zip(names, texts, strict=True):
            sides.setdefault(f'{(text or {}).get(part, "unknown")}', []).append(name)
        who = []
        for value, side in sorted(sides.items(), key=lambda pair: len(pair[1])):
            readable = f'{value}: ' if len(value) <= 12 else ''  # not a digest
            many = len(side) > 3 and len(who) == len(sides) - 1
            who.append(readable + ('all others' if many else ', '.join(side)))
        said.append(f'{PARTS.get(part, f"the {part}")} ({"; ".join(who)})')
    return ', '.join(said[:-1]) + ' and ' * (len(said) > 1) + ''.join(said[-1:])


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
        ordered = sorted(steps, key=lambda step: -1 if step is None else step)
        when = 'At initialisation' if steps == {0} else f'At step {", ".join(map(str, ordered))}'
        parts.append(Section(when, pictures=charts(first), tables=(table(first),)))
    return charts(results), tables, parts


def _variance(every, results):
    ranges = '; '.join(f'{result["label"]} {_range(result["variance"]["mean"])}' for result in results)
    pictures = (
        Picture(
            figures.variance(results),
            f'Lines over the depth, one for each of {_labels(results)}: variance of the residual stream: {ranges}.',
            'Variance with depth; dash-dotted: the theory.',
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
                found.append((run, steps, [[number(value) for value in lines[i][key]] for i in some]))
        if found:
            parts.append(Section(heading, pictures=tuple(_evolution_pictures(found, heading, quantity))))
    return Section('Layer by layer during the training', parts=tuple(parts)) if parts else None


def _evolution_pictures(found, heading, quantity):
    """Lines of all runs at the last step that was measured, and a heat map of each that was measured at several.

    Args:
        found: (run, steps [S], values [S,L]) of each.
    """
    last = [values[-1] for _, _, values in found]
    steps = {steps[-1] for _, steps, _ in found}
    first, newest = min(steps), max(steps)
    every = f'the last step that was measured of each, from {first:,} to {newest:,}'
    ranges = '; '.join(f'{run.name} {_range(values)}' for (run, _, _), values in zip(found, last, strict=True))
    named = [{'label': run.name, 'colour': run.colour} for run, _, _ in found]
    yield Picture(
        figures.by_layer(last, named, quantity),
        f'Lines over the layers, one for each of {listed([run for run, _, _ in found])}: {heading.lower()}: {ranges}.',
        f'At {every if first < newest else f"step {newest:,}"}.',
    )
    among = [values for _, steps, values in found if len(steps) > 1]
    for run, steps, values in found:
        if len(steps) > 1:
            yield Picture(
                figures.evolution(values, steps, run.name, quantity, among),
                f'Heat map of {run.name}: {heading.lower()} at {len(steps)} steps, {_range(values)}.',
            )


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
    found = [(number(line['tokens']), number(line[key])) for line in lines if key in line and 'tokens' in line]
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


def number(value):
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _text(value, error=None):
    """A number and its standard error for people."""
    if value is None or not math.isfinite(value):
        return 'not finite'
    known = error is not None and math.isfinite(error)
    return f'{short(value)} ± {short(error, 2)}' if known else short(value)


def fixed(value, decimals):
    """A number with so many decimals, for people, while that is readable."""
    if not math.isfinite(value):
        return 'not finite'
    return f'{value:,.{decimals}f}' if abs(value) < 1e6 else short(value)


def short(value, digits=4):
    """A finite number for people, so many digits or all before the point; powers of ten where it is far from 1."""
    return f'{value:,.0f}' if 10 ** (digits - 1) <= abs(value) < 1e9 else f'{value:.{digits}g}'


def _range(values):
    values = np.array(values, float)
    values = values[np.isfinite(values)]
    return f'from {short(values.min(), 3)} to {short(values.max(), 3)}' if values.size else 'nothing finite'


def listed(runs):
    return ', '.join(run.name for run in runs)


def _labels(results):
    return ', '.join(result['label'] for result in results)

"""The sections of a report about what the analyses have measured."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mixln_jax.report import figures
from mixln_jax.report.inputs import Run
from mixln_jax.report.numbers import value_range, with_error
from mixln_jax.report.page import Picture, Section, Table
from mixln_jax.report.texts import differences, listed

Result = Mapping[str, Any]  # an element of `results` in a result.json, as Run.results returns it
Results = Sequence[Result]  # of the newest step of each run
AllResults = Sequence[Results]  # of all steps of each run
Parts = tuple[Sequence[Picture], Sequence[Table], Sequence[Section]]


def measured(runs: Sequence[Run]) -> list[Section]:
    """Returns a section for each analysis; one that no run has done tells the command that does it."""
    return [
        _analysis(runs, 'angular', 'Angular distance', _angular),
        _analysis(runs, 'drop', 'Change without a layer', _drop),
        _analysis(runs, 'gradients', 'Gradients', _gradients),
        _analysis(runs, 'variance', 'Growth of the residual stream', _variance),
    ]


def _analysis(runs: Sequence[Run], job: str, heading: str, show: Callable[[AllResults, Results], Parts]) -> Section:
    """Returns the section of an analysis.

    Args:
        runs: all runs of the report.
        job: the analysis.
        heading: of the section.
        show: (results of all steps of each run, results of the newest step of each run) -> content of the section.
    """
    done = [run for run in runs if job in run.analyses]
    contents = [run.analyses[job] for run in done]
    texts = tuple(dict.fromkeys(_sentence(content['definition']) for content in contents if content.get('definition')))
    notes = [
        f'{name.capitalize()}: {text}'
        for name in ('unit', 'source')
        for text in dict.fromkeys(f'{content[name]}' for content in contents if content.get(name))
    ]
    if missing := [run for run in runs if run not in done]:
        words = ['python', '-m', f'mixln_jax.analysis.{job}', '--checkpoint', *(run.folder for run in missing)]
        notes.append(f'Not measured yet: {listed(missing)}. `{shlex.join(words)}` does it.')
    if not done:
        return Section(heading, notes=tuple(notes))
    results = [run.results(job)[-1] for run in done]
    pictures, tables, parts = show([run.results(job) for run in done], results)
    warnings: tuple[str, ...] = ()
    if differ := differences([result['label'] for result in results], [result.get('text') for result in results]):
        warnings = (f'Not measured on the same text, so not to be compared. The results differ in {differ}.',)
    tables = (_sample_table(results), *tables)
    return Section(heading, texts, tuple(notes), tuple(pictures), tables, tuple(parts), warnings)


def _sample_table(results: Results) -> Table:
    """Returns a table of the checkpoint and the sample that were measured."""
    names = ('step', 'tokens', 'rows', 'positions', 'gradients', 'rows_per_gradient', 'theory_constant')
    shown = [name for name in names if any(result.get(name) is not None for result in results)]
    rows = [
        (result['label'], f'{result["checkpoint_label"] or "-"}', *(_cell(result.get(name)) for name in shown))
        for result in results
    ]
    return Table('What was measured', ('run', 'checkpoint', *(name.replace('_', ' ') for name in shown)), rows)


def _cell(value: Any) -> str:
    if value is None:
        return '-'
    return f'{value:,}' if isinstance(value, int) else f'{value:.4g}' if isinstance(value, float) else f'{value}'


def _angular(all_results: AllResults, results: Results) -> Parts:
    del all_results
    pictures = [
        Picture(
            figures.angular([result], among=results),
            f'Heat map of {result["label"]}: angular distance over n layers from layer l, '
            f'{value_range(figures.span_cells(result["distance"]["mean"]).compressed())}.',
        )
        for result in results
    ]
    neighbours = [{'mean': np.array(result['distance']['mean'], float).diagonal(1)} for result in results]
    return pictures, [_layer_table('Angular distance across each layer (n = 1)', results, neighbours)], ()


def _drop(all_results: AllResults, results: Results) -> Parts:
    """Returns a part for each metric and each size of block, headlines first and the loss last."""
    del all_results
    metrics = dict.fromkeys(name for result in results for name in result['metrics'])
    first = {result['headline'] for result in results}
    parts = []
    for metric in sorted(metrics, key=lambda name: (name not in first, name == 'loss')):
        measured_it = [result for result in results if metric in result['metrics']]
        blocks = {int(block) for result in measured_it for block in result['metrics'][metric]['drop']}
        parts += [_drop_part(measured_it, metric, block) for block in sorted(blocks)]
    return (), (), parts


def _drop_part(results: Results, metric: str, block: int) -> Section:
    whole = '; '.join(
        f'{result["label"]} {with_error(value.get("value"), value.get("standard_error"))}'
        for result, value in ((result, result['metrics'][metric]) for result in results)
    )
    results = [result for result in results if f'{block}' in result['metrics'][metric]['drop']]
    quantities = [result['metrics'][metric]['drop'][f'{block}'] for result in results]
    change = f'change in {metric} without {"each layer" if block == 1 else f"{block} layers in a row"}'
    pictures = tuple(
        Picture(
            figures.drop([result], metric, block, among=results),
            f'Bars of {result["label"]}: {change}, {value_range(quantity["mean"])}.',
        )
        for result, quantity in zip(results, quantities, strict=True)
    )
    first_column = 'layer' if block == 1 else 'first layer'
    table = _layer_table(change.capitalize(), results, quantities, first_column=first_column)
    return Section(change.capitalize(), (), (f'With all layers: {whole}.',), pictures, (table,))


def _gradients(all_results: AllResults, results: Results) -> Parts:
    tables = [_gradient_table(results)]
    if outside := list(dict.fromkeys(name for result in results for name in result.get('outside') or ())):
        columns = [result.get('outside') or {} for result in results]
        norms = {name: [column.get(name, {'mean': None}) for column in columns] for name in outside}
        rows = [
            (name, *(with_error(norm['mean'], norm.get('standard_error')) for norm in row))
            for name, row in norms.items()
        ]
        head = ('weights', *(result['label'] for result in results))
        tables.append(Table('Gradient norm outside the layers', head, rows, folded=True))
    first = [run_results[0] for run_results in all_results if len(run_results) > 1]
    parts = []
    if first:
        steps = {result.get('step') for result in first}
        ordered = sorted(steps, key=lambda step: -1 if step is None else step)
        when = 'At initialisation' if steps == {0} else f'At step {", ".join(map(str, ordered))}'
        parts.append(Section(when, pictures=_gradient_pictures(first), tables=(_gradient_table(first),)))
    return _gradient_pictures(results), tables, parts


def _gradient_pictures(results: Results) -> tuple[Picture, ...]:
    alt = f'Lines over the layers, one for each of {_labels(results)}: norm of the gradient'
    ranges = '; '.join(f'{result["label"]} {value_range(result["layers"]["mean"])}' for result in results)
    return (
        Picture(figures.gradients(results), f'{alt}: {ranges}.', 'All weights of a layer.'),
        Picture(figures.gradient_matrices(results), f'{alt} of the seven matrices.', 'By matrix.', wide=True),
    )


def _gradient_table(results: Results) -> Table:
    return _layer_table('Gradient norm by layer', results, [result['layers'] for result in results])


def _variance(all_results: AllResults, results: Results) -> Parts:
    del all_results
    ranges = '; '.join(f'{result["label"]} {value_range(result["variance"]["mean"])}' for result in results)
    pictures = (
        Picture(
            figures.variance(results),
            f'Lines over the depth, one for each of {_labels(results)}: variance of the residual stream: {ranges}.',
            'Variance with depth; dash-dotted: the theory.',
        ),
        Picture(
            figures.contribution(results),
            f'Lines over the layers, one for each of {_labels(results)}: what attention and MLP add to the stream, '
            'relative to it.',
            'What attention and MLP add, relative to the stream.',
        ),
    )
    depths = [range(len(result['variance']['mean'])) for result in results]
    variances = [result['variance'] for result in results]
    tables = [_layer_table('Variance at each depth', results, variances, depths, first_column='depth')]
    for name, label in (('attention', 'attention'), ('mlp', 'MLP')):
        quantities = [result['contribution'][name] for result in results]
        tables.append(_layer_table(f'|F(x)| / |x| of {label} by layer', results, quantities))
    return pictures, tables, ()


def _layer_table(
    caption: str,
    results: Sequence[Result],
    quantities: Sequence[Mapping[str, Any]],
    numbers: Sequence[Sequence[int]] | None = None,
    first_column: str = 'layer',
) -> Table:
    """Returns a folded table with a row for each layer and a column for each result.

    Args:
        caption: of the table.
        results: one for each column.
        quantities: {'mean': [n], 'standard_error': [n] or None} of each result.
        numbers: [n] of each result, the rows to which its values belong; None: the numbers of its layers.
        first_column: the head of the column with these numbers.
    """
    columns = []
    for quantity, rows in zip(quantities, numbers or [result['layer_index'] for result in results], strict=True):
        means, errors = quantity['mean'], quantity.get('standard_error')
        errors = [None] * len(means) if errors is None else errors
        columns.append({row: with_error(mean, error) for row, mean, error in zip(rows, means, errors, strict=False)})
    rows = [(f'{row}', *(column.get(row, '') for column in columns)) for row in sorted(set().union(*columns))]
    return Table(caption, (first_column, *(result['label'] for result in results)), rows, folded=True)


def _sentence(text: Any) -> str:
    text = f'{text}'.strip()
    return f'{text[:1].upper()}{text[1:]}{"" if text.endswith(".") else "."}'


def _labels(results: Results) -> str:
    return ', '.join(result['label'] for result in results)

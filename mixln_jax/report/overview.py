"""The first section of a report: the table that compares all runs."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mixln_jax.report.inputs import SEEDS, Headline, Run, groups, headlines, labels
from mixln_jax.report.numbers import fixed, short
from mixln_jax.report.page import Section, Table, without_empty_columns
from mixln_jax.report.texts import differences, differing, listed

SHOWN = ('model.norm_position', 'num_steps', 'expected.')  # keys in columns of their own: placement, steps, paper


def overview(runs: Sequence[Run]) -> Section:
    """Returns the section that compares the runs; its table has a row for each group of them."""
    ordered, columns = groups(runs), headlines(runs)
    rows = [_row(group, columns) for group in ordered]
    first_columns = list(rows[0]).index('placement') + 1
    settings = [
        {name: ', '.join(dict.fromkeys(f'{run.keys[name]}' or '(empty)' for run in group)) for name in runs[0].keys}
        for group in ordered
    ]
    shown = SHOWN + SEEDS * any(len(group) > 1 for group in ordered)  # the table of runs has the seeds of each run
    differ = [name for name in settings[0] if len({row[name] for row in settings}) > 1 and not name.startswith(shown)]
    head = [*list(rows[0])[:first_columns], *differ, *list(rows[0])[first_columns:]]
    cells = [[(row | keys)[name] for name in head] for row, keys in zip(rows, settings, strict=True)]
    order = ', '.join(f'{"lowest" if one.lower_is_better else "highest"} {one.label} first' for one in columns)
    caption = f'Last evaluation of each run, {order}'
    if any(len(group) > 1 for group in ordered):
        caption += '; runs that differ in seeds alone share a row: mean ± standard error (number of runs)'
    table = Table(caption, *without_empty_columns(head, cells))
    warnings = tuple(warning for one in columns for warning in _incomparable(runs, one))
    return Section(labels(columns).capitalize(), notes=tuple(_notes(runs)), warnings=warnings, tables=(table,))


def _row(group: Sequence[Run], columns: Sequence[Headline]) -> dict[str, str]:
    """Returns {column: text} of runs that differ in seeds alone, without their settings."""
    run, expected, own = group[0], group[0].config.expected, group[0].headline
    last: dict[str, list[Any]] = {
        key: [run.last(key)[1] for run in group] for key in (own.key, 'eval/top5', 'eval/bits_per_byte', 'tokens')
    }
    values, top5, bits, tokens = last.values()
    top5, bits, tokens = (
        [None if value is None or math.isnan(value) else value for value in column] for column in (top5, bits, tokens)
    )
    images = [run.config.batch_size * run.step if run.reads_images else None for run in group]
    tokens = [None if run.reads_images else number for run, number in zip(group, tokens, strict=True)]
    mean = np.mean(values) if None not in values else np.nan
    paper: float = getattr(expected, own.name, None) or 0.0
    compared = paper and np.isfinite(mean)
    return {
        'run': listed(group),
        **{one.label: _mean(values, own.digits) if one == own else '-' for one in columns},
        'top 5': _mean(top5, own.digits),
        'bits per byte': _mean(bits, 3),
        'paper': f'{paper:,.{own.digits}f}' if paper else '-',
        'difference': f'{mean - paper:+,.{own.digits}f} ({mean / paper - 1:+.1%})' if compared else '-',
        'placement': run.placement,
        'steps': run.steps,
        'tokens': _count(tokens),
        'images': _count(images),
        'source': expected.source or '-',
    }


def _count(values: Sequence[Any]) -> str:
    """Returns the mean of whole numbers as a text."""
    return f'{np.mean(values):,.0f}' if None not in values else '-'


def _mean(values: Sequence[Any], decimals: int) -> str:
    """Returns a value as a text, or the mean of several values, with its standard error and their number."""
    if None in values:
        return '-'
    text = fixed(np.mean(values), decimals)
    if len(values) == 1:
        return text
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return f'{text} ± {short(error, 2)} ({len(values)})'


def _incomparable(runs: Sequence[Run], compared: Headline) -> Iterator[str]:
    """Yields a warning if the runs with a headline read different texts, or read a text in different ways."""
    known = [run for run in runs if run.text and run.headline == compared]
    texts = [run.text for run in known]
    if {'tokenizer', 'mode', 'seq_length'} & {*differing(texts)}:
        # These change other parts too: how much text a number of tokens is, and the digest of prepared rows.
        prepared = any(run.config.data.source == 'tokens' for run in known)
        others = ('amount', 'source') if prepared else ('amount',)
        texts = [{name: value for name, value in text.items() if name not in others} for text in texts]
    if differ := differences([run.name for run in known], texts):
        warning = f'{compared.label.capitalize()} cannot be compared. The runs differ in {differ}.'
        if any(run.last('eval/bits_per_byte')[1] is not None for run in known):
            warning += ' Bits per byte can be compared if the text of the evaluation is the same.'
        yield warning


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    """Yields what a reader should know about single runs."""
    for run in runs:
        evaluated, _ = run.evaluation
        if run.step != run.config.num_steps or evaluated != run.step:
            when = 'not evaluated yet' if evaluated is None else f'evaluated at step {evaluated:,}'
            bad = f'; not finite from step {run.bad_step:,} on' if run.bad_step else ''
            yield f'{run.name} is unfinished: step {run.steps}, {when}{bad}.'
    unknown = [run for run in runs if not run.text]
    if unknown and len(runs) > 1:
        yield f'The text that {listed(unknown)} read is not known: environment.json does not name it.'

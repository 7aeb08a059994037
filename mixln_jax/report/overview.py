"""The table of all runs."""

import itertools
import json
import math

import numpy as np

from mixln_jax.report import sections, style
from mixln_jax.report.page import Section, Table

SEEDS = ('seed', 'data.seed')
SHOWN = ('model.norm_position', 'num_steps', 'expected.')  # keys in columns of their own: placement, steps, paper


def groups(runs):
    """Lists of runs: those together that differ in seeds alone and are equally far; the lowest perplexity first."""
    found = {}
    for run in runs:
        step, perplexity = run.last('eval/perplexity')
        alike = [run.step, step, run.text, {name: value for name, value in run.keys.items() if name not in SEEDS}]
        known = step is not None and math.isfinite(perplexity)
        candidates = found.setdefault(json.dumps(alike if known else run.name), [])
        # The same seeds again are no further sample.
        group = next((group for group in candidates if run.seeds not in [other.seeds for other in group]), None)
        group.append(run) if group else candidates.append([run])
    return sorted(itertools.chain(*found.values()), key=_rank)


def _rank(group):
    perplexities = [run.last('eval/perplexity')[1] for run in group]
    if None in perplexities:
        return 2, 0
    mean = np.mean(perplexities)
    return (0, mean) if np.isfinite(mean) else (1, 0)


def colour_key(groups):
    """Gives runs that differ in seeds alone one colour and dashes of their own, where there are enough of both."""
    if len(groups) <= len(style.COLOURS) and max(map(len, groups), default=0) <= len(style.DASHES):
        for number, group in enumerate(sorted(groups, key=lambda group: group[0].colour)):
            for other, run in enumerate(group):
                run.colour = number + other * len(style.COLOURS)


def overview(runs):
    """The Section that compares the runs: a row for every group of them."""
    ordered = groups(runs)
    rows = [_row(group) for group in ordered]
    placed = list(rows[0]).index('placement') + 1
    settings = [
        {name: ', '.join(dict.fromkeys(f'{run.keys[name]}' or '(empty)' for run in group)) for name in runs[0].keys}
        for group in ordered
    ]
    shown = SHOWN + SEEDS * any(len(group) > 1 for group in ordered)  # seeds of each run are in the table of runs
    differ = [name for name in settings[0] if len({of[name] for of in settings}) > 1 and not name.startswith(shown)]
    head = [*list(rows[0])[:placed], *differ, *list(rows[0])[placed:]]
    cells = [[(row | of)[name] for name in head] for row, of in zip(rows, settings, strict=True)]
    caption = 'Last evaluation of each run, lowest perplexity first'
    if any(len(group) > 1 for group in ordered):
        caption += '; runs that differ in seeds alone in one row: mean ± standard error (number of runs)'
    table = Table(caption, *sections.filled(head, cells))
    return Section('Perplexity', notes=tuple(_notes(runs)), warnings=tuple(_unlike(runs)), tables=(table,))


def _row(group):
    """{column: text} of runs that differ in seeds alone, but for the settings."""
    run, expected = group[0], group[0].config.expected
    perplexities, *others = (
        [run.last(key)[1] for run in group] for key in ('eval/perplexity', 'eval/bits_per_byte', 'tokens')
    )
    bits, tokens = ([None if value is None or math.isnan(value) else value for value in of] for of in others)
    mean = np.mean(perplexities) if None not in perplexities else np.nan
    paper = expected.perplexity or None
    compared = paper and np.isfinite(mean)
    return {
        'run': sections.listed(group),
        'perplexity': _mean(perplexities, 2),
        'bits per byte': _mean(bits, 3),
        'paper': f'{paper:,.2f}' if paper else '-',
        'difference': f'{mean - paper:+,.2f} ({mean / paper - 1:+.1%})' if compared else '-',
        'placement': run.placement,
        'steps': run.steps,
        'tokens': f'{np.mean(tokens):,.0f}' if None not in tokens else '-',
        'source': expected.source or '-',
    }


def _mean(values, decimals):
    """A number, or the mean of several, with its standard error and how many they are, a text."""
    if None in values:
        return '-'
    text = sections.fixed(np.mean(values), decimals)
    if len(values) == 1:
        return text
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return f'{text} ± {sections.short(error, 2)} ({len(values)})'


def _unlike(runs):
    """What hinders a comparison of perplexities: that runs read other text, or read it otherwise."""
    known = [run for run in runs if run.text]
    texts = [run.text for run in known]
    names = [run.name for run in known]
    if {'tokenizer', 'mode', 'seq_length'} & {*sections.differing(texts)}:
        # Then others differ with them: how much text a number of tokens is, and the digest of rows made beforehand.
        prepared = any(run.config.data.source == 'tokens' for run in known)
        others = ('amount', 'source') if prepared else ('amount',)
        texts = [{name: value for name, value in text.items() if name not in others} for text in texts]
    if differences := sections.differences(names, texts):
        yield (
            f'Perplexities are not comparable. The runs differ in {differences}. Bits per byte may be, where the text '
            'of the evaluation is the same.'
        )


def _notes(runs):
    """What a reader should know of single runs."""
    for run in runs:
        evaluated, _ = run.last('eval/perplexity')
        if run.step != run.config.num_steps or evaluated != run.step:
            seen = 'not evaluated yet' if evaluated is None else f'evaluated at step {evaluated:,}'
            bad = f'; not finite from step {run.bad_step:,} on' if run.bad_step else ''
            yield f'{run.name} is unfinished: step {run.steps}, {seen}{bad}.'
    unknown = [run for run in runs if not run.text]
    if unknown and len(runs) > 1:
        yield f'Not known, as environment.json does not say it: what text {sections.listed(unknown)} saw.'

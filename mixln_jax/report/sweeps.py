"""The section of a report that shows loss against learning rate, and how the cells of sweeps ended."""

import math
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from mixln_jax.report import figures
from mixln_jax.report.inputs import Run
from mixln_jax.report.numbers import fixed, short
from mixln_jax.report.page import Picture, Section, Table
from mixln_jax.report.sensitivity import (
    RATE,
    Curve,
    Estimate,
    common_rates,
    curves,
    estimate,
    is_lost,
    last_loss,
    paired,
    sensitivity,
)

HEADING = 'Loss by learning rate'
VALUE = (
    'The value of a run is its loss in the last evaluation, or the loss at initialisation if that is lower (Wortsman '
    'et al. 2023, arXiv 2309.14322). A run that a collapse ended counts with its last training loss, one that was not '
    'finite with the loss at initialisation.'
)


def sweep_section(runs: Sequence[Run]) -> Section | None:
    """Returns the section; None if no runs differ in their learning rate alone and none is a cell of a sweep."""
    several = [curve for curve in curves(runs) if curve.values]
    cells = [run for run in runs if run.ending]
    if not cells and max((len(curve.rates) for curve in several), default=0) < 2:
        return None
    tables = [*_tables(several), *_endings(runs)]
    if not several:
        return Section(HEADING, texts=('No run has ended with a result yet.',), tables=tuple(tables))
    picture = rate_picture(runs)
    return Section(HEADING, (VALUE,), tuple(_notes(several)), (picture,) if picture else (), tuple(tables))


def _tables(several: Sequence[Curve]) -> Iterator[Table]:
    if not several:
        return
    rates = sorted({rate for curve in several for rate in curve.rates})
    heads = [f'{rate:g}' for rate in rates]
    rows = [(curve.label, *(_cell(curve, rate) for rate in rates)) for curve in several]
    yield Table('Loss by learning rate: mean ± standard error (number of seeds)', ('setting', *heads), rows)
    yield _best(several)
    if len(several) > 1:
        yield _differences(several, rates, heads)


def _cell(curve: Curve, rate: float) -> str:
    lost = curve.collapsed(rate)
    return _shown(estimate(curve.values_at(rate).values())) + (f', {lost} collapsed' if lost else '')


def _best(several: Sequence[Curve]) -> Table:
    common = common_rates(several)
    rows = []
    for curve in several:
        best = '-' if curve.best is None else _best_rate(curve)
        loss = '-' if curve.best is None else _shown(estimate(curve.values_at(curve.best).values()))
        lost = sum(map(is_lost, curve.runs.values()))
        rows.append((curve.label, best, loss, _shown(sensitivity(curve, common)), f'{lost} of {len(curve.runs)}'))
    over = ', '.join(f'{rate:g}' for rate in common)
    caption = 'The best learning rate of each setting, among those at which all its seeds have ended'
    if len(common) > 1:
        caption += f', and its learning-rate sensitivity over the rates {over}: mean of the values minus the smallest'
    return Table(caption, ('setting', 'best rate', 'loss there', 'sensitivity', 'collapsed'), rows)


def _best_rate(curve: Curve) -> str:
    return f'{curve.best:g}' + (f' ({curve.edge})' if curve.edge else '')


def _differences(several: Sequence[Curve], rates: Sequence[float], heads: Sequence[str]) -> Table:
    first, *others = several
    rows = []
    for curve in others:
        at_best = [{} if one.best is None else one.values_at(one.best) for one in (first, curve)]
        pairs = [paired(first.values_at(rate), curve.values_at(rate)) for rate in rates]
        rows.append((curve.label, *map(_difference, pairs), _difference(paired(*at_best))))
    caption = f'Loss minus that of {first.label} at equal seeds, in pairs: mean ± standard error (number of pairs)'
    return Table(caption, ('setting', *heads, 'each at its best rate'), rows)


def _shown(value: Estimate) -> str:
    mean, error, count = value
    if not count:
        return '-'
    return f'{mean:.4f}' + (f' ± {short(error, 2)}' if math.isfinite(error) else '') + f' ({count})'


def _difference(value: Estimate) -> str:
    return _shown(value) if value[0] < 0 or not value[2] else f'+{_shown(value)}'


def _endings(runs: Sequence[Run]) -> Iterator[Table]:
    """Yields a table of the runs that collapsed, were not finite, were pruned or failed."""
    rows = []
    for run in runs:
        ending = run.ending
        if is_lost(run) or ending and ending.state != 'done':
            shown = ending.shown if ending else f'not finite at {run.bad_step:,}'
            before = run.last('eval/loss')
            evaluated = '-' if before[0] is None else f'{fixed(before[1] or math.nan, 4)} at {before[0]:,}'
            loss = last_loss(run)
            value = f'{loss:.4f}' if math.isfinite(loss) else '-'
            seeds = f'{run.seeds[0]}' if len({*run.seeds}) == 1 else ', '.join(map(str, run.seeds))
            rows.append((run.name, shown, f'{run.keys[RATE]:g}', seeds, value, evaluated))
    if rows:
        head = ('run', 'ended', 'learning rate', 'seed', 'last loss', 'last evaluation')
        yield Table('Runs that collapsed, were not finite, were pruned, or failed', head, rows)


def _notes(several: Sequence[Curve]) -> Iterator[str]:
    if edges := [f'{curve.label} ({curve.edge})' for curve in several if curve.edge]:
        yield f'The best rate is at the edge of the rates for {", ".join(edges)}: a rate beyond it may be better.'
    shown = [
        f'{curve.label} {curve.initial:.4f} ({"evaluated at step 0" if curve.initial_is_measured else "even guesses"})'
        if math.isfinite(curve.initial)
        else f'{curve.label} not known'
        for curve in several
    ]
    yield f'Loss at initialisation: {"; ".join(dict.fromkeys(shown))}.'
    if not all(curve.initial_is_measured for curve in several):
        yield '`--config.eval.first=true` evaluates the weights that a run begins with.'


def rate_picture(runs: Sequence[Run]) -> Picture | None:
    """Returns the figure of the loss against the learning rate; None if no runs differ in that alone."""
    several = [curve for curve in curves(runs) if curve.values]
    if not any(len(curve.rates) > 1 for curve in several):
        return None
    best = '; '.join(
        f'{curve.label} {estimate(curve.values_at(curve.best).values())[0]:.4f} at {_best_rate(curve)}'
        for curve in several
        if curve.best is not None
    )
    return Picture(
        _figure(several),
        f'Lines of the loss over the learning rate, one for each setting; the smallest: {best}.',
        'Means over seeds in a band of one standard error; dots: runs; crosses: collapsed or not finite.',
    )


def _figure(several: Sequence[Curve]) -> Figure:
    series = []
    for number, curve in enumerate(several):
        means = [estimate(curve.values_at(rate).values()) for rate in curve.rates]
        points = [(*at, is_lost(curve.runs[at])) for at in curve.values]
        series.append(
            {
                'label': curve.label,
                'colour': number,
                'x': curve.rates,
                'y': [mean for mean, _, _ in means],
                'error': [error if math.isfinite(error) else 0.0 for _, error, _ in means],
                'points': [(rate, curve.values[rate, seeds], lost) for rate, seeds, lost in points],
            }
        )
    return figures.rate_curves(series)

"""Tables and figures of the results: `python -m benchmarks.collapse.show`, from docs/results/collapse/*.csv."""

import argparse
import collections
import math
import pathlib
import statistics
import sys

from benchmarks.collapse.results import EXAMPLES, KEY, RESULTS, SERIES, SIGNS, load
from benchmarks.collapse.studies import CHANGED, CHANGES, DEPTHS, LONGER, PLACEMENTS, SEEDS, border
from mixln_jax.advice import judgement
from mixln_jax.report import figures, style

NAMES = {'post': 'Post-LN', 'deepnorm': 'DeepNorm', 'pre': 'Pre-LN'}
CHOSEN = '0'  # the seed on whose runs thresholds are chosen; the others test them


def named(placement):
    return NAMES.get(placement, placement.replace('mix', 'Mix-LN'))


def borders(runs):
    """Returns {(study, placement, layers, change): {seed: log2 of the border}}, of those that are known on both sides:
    the border is the geometric mean of the highest rate that trains and the next one of the grid."""
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    for run in runs:
        setting = run['study'], run['placement'], int(run['layers']), run['change']
        found[setting][int(run['seed'])][float(run['rate'])] = run['trains'] == '1'
    sides = {setting: {seed: border(rates) for seed, rates in seeds.items()} for setting, seeds in found.items()}
    return {
        setting: {seed: math.log2(low * high) / 2 for seed, (low, high) in seeds.items()
                  if low and high and high < 1.5 * low}
        for setting, seeds in sides.items()
    }  # fmt: skip


def estimate(values):
    """Returns (mean, standard error) of numbers; the error is nan of a single one."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def shown(values):
    """Returns a rate and its standard error as a factor, from logarithms."""
    if not values:
        return '-'
    mean, error = estimate(values)
    return f'{2**mean:.2g} ×/÷ {2**error:.2f} ({len(values)})'


def table(heads, rows):
    print('\n|', ' | '.join(heads), '|')
    print('|---' * len(heads) + '|')
    for row in rows:
        print('|', ' | '.join(map(str, row)), '|')


def border_table(known):
    rows = [
        (named(placement), *(shown([*known.get(('border', placement, layers, ''), {}).values()]) for layers in DEPTHS))
        for placement in PLACEMENTS
    ]
    table(('border of the peak rate', *(f'{layers} layers' for layers in DEPTHS)), rows)


def gains(known, placement, change, study='changes', layers=40):
    """Returns, for each seed, how many octaves a change moves the border."""
    base = known.get(('border', placement, layers, ''), {})
    changed = known.get((study, placement, layers, change), {})
    return [changed[seed] - base[seed] for seed in changed if seed in base]


def change_table(known):
    rows = []
    for change in CHANGES:
        factors = [gains(known, placement, change) for placement in CHANGED]
        rows.append((change, *(shown(values) for values in factors)))
    for change in LONGER:
        factors = [gains(known, placement, change, 'long', 24) for placement in CHANGED]
        rows.append((f'{change} (24 layers)', *(shown(values) for values in factors)))
    table(('change', *(f'{named(placement)}: border times' for placement in CHANGED)), rows)


def when_table(runs):
    """Prints, for the runs just above the border, when they collapse and what they had learned by then."""
    rows = []
    groups = collections.defaultdict(list)
    for run in runs:
        if run['trains'] == '0' and run['collapse'] and run['study'] != 'changes':
            groups[run['change'], run['placement']].append(run)
    for (change, placement), some in groups.items():
        after = [int(run['collapse']) - int(run['warmup']) for run in some]
        best = [float(run['best']) for run in some]
        rows.append((
            change or '400 steps', named(placement), len(some), sum(step > 0 for step in after),
            f'{statistics.median(after):+.0f} ({min(after):+} to {max(after):+})',
            sum(map(learned, some)), f'{statistics.median(best):.0%} ({max(best):.0%})',
        ))  # fmt: skip
    heads = ('steps', 'placement', 'collapsed', 'after the warm-up', 'steps after its end: median (range)',
             'had learned', 'best distance: median (largest)')  # fmt: skip
    table(heads, rows)


def learned(run):
    """Returns whether a network had learned something, at any time."""
    return float(run['best']) >= judgement.FALL


def rates_of(runs, column):
    """Returns (share of the runs that train in which a sign passes, share of the others in which it passes before the
    network has collapsed, the steps between)."""
    healthy = [run for run in runs if run['trains'] == '1']
    lost = [run for run in runs if run['trains'] == '0' and run['collapse']]
    leads = [int(run['collapse']) - int(run[column]) for run in lost if run[column]]
    false = sum(bool(run[column]) for run in healthy) / max(1, len(healthy))
    return false, sum(lead > 0 for lead in leads) / max(1, len(lost)), [lead for lead in leads if lead > 0]


def thresholds(runs):
    """Returns {sign: its columns}, from the loosest threshold to the strictest."""
    return {sign: [name for name in runs[0] if name.rpartition(' ')[0] == sign] for sign in SIGNS}


def with_post(runs, study):
    """Returns the runs of a study whose networks have Post-LN layers: Pre-LN learns less at high rates, and goes on."""
    return [run for run in runs if run['study'] == study and run['placement'] != 'pre']


def sign_tables(runs):
    """Prints how often a sign came before a collapse, and without one: for each sign that threshold which tells most of
    the first seed's collapses from its runs that train, on the other seeds and on the longer runs."""
    short = with_post(runs, 'border')
    chosen, others = ([run for run in short if (run['seed'] == CHOSEN) == first] for first in (True, False))
    best = [
        max(columns, key=lambda column: rates_of(chosen, column)[1] - rates_of(chosen, column)[0])
        for columns in thresholds(runs).values()
    ]
    for title, tests in (('400 steps, seeds 1 and 2', others), ('2,000 steps', with_post(runs, 'long'))):
        heads = (f'{title}: sign, in two lines running', 'false alarms', 'in time, of those that had learned',
                 'steps ahead: median (range)', 'in time, of the others', 'steps ahead: median (range)')  # fmt: skip
        table(heads, [sign_row(column, tests) for column in (*best, 'warned')])


def alarm_table(runs):
    """Prints, for networks of 24 layers that trained for 400 steps, at how many of their rates they would not have
    trained for 2,000: with and without a warning."""
    longer = {
        (placement, seed): border({float(run['rate']): run['trains'] == '1' for run in runs
                                   if run['change'] == '2,000 steps' and run['placement'] == placement
                                   and run['seed'] == seed})[1]
        for placement in CHANGED for seed in map(str, SEEDS)
    }  # fmt: skip
    some = [run for run in with_post(runs, 'border') if run['layers'] == '24' and run['trains'] == '1'
            and longer.get((run['placement'], run['seed']))]  # fmt: skip
    rows = []
    for text, had in (('with a warning', True), ('without', False)):
        late = [float(run['rate']) >= longer[run['placement'], run['seed']] for run in some
                if bool(run['warned']) == had]  # fmt: skip
        rows.append((text, len(late), sum(late)))
    table(('24 layers, trained for 400 steps', 'runs', 'at a rate that 2,000 steps do not survive'), rows)


def sign_row(column, runs):
    false, cells = sum(bool(run[column]) for run in runs if run['trains'] == '1'), []
    for had in (True, False):
        some = [run for run in runs if run['trains'] == '1' or learned(run) == had]
        _, _, leads = rates_of(some, column)
        lost = sum(run['trains'] == '0' and bool(run['collapse']) for run in some)
        range_ = f'{statistics.median(leads):.0f} ({min(leads)} to {max(leads)})' if leads else '-'
        cells += [f'{len(leads)} of {lost}', range_]
    return column, f'{false} of {sum(run["trains"] == "1" for run in runs)}', *cells


def verdict_table(runs):
    """Prints what the adviser says of the first steps of each run, against how the run ended."""
    groups = {
        'with Post-LN layers, 400 steps': [run for run in runs if run['study'] != 'long' and run['placement'] != 'pre'],
        'with Post-LN layers, 2,000 steps': [run for run in runs if run['study'] == 'long'],
        'Pre-LN, 400 steps': [run for run in runs if run['placement'] == 'pre'],
    }
    rows = []
    for which, some in groups.items():
        for trains, text in (('1', 'trained to the end'), ('0', 'did not')):
            counts = collections.Counter(run['verdict'] for run in some if run['trains'] == trains)
            rows.append((f'{which}: {text}', *(counts[state] for state in judgement.STATES)))
    table(('verdict of the adviser', *judgement.STATES), rows)


@style.styled
def time_figure(runs):
    """Draws when networks of 24 layers collapse, by their rate."""
    figure, (ax,) = style.chart(height=2.2)
    handles = []
    for number, placement in enumerate(CHANGED):
        some = [run for run in runs if run['placement'] == placement and run['layers'] == '24'
                and run['warmup'] == '50' and (run['study'] == 'border' or run['change'] == '2,000 steps')]  # fmt: skip
        lost = [run for run in some if run['collapse']]
        spared = [run for run in some if run['study'] == 'long' and run['trains'] == '1']
        shift = 1 + 0.03 * (number - 0.5)
        colour = style.COLOURS[number]
        handles += ax.plot([float(run['rate']) * shift for run in lost], [int(run['collapse']) for run in lost],
                           color=colour, marker='o', linestyle='')  # fmt: skip
        ax.plot([float(run['rate']) * shift for run in spared], [int(run['steps']) for run in spared], color=colour,
                marker='^', markerfacecolor='none', linestyle='')  # fmt: skip
    ax.set(xscale='log', yscale='log', xlabel='peak rate', ylabel='step of the collapse')
    return style.legend(figure, handles, [{'label': named(placement)} for placement in CHANGED])


@style.styled
def border_figure(known):
    figure, (ax,) = style.chart(height=2.4)
    handles, labels = [], []
    for number, placement in enumerate(PLACEMENTS):
        points = [(layers, estimate(values.values())) for layers in DEPTHS
                  if (values := known.get(('border', placement, layers, '')))]  # fmt: skip
        if points:
            labels.append(named(placement))
            shift = 1 + 0.012 * (number - len(PLACEMENTS) / 2)  # so that equal ones are both seen
            x, means = [layers * shift for layers, _ in points], [mean for _, (mean, _) in points]
            ends = [[2**mean - 2 ** (mean - error) for _, (mean, error) in points],
                    [2 ** (mean + error) - 2**mean for _, (mean, error) in points]]  # fmt: skip
            handles.append(ax.errorbar(x, [2**mean for mean in means], ends, color=style.COLOURS[number], marker='o',
                                       capsize=2))  # fmt: skip
    ax.set(xscale='log', yscale='log', xlabel='layers', ylabel='border of the peak rate')
    ax.set_xticks(DEPTHS, [str(layers) for layers in DEPTHS])
    ax.minorticks_off()
    ax.set_yticks([2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], ['0.002', '0.004', '0.008', '0.016', '0.032'])
    return style.legend(figure, handles, [{'label': name} for name in labels])


@style.styled
def change_figure(known):
    figure, (ax,) = style.chart(height=2.2)
    handles = []
    for number, placement in enumerate(CHANGED):
        points = [(place, estimate(values)) for place, change in enumerate(CHANGES)
                  if (values := gains(known, placement, change))]  # fmt: skip
        if points:
            y = [place + 0.2 * (number - 0.5) for place, _ in points]
            handles.append(ax.errorbar([mean for _, (mean, _) in points], y,
                                       xerr=[error for _, (_, error) in points], color=style.COLOURS[number],
                                       marker='o', linestyle='', capsize=2))  # fmt: skip
    ax.axvline(0, color=style.INK, linewidth=0.5)
    ax.set_yticks(range(len(CHANGES)), list(CHANGES))
    ax.invert_yaxis()
    ax.set_xlabel('shift of the border, octaves')
    return style.legend(figure, handles, [{'label': named(placement)} for placement in CHANGED][: len(handles)])


@style.styled
def sign_figure(runs):
    runs = with_post(runs, 'border')
    figure, (ax,) = style.chart(width=4.5, height=2.6)
    handles = []
    for number, columns in enumerate(thresholds(runs).values()):
        points = sorted(rates_of(runs, column)[:2] for column in columns)
        colour, dash = style.look({}, number)
        handles += ax.plot(*zip(*points, strict=True), color=colour, linestyle=dash, marker='o')
    false, true, _ = rates_of(runs, 'warned')
    handles += ax.plot([false], [true], color='black', marker='*', markersize=7, linestyle='')
    ax.set(xlabel='share of false alarms', ylabel='share of collapses seen before it has collapsed')
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    return style.legend(figure, handles, [{'label': name} for name in (*SIGNS, 'the warning of training')])


@style.styled
def example_figure(series):
    """Draws the runs on both sides of some borders."""
    figure, axes = style.chart(2, len(EXAMPLES), style.PAGE, 1.5, sharex='col', sharey='row')
    for column, (study, placement, layers, change) in enumerate(EXAMPLES):
        some = collections.defaultdict(list)
        for line in series:
            if [line[name] for name in KEY[:4]] == [study, placement, str(layers), change]:
                some[float(line['rate'])].append(line)
        handles = []
        for number, (_, lines) in enumerate(sorted(some.items())):
            for row, name in enumerate(('distance', 'grad_ratio')):
                values = [float(line[name]) for line in lines]
                handles += axes[row * len(EXAMPLES) + column].plot(
                    [int(line['step']) for line in lines], values, color=style.COLOURS[number]
                )
        rates = ' and '.join(f'{rate:g}' for rate in sorted(some))
        axes[column].set_title(f'{named(placement)}, {layers} layers:\n{rates}')
        axes[column].axhline(0, color=style.INK, linewidth=0.5)
        axes[len(EXAMPLES) + column].set(yscale='log', xlabel='step')
    axes[0].set(ylim=(-0.1, 0.52), ylabel='entropy distance')
    axes[len(EXAMPLES)].set_ylabel('gradient of layer 1 : last')
    labels = 'the highest rate that trains', 'the next higher one'
    return style.legend(figure, handles[::2], [{'label': label} for label in labels])


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--out', type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(argv)
    runs = load()
    known = borders(runs)
    lost = [run for run in runs if run['trains'] == '0' and run['placement'] != 'pre']
    unknown = sum(not run['collapse'] for run in lost)
    print(
        f'{len(runs)} runs; {len(lost)} with Post-LN layers do not train, for {unknown} of them the step is not known'
    )
    border_table(known)
    change_table(known)
    when_table(runs)
    sign_tables(runs)
    alarm_table(runs)
    verdict_table(runs)
    drawn = {'border': border_figure(known), 'changes': change_figure(known), 'signs': sign_figure(runs),
             'examples': example_figure(load(SERIES)), 'time': time_figure(runs)}  # fmt: skip
    for name, figure in drawn.items():
        (options.out / f'{name}.svg').write_bytes(figures.svg(figure))


if __name__ == '__main__':
    main(sys.argv[1:])

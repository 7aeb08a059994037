"""The results that the tree keeps: `python -m benchmarks.collapse.results --workdir DIR` adds the runs of a folder.

docs/results/collapse/runs.csv has a line for each run: its setting, its outcome, and for each sign the first step at
which it passed each threshold. Lines of other folders stay, so that the experiment can grow over days and machines.
"""

import argparse
import csv
import io
import itertools
import json
import math
import operator
import pathlib
import statistics
import sys

from benchmarks.collapse.studies import RATES, SEEDS, border, settings
from benchmarks.collapse.train import folder, outcomes
from mixln_jax.advice import judgement
from mixln_jax.analysis import stability
from mixln_jax.runs import log
from mixln_jax.system import outputs

RESULTS = pathlib.Path('docs/results/collapse')
RUNS, SERIES = RESULTS / 'runs.csv', RESULTS / 'examples.csv'
KEY = 'study', 'placement', 'layers', 'change', 'seed', 'rate'
APART = 0.05  # of the entropy: how much worse the loss of a collapsed network is
# The thresholds of each sign; recorded is the first step at which it has passed one in two lines, as training asks.
SIGNS = {
    'grad_ratio >': (3, 5, 10, 20, 50),
    'grad_ratio <': (0.1, 0.03, 0.01, 0.003, 0.001),
    'grad_growth >': (2, 3, 5, 10, 20),
    'grad_norm/median >': (1.5, 2, 3, 5, 10),  # over the median of the lines before
    'grad_to_eps <': (3000, 1000, 300, 100, 30, 10),
    'update_ratio >': (0.01, 0.02, 0.03, 0.05, 0.1),
    'update_ratio/median >': (1.5, 2, 3, 5),  # of update_ratio over the learning rate, which rises in the warm-up
    'attention_logits >': (10, 30, 50, 100, 300),
    'fall >': (0.01, 0.02, 0.05, 0.1),  # of the entropy distance below its best
}
DISTANCE = judgement.DISTANCE
EXAMPLES = (  # whose first seed's runs next to the border are kept line by line
    ('border', 'mix 1/2', 40, ''),
    ('long', 'post', 24, '2,000 steps'),
    ('long', 'mix 1/2', 24, '2,000 steps'),
)


def value(line, sign):
    """Returns the value of a sign in a line, of all layers the one that points to a collapse; None: it has none."""
    if sign == 'grad_norm':
        return line['train/grad_norm']
    found = line.get(f'stability/{sign}')
    known = [one for one in (found if isinstance(found, list) else [found]) if one is not None]
    return (min if sign == 'grad_to_eps' else max)(known) if known else None


def series(lines, sign):
    """Yields (step, value) of a sign, from the step on from which training looks at signs."""
    name, _, relative = sign.partition('/')
    before, best = [], -math.inf
    for line in lines:
        if name == 'fall':
            now = max(best, line[DISTANCE]) - line[DISTANCE]
            best = max(best, line[DISTANCE])
        else:
            now = value(line, name)
        if now is None:
            continue
        if sign == 'update_ratio/median':
            now /= line['train/learning_rate']
        before.append(now)
        if line['step'] < stability.Watch.FIRST or relative and len(before) <= stability.FEWEST_LINES:
            continue
        yield line['step'], now / statistics.median(before[:-1]) if relative else now


def read(root, setting, seed, number):
    """Returns the training lines of a run, without those that are not finite.

    The growth of the gradient ratio is added: the runs were made before it was a sign, which they led to.
    """
    lines = log.read_metrics(folder(root, setting, seed, number) / 'done' / 'metrics.jsonl')
    lines = [line for line in lines if line.get('train/loss') is not None and line.get(DISTANCE) is not None]
    ratios = [line['stability/grad_ratio'] for line in lines]
    for place, line in enumerate(lines):
        if setting.placement != 'pre':
            line['stability/grad_growth'] = stability.growth(ratios[place], ratios[:place])
    return lines


def collapse(lines, others):
    """Returns the first step from which on the loss of a run is near that of the frequencies of tokens, and worse than
    that of another run by APART, to the end; None: it is not at the end."""
    healthy, step = {line['step']: line[DISTANCE] for line in others}, None
    for line in lines:
        near = line[DISTANCE] < stability.NEAR
        apart = line['step'] in healthy and healthy[line['step']] - line[DISTANCE] > APART
        step = (step or line['step']) if near and apart else None
    return step


def crossings(lines):
    """Returns, for each sign and threshold, the first step at which it was passed in two lines running; None: never."""
    found = {}
    for sign, thresholds in SIGNS.items():
        name, compare = sign[:-2], operator.gt if sign.endswith('>') else operator.lt
        values = list(series(lines, name))
        for threshold in thresholds:
            passed = [(step, compare(now, threshold)) for step, now in values]
            twice = (step for (_, before), (step, now) in itertools.pairwise(passed) if before and now)
            found[f'{sign} {threshold:g}'] = next(twice, None)
    return found


def rows(root):
    """Yields the row of each run in a folder."""
    for (setting, seed), known in outcomes(root).items():
        healthy = border(known)[0]
        others = read(root, setting, seed, healthy) if healthy is not None else []
        for number, trains in known.items():
            done = folder(root, setting, seed, number) / 'done'
            lines = read(root, setting, seed, number)
            warmup = json.loads((done / 'config.json').read_text(encoding='utf-8'))['optim']['warmup_steps']
            seen = judgement.enough_steps(warmup)  # what a run of the adviser's own would have
            verdict = judgement.judge([line for line in lines if line['step'] <= seen], warmup)
            warned = stability.coming_collapse(lines)
            yield {
                'study': setting.study, 'placement': setting.placement, 'layers': setting.layers,
                'change': setting.change, 'seed': seed, 'rate': f'{RATES[number]:.3g}', 'warmup': warmup,
                'trains': int(trains), 'steps': lines[-1]['step'],
                'last': f'{sum(line[DISTANCE] for line in lines[-10:]) / len(lines[-10:]):.3f}',
                'best': f'{max(line[DISTANCE] for line in lines):.3f}',
                'collapse': None if trains else collapse(lines, others),
                'verdict': verdict.state, 'verdict_step': verdict.step, 'warned': warned and warned.step,
                **crossings(lines),
            }  # fmt: skip


def key(row):
    return tuple(str(row[name]) for name in KEY) + (f'{row.get("step", ""):>5}',)


def load(path=RUNS):
    """Returns the rows of a result file, as text; none if there is no file."""
    with open(path, encoding='utf-8', newline='') if path.exists() else io.StringIO() as file:
        return list(csv.DictReader(file))


def store(path, made):
    """Adds rows to a result file; of a run that is there already the new one stays."""
    merged = {key(row): row for row in [*load(path), *made]}
    text = io.StringIO(newline='')
    writer = csv.DictWriter(text, list(next(iter(merged.values()))), lineterminator='\n')
    writer.writeheader()
    writer.writerows(merged[name] for name in sorted(merged))
    outputs.write(path, text.getvalue().encode())


def examples(root):
    """Yields about 100 lines of each of the runs in EXAMPLES."""
    known = outcomes(root)
    for setting in settings():
        if (setting.study, setting.placement, setting.layers, setting.change) not in EXAMPLES:
            continue
        for number in border(known.get((setting, SEEDS[0]), {})):
            lines = read(root, setting, SEEDS[0], number) if number is not None else []
            for line in lines[:: math.ceil(len(lines) / 100)]:
                yield {
                    'study': setting.study, 'placement': setting.placement, 'layers': setting.layers,
                    'change': setting.change, 'seed': SEEDS[0], 'rate': f'{RATES[number]:.3g}', 'step': line['step'],
                    'distance': f'{line[DISTANCE]:.4f}', 'grad_ratio': f'{line["stability/grad_ratio"]:.3g}',
                }  # fmt: skip


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    options = parser.parse_args(argv)
    store(RUNS, rows(options.workdir))
    store(SERIES, examples(options.workdir))
    print(f'{RUNS}: {len(load())} runs')


if __name__ == '__main__':
    main(sys.argv[1:])

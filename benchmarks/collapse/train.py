"""Trains what is still to be trained: `python -m benchmarks.collapse.train --workdir DIR [--parallel N]`.

The metrics of a run stay in DIR; a run that was interrupted starts again. More seeds, rates or settings in studies.py
add runs to those that are there.
"""

import argparse
import concurrent.futures
import itertools
import json
import pathlib
import shutil
import subprocess
import sys

from benchmarks.collapse.studies import RATES, SEEDS, STUDIES, Setting, next_rate, settings
from mixln_jax.analysis import stability
from mixln_jax.runs import log

LAST = 50  # steps, at the end of a run, that decide


def folder(root, setting, seed, number):
    return root / setting.name / f'{RATES[number]:.3g}-{seed}'


def trains(path):
    """Returns whether the last losses of a whole run are better than those of the frequencies of tokens."""
    lines = [line for line in log.read_metrics(path) if 'train/loss' in line]
    last = lines[-1]['step']
    distances = [line['stability/entropy_distance'] for line in lines if line['step'] > last - LAST]
    known = [distance for distance in distances if distance is not None]
    return len(known) == len(distances) and sum(known) / len(known) >= stability.NEAR


def outcomes(root):
    """Returns the outcomes of all runs in the folder (studies.Outcomes)."""
    found = {}
    for setting in settings():
        for seed in SEEDS:
            for number in range(len(RATES)):
                path = folder(root, setting, seed, number) / 'done' / 'outcome.json'
                if path.exists():
                    outcome = json.loads(path.read_text(encoding='utf-8'))
                    found.setdefault((setting, seed), {})[number] = outcome['trains']
    return found


def train(root, setting: Setting, seed, number):
    """Trains one run to its end, and keeps its metrics and what it printed alone."""
    place = folder(root, setting, seed, number)
    shutil.rmtree(place, ignore_errors=True)
    keys = setting.keys | {'optim.learning_rate': RATES[number], 'seed': seed, 'data.seed': seed}
    words = [f'--config.{key}={value}' for key, value in keys.items()]
    place.mkdir(parents=True)
    with open(place / 'output.txt', 'wb') as output:
        command = [sys.executable, '-m', 'mixln_jax.main', '--config', 'configs/quickstart.py', *words]
        code = subprocess.run([*command, '--workdir', place / 'run'], stdout=output, stderr=output).returncode
    if code not in (0, 6):  # 6: it is not finite
        sys.exit(f'{place}: exit code {code}; output.txt there has all that it printed')
    made = place / 'made'
    made.mkdir()
    for name in ('metrics.jsonl', 'config.json'):
        shutil.copy(place / 'run' / name, made)
    outcome = {'trains': code == 0 and trains(made / 'metrics.jsonl'), 'exit_code': code}
    (made / 'outcome.json').write_text(json.dumps(outcome), encoding='utf-8')
    shutil.rmtree(place / 'run')
    made.rename(place / 'done')


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    parser.add_argument('--parallel', type=int, default=2)
    options = parser.parse_args(argv)
    order = sorted(itertools.product(settings(), SEEDS), key=lambda one: (STUDIES.index(one[0].study), one[1]))
    running = {}
    with concurrent.futures.ThreadPoolExecutor(options.parallel) as pool:
        while True:
            known = outcomes(options.workdir)
            for setting, seed in order:
                number = next_rate(known, setting, seed)
                if number is not None and (setting, seed) not in running and len(running) < options.parallel:
                    running[setting, seed] = pool.submit(train, options.workdir, setting, seed, number)
                    print(setting.name, 'seed', seed, f'rate {RATES[number]:.3g}', flush=True)
            if not running:
                return
            concurrent.futures.wait(running.values(), return_when=concurrent.futures.FIRST_COMPLETED)
            for key in [key for key, future in running.items() if future.done()]:
                running.pop(key).result()


if __name__ == '__main__':
    main(sys.argv[1:])

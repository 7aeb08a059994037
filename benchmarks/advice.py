"""Verdicts of the adviser on settings of known outcome: `python -m benchmarks.advice --workdir DIR [--show]`.

Each setting is trained to its end, by which its outcome is known: it has collapsed if the mean loss of its last LAST
steps is less than NEAR below the entropy of the tokens. The adviser sees the run as far as one of its own would go.
What has been trained is not trained again; --show judges without training.
"""

import argparse
import collections
import pathlib
import subprocess
import sys

from mixln_jax.advice import judgement
from mixln_jax.analysis import stability
from mixln_jax.runs import log

STEPS, WARMUP, LAST = 360, 40, 50
# Deep, narrow networks: width 32, MLP 96, 2 heads, batches of 8 x 64 bytes.
BASE = {
    'batch_size': 8, 'seq_length': 64, 'num_steps': STEPS, 'log_every': 5, 'stability.every': 20, 'eval.every': 0,
    'eval.tokens': 1000, 'checkpoint.every': 0, 'analysis.tokens': 0, 'model.hidden_size': 32,
    'model.intermediate_size': 96, 'model.num_heads': 2, 'optim.warmup_steps': WARMUP, 'optim.schedule': 'constant',
}  # fmt: skip
# placement, layers, rate, clip, b2, seed: none of them is among those that thresholds were chosen on (docs/train.md)
SETTINGS = (
    ('pre', 16, 3e-3, 1, 0.95, 11),
    ('post', 16, 2e-2, 0, 0.999, 11),
    ('mix', 16, 3e-3, 1, 0.95, 12),
    ('mix', 16, 2e-2, 0, 0.999, 12),
    ('deepnorm', 16, 3e-3, 1, 0.95, 13),
    ('deepnorm', 16, 2e-2, 0, 0.999, 13),
    ('post', 16, 2e-3, 1, 0.95, 14),
    ('post', 24, 1.2e-2, 0, 0.999, 14),
    ('mix', 24, 4e-3, 1, 0.95, 15),
    ('mix', 24, 1.2e-2, 0, 0.999, 15),
    ('post', 16, 4e-3, 1, 0.95, 16),
    ('post', 16, 1.2e-2, 1, 0.95, 16),
    ('pre', 24, 6e-3, 1, 0.95, 17),
    ('post', 24, 8e-3, 0, 0.999, 17),
    ('post', 24, 2e-3, 1, 0.95, 18),
    ('mix', 32, 1.5e-2, 0, 0.999, 18),
    ('pre', 16, 1e-2, 0, 0.999, 19),
    ('mix', 16, 1.5e-2, 0, 0.999, 19),
    ('mix', 16, 8e-3, 1, 0.95, 20),
    ('post', 32, 1e-2, 0, 0.999, 20),
)


def name(setting):
    return '-'.join(map(str, setting))


def train(folder, setting):
    placement, layers, rate, clip, b2, seed = setting
    changes = BASE | {
        'model.norm_position': placement, 'model.num_layers': layers, 'optim.learning_rate': rate,
        'optim.clip_norm': clip, 'optim.b2': b2, 'seed': seed, 'data.seed': seed,
    }  # fmt: skip
    words = [f'--config.{key}={value}' for key, value in changes.items()]
    command = [sys.executable, '-m', 'mixln_jax.main', '--config', 'configs/quickstart.py']
    code = subprocess.run([*command, '--workdir', folder, *words], stdout=subprocess.DEVNULL).returncode
    if code:
        sys.exit(f'{folder}: exit code {code}')


def outcome(lines):
    """Whether a whole run trained, and the mean entropy distance of its last lines."""
    distances = [line[judgement.DISTANCE] for line in lines if line['step'] > STEPS - LAST]
    last = sum(distances) / len(distances)
    return last >= stability.NEAR, last


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    parser.add_argument('--show', action='store_true')
    options = parser.parse_args(argv)
    if not options.show:
        for setting in SETTINGS:
            if not (options.workdir / name(setting) / 'checkpoints' / str(STEPS)).exists():
                train(options.workdir / name(setting), setting)
    seen, table = judgement.enough_steps(WARMUP), collections.Counter()
    print(
        '| placement, layers | peak rate | clip, b2 | seed | last loss below the frequencies | verdict at step',
        seen,
        '|',
    )
    print('|---|---|---|---|---|---|')
    for setting in SETTINGS:
        path = options.workdir / name(setting) / 'metrics.jsonl'
        lines = log.read_metrics(path) if path.exists() else []
        if not lines or lines[-1]['step'] < STEPS:
            continue  # not trained to its end yet
        trains, last = outcome(lines)
        verdict = judgement.judge([line for line in lines if line['step'] <= seen], WARMUP, planned=STEPS)
        table[trains, verdict.state] += 1
        placement, layers, rate, clip, b2, seed = setting
        print(f'| {placement}, {layers} | {rate:g} | {clip}, {b2} | {seed} | {last:.1%} | {verdict.sentence()} |')
    print('\n| |', ' | '.join(judgement.STATES), '|')
    print('|---' * (len(judgement.STATES) + 1) + '|')
    for trains, shown in ((True, 'trained to the end'), (False, 'collapsed')):
        print(f'| {shown} |', ' | '.join(str(table[trains, state]) for state in judgement.STATES), '|')


if __name__ == '__main__':
    main(sys.argv[1:])

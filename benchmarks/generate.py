"""Speed of generation: `python -m benchmarks.generate [--cases llama_9m:16 ...]`, against transformers' `generate`.

Ours and theirs have the same Pre-LN weights, greedy decoding with a cache, and the same random prompts. Each has a
process of its own; they take turns, and each round compares the times. The token that ends a text is never drawn.
"""

import argparse
import re
import statistics
import sys
import tempfile

from benchmarks import contenders, train_step
from mixln_jax.system import cli
from mixln_jax.system.errors import UsageError

CASES = ['llama_9m:1', 'llama_9m:16', 'llama_35m:1', 'llama_35m:16']
NEW = 128


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m benchmarks.generate', description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add('--cases', nargs='+', default=CASES, metavar='RECIPE:B', help=f'recipe and rows [{" ".join(CASES)}]')
    add('--prompt', type=int, default=32, metavar='N', help='tokens of a prompt [32]')
    add('--dtype', default='float32', help='to compute in: bfloat16 or float32 [float32]')
    add('--device', default='cpu', help='as config.device [cpu]')
    add('--rounds', type=int, default=9, metavar='N', help='[9]')
    add('--seconds', type=float, default=90, metavar='S', help='begin no new round of a case after so many [90]')
    add('--traceback', action='store_true', help='show where an error comes from')

    def command():
        options = cli.parse(parser, argv)
        options.steps, rows = 1, []
        for name in options.cases:
            if not (match := re.fullmatch(r'(\w+):(\d+)', name)):
                raise UsageError(f'--cases {name}: RECIPE:B is needed, as in llama_9m:16')
            case = contenders.Case(match[1], int(match[2]), options.prompt, options.device, options.dtype)
            with tempfile.TemporaryDirectory() as folder:
                made = {'mixln_jax': ('generate_ours', (case, folder, NEW))}
                made |= {'transformers': ('generate_hugging_face', (case, folder, NEW))}
                rows += train_step.measure(name, made, options)
            print('\n'.join([*_table(rows)][-len(made) :]), flush=True)
        print('\n'.join(['', f'`python -m benchmarks.generate {" ".join(sys.argv[1:])}`', '', *_table(rows)]))

    return cli.call(command, show_traceback='--traceback' in argv)


def _table(rows):
    yield '| case | | tokens/s | ms a token of all rows | speed : theirs |'
    yield '|---|---|---|---|---|'
    theirs = {row['case']: row for row in rows if row['contender'] == 'transformers'}
    for row in rows:
        if 'error' in row:
            yield f'| {row["case"]} | {row["contender"]} | {row["error"][:80]} | | |'
            continue
        speed = f'{row["tokens"] / row["step_seconds"]:,.0f} | {1000 * row["step_seconds"] / NEW:.2f}'
        ratios = sorted(
            other / own
            for own, other in zip(row['all_seconds'], theirs[row['case']].get('all_seconds', []), strict=False)
        )
        shown = f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})' if ratios else '-'
        yield f'| {row["case"]} | {row["contender"]} | {speed} | {shown} |'


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

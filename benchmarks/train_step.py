"""Speed of the train step: `python -m benchmarks.train_step [--cases llama_130m:32x256 ...] [--against]`.

Every contender of a case has a process of its own, with its weights and its compiled step. They take turns: in each
round each runs some steps, and its time is compared with that of the first one in the same round. Writes
benchmarks/results/<device>.json and a table beside it.

Contenders are ours, with each of `--placements` and, with the first of them, each of `--with`: settings of the recipe,
XLA_FLAGS, and heap=default, which is without what training asks of glibc on CPUs (`mesh.keep_heap`). With `--against`
also Hugging Face's LlamaForCausalLM, which has Pre-LN: compiled, with bfloat16 autocast, and eager, all bfloat16, as
the Mix-LN authors train; in float32 both without autocast. Those need requirements-parity.txt.
"""

import argparse
import multiprocessing
import pathlib
import platform
import re
import statistics
import sys
import time

from benchmarks import contenders
from mixln_jax.runs import environment
from mixln_jax.system import cli, outputs
from mixln_jax.system.errors import UsageError

RESULTS = pathlib.Path(__file__).parent / 'results'
CASES = ['llama_130m:32x256', 'llama_130m:8x1024', 'llama_1b:8x256', 'llama_1b:4x1024']


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m benchmarks.train_step', description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add('--cases', nargs='+', default=CASES, metavar='RECIPE:BxT', help=f'recipe, rows and tokens [{" ".join(CASES)}]')
    add('--placements', nargs='+', default=['pre', 'mix'], metavar='PLACEMENT', help='[pre mix]')
    add(
        '--with', nargs='+', default=[], metavar='KEY=VALUE,...', dest='settings', help='more of ours: model.remat=dots'
    )
    add('--against', action='store_true', help='Hugging Face models besides')
    add('--device', default='auto', help='as config.device [auto]')
    add('--dtype', default='bfloat16', help='to compute in: bfloat16 or float32 [bfloat16]')
    add('--rounds', type=int, default=9, metavar='N', help='[9]')
    add('--steps', type=int, default=10, metavar='N', help='of each contender in a round [10]')
    add('--seconds', type=float, default=90, metavar='S', help='begin no new round of a case after so many [90]')
    add('--total', type=float, default=1e9, metavar='S', help='begin no new case after so many')
    add('--out', default=str(RESULTS), metavar='DIR', help='[benchmarks/results]')
    add('--traceback', action='store_true', help='show where an error comes from')

    def command():
        options = cli.parse(parser, argv)
        rows, begun = [], time.monotonic()
        for case in options.cases:
            if rows and time.monotonic() - begun > options.total:
                print(f'{case} and what follows is left out: --total {options.total:g}')
                break
            if not (match := re.fullmatch(r'(\w+):(\d+)x(\d+)', case)):
                raise UsageError(f'--cases {case}: RECIPE:BxT is needed, as in llama_130m:32x256')
            recipe, batch_size, length = match[1], int(match[2]), int(match[3])
            common = contenders.Case(recipe, batch_size, length, options.device, options.dtype)
            rows += measure(case, _contenders(common, options), options)
        if not (done := [row for row in rows if 'error' not in row]):
            raise UsageError(f'nothing could be measured: {rows[0]["error"]}')
        _write(rows, done[0]['device'], options)

    return cli.call(command, show_traceback='--traceback' in argv)


def _contenders(case, options):
    """{name: (function of `contenders`, its arguments)}, the first is what others are compared with."""
    made = {placement: ('ours', (case, {'model.norm_position': placement})) for placement in options.placements}
    for text in options.settings:
        settings = dict(pair.partition('=')[::2] for pair in text.split(','))
        first = {'model.norm_position': options.placements[0]}
        made[f'{options.placements[0]}, {text}'] = ('ours', (case, first | settings))
    if options.against:
        made |= {f'Hugging Face, {name}': ('hugging_face', (case, name)) for name in ('compiled', 'eager')}
    return made


def measure(case, made, options):
    """Rows of the table: {'case', 'contender', 'step_seconds', 'ratio' (to the first), ...} or {..., 'error'}."""
    context, running, failed = multiprocessing.get_context('spawn'), {}, {}
    for name, (function, arguments) in made.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=contenders.serve, args=(theirs, function, arguments), daemon=True)
        process.start()
        theirs.close()
        about = _answer(ours)
        (failed if 'error' in about else running)[name] = (process, ours, about)
        print(f'{case} {name}: {about.get("error") or "ready, {compile_seconds:.1f} s".format(**about)}', flush=True)
    times, begun = {name: [] for name in running}, time.monotonic()
    for _ in range(options.rounds):
        if times and time.monotonic() - begun > options.seconds and all(times.values()):
            break
        for name, (_, pipe, _) in running.items():
            pipe.send(options.steps)
            times[name].append(_answer(pipe)['seconds'] / options.steps)
    rows = []
    for name in made:
        process, pipe, about = running.get(name) or failed[name]
        row = {'case': case, 'contender': name} | about
        if name in running:
            pipe.send(None)
            row |= _answer(pipe) | {'step_seconds': statistics.median(times[name]), 'all_seconds': times[name]}
            row |= {name: row[name] or rows[0].get(name) for name in ('peak', 'matmul_peak')} if rows else {}
            first = times.get(next(iter(made)))
            row['ratios'] = [time / other for time, other in zip(times[name], first or [], strict=False)]
        process.join(30)
        process.kill()
        rows.append(row)
    return rows


def _answer(pipe):
    try:
        return pipe.recv()
    except EOFError:
        return {'error': 'its process died'}


def _write(rows, device, options):
    """Writes JSON and table, and prints the table last."""
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r'\W+', '-', device).strip('-').lower()
    command = f'python -m benchmarks.train_step {" ".join(sys.argv[1:])}'
    about = {
        'command': command,
        'date': time.strftime('%Y-%m-%d'),
        'device': device,
        'python': platform.python_version(),
    }
    outputs.write_json(folder / f'{name}.json', about | {'versions': environment.versions(), 'rows': rows})
    table = '\n'.join(_table(rows))
    text = f'`{command}`\n\n{device}, {about["date"]}, {options.dtype}\n\n{table}\n'
    (folder / f'{name}.md').write_text(text, encoding='utf-8')
    print(f'\n{device}, {options.dtype}; {folder / name}.json\n\n{table}')


def _table(rows):
    heads = ['case', '', 'ms a step', 'tokens/s', 'peak GiB', 'MFU, datasheet', 'MFU, measured', 'time : the first']
    yield f'| {" | ".join(heads)} |'
    yield '|---' * len(heads) + '|'
    for row in rows:
        if 'error' in row:
            yield f'| {row["case"]} | {row["contender"]} | {row["error"][:60]} | | | | | |'
            continue
        per_second = row['flops'] / row['step_seconds']
        shares = [f'{per_second / peak:.1%}' if peak else '-' for peak in (row['peak'], row['matmul_peak'])]
        ratio = '-'
        if row['ratios']:
            low, high = min(row['ratios']), max(row['ratios'])
            ratio = f'{statistics.median(row["ratios"]):.3f} ({low:.2f} to {high:.2f})'
        cells = [
            *(row['case'], row['contender'], f'{1000 * row["step_seconds"]:.1f}'),
            *(f'{row["tokens"] / row["step_seconds"]:,.0f}', f'{row["peak_bytes"] / 2**30:.2f}', *shares, ratio),
        ]
        yield f'| {" | ".join(cells)} |'


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

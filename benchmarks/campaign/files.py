"""The other files of a run damaged, and every command that reads them."""

import contextlib
import random
import shutil

import numpy as np

from benchmarks.campaign.judging import command, expect, judged
from benchmarks.campaign.run import LAST, bits, contents, lines_of
from mixln_jax import evaluate, export
from mixln_jax.data import inspect
from mixln_jax.report import command as report
from mixln_jax.runs import checkpoint

OTHERS = ('config.json', 'environment.json', 'metrics.jsonl', 'tokenizer/tokenizer.json', 'tokenizer/fingerprint.json')
OTHERS += ('events.out.tfevents.*', '.lock')
CONTENTS = {
    'empty': lambda body, other: b'',
    'cut short': lambda body, other: body[: len(body) // 2],
    'NULs': lambda body, other: bytes(len(body)),
    'random bytes': lambda body, other: random.Random(0).randbytes(len(body) or 9),
    'deep JSON': lambda body, other: b'[' * 100_000,
    'JSON, a list': lambda body, other: b'[1, {"step": []}]',
    'a number of 5,000 digits': lambda body, other: b'{"step": %s}' % (b'9' * 5000),
    "another run's": lambda body, other: other,
}
LINES = {
    'lines twice': lambda lines: [line for line in lines for _ in range(2)],
    'lines reversed': lambda lines: lines[::-1],
    'the first line missing': lambda lines: lines[1:],
    'a line missing': lambda lines: lines[:1] + lines[2:],
    'two lines changed about': lambda lines: [lines[1], lines[0], *lines[2:]],
    'a digit changed': lambda lines: [lines[0].replace(b'1', b'2', 1), *lines[1:]],
}


def spoil(run, other, name, change):
    """Damages a file of a run; `change` is a function of its content and another run's, or of its lines, or None."""
    path, theirs = (next(folder.glob(name)) for folder in (run, other))
    if change is None:
        path.unlink()
    elif change in LINES.values():
        path.write_bytes(b''.join(change(path.read_bytes().splitlines(keepends=True))))
    else:
        path.write_bytes(change(path.read_bytes(), theirs.read_bytes()))


def goes_on(base, run):
    """The command again, where the last save is lost: the record is right at the end, or all that was there stays."""
    shutil.rmtree(run / f'checkpoints/{LAST}')
    start = contents(run)
    outcome = base.train(run)
    if outcome != 'done':
        now = contents(run)
        lost = [name for name, body in start.items() if name != '.lock' and now.get(name) != body]
        expect(not lost, f'{outcome}, but {lost} are changed')
        return outcome
    with contextlib.closing(checkpoint.Checkpoints(run / 'checkpoints', read_only=True)) as kept:
        expect(bits(kept.read(LAST, base.like)[0]) == base.states[LAST], 'other bits at the end')
    expect(lines_of(run) == lines_of(base.run), 'another record at the end')
    for name in ('config.json', 'tokenizer/tokenizer.json', 'tokenizer/fingerprint.json'):
        expect((run / name).read_bytes() == (base.run / name).read_bytes(), f'another {name} at the end')
    return 'as undisturbed'


def reads(base, run, name, good):
    """A command that reads a run. It changes nothing in it, and shows what it does of one that is whole."""
    start, out = contents(run), run.parent / f'{name}.out'
    outcome, shown = command(*COMMANDS_ON_RUNS[name](str(run), str(out)))
    expect(contents(run) == start, 'the run was changed')
    shown = shown.replace(str(run), 'RUN').replace(str(out), 'OUT')
    shown = {'report': '', 'export': bits({'': np.frombuffer(tensors(out), np.uint8)})}.get(name, shown)
    good.setdefault(name, shown)
    expect(outcome != 'done' or shown == good[name], f'shows {shown[:200]}')
    return 'as undisturbed' if outcome == 'done' else outcome


def tensors(folder):
    return b''.join(path.read_bytes() for path in sorted(folder.glob('*.safetensors')))


COMMANDS_ON_RUNS = {
    'evaluate': lambda run, out: (evaluate.main, ['--checkpoint', run, '--tokens', '400']),
    'inspect': lambda run, out: (inspect.main, ['--workdir', run, '--step', '2']),
    'report': lambda run, out: (report.main, [run, '--out', out]),
    'export': lambda run, out: (export.main, ['--checkpoint', run, '--out', out]),
}


def files(base, count=60):
    """The other files of a run damaged; then each command that reads it, and the run itself, go on."""
    good, row = {}, 'other files damaged'
    cases = [(name, way, change) for name in OTHERS for way, change in ({'deleted': None} | CONTENTS).items()]
    cases += [('metrics.jsonl', way, change) for way, change in LINES.items()]
    with base.copy() as run:
        for command_name in COMMANDS_ON_RUNS:
            reads(base, run, command_name, good)
    for name, way, change in cases[:: max(1, len(cases) // count)]:
        with base.copy() as run:
            spoil(run, base.other, name, change)
            for command_name in COMMANDS_ON_RUNS:
                yield judged(f'{row}, {command_name}', f'{name}: {way}', reads, base, run, command_name, good)
            yield judged(f'{row}, main goes on', f'{name}: {way}', goes_on, base, run)

"""Real processes, killed while they write checkpoints, or stopped by signals in every phase."""

import itertools
import os
import signal
import time

import killed_runs

from benchmarks.campaign.judging import Broken, expect, judged
from mixln_jax.runs import checkpoint_folders
from mixln_jax.system import errors


def half_written(folder):
    """{name: how many files} of the checkpoints that are being written."""
    found = [path for path in folder.glob('[0-9]*') if not (path / checkpoint_folders.COMMITTED).exists()]
    return {path.name: sum(len(files) for _, _, files in os.walk(path)) for path in found}


INSIDE, MISSED = 'killed inside', 'too late'


def killed_in_save(run, at, skip):
    """Starts a run, and kills it when `at` files are there of the
    first checkpoint after `skip` that it writes."""
    process, _ = killed_runs.start(run)
    old, seen = {*half_written(run / 'checkpoints')}, set()
    while process.poll() is None:
        now = half_written(run / 'checkpoints')
        old &= {*now}
        seen |= {*now} - old
        if any(number >= at for name, number in now.items() if name not in old) and len(seen) > skip:
            process.kill()
            break
    expect(process.wait() == -signal.SIGKILL, f'ended by itself with {process.returncode}')
    return INSIDE if half_written(run / 'checkpoints') else MISSED


def undisturbed(folder):
    """What kills and signals are compared with."""
    folder.mkdir(exist_ok=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder / 'xla')
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
    killed_runs.CHANGES['checkpoint.every'] = 1
    if not (run := folder / 'undisturbed').exists():
        killed_runs.finish(run)
    return run


def same_at_the_end(run, other):
    killed_runs.finish(run)
    try:
        killed_runs.assert_same_run(run, other)
    except AssertionError as error:
        raise Broken(f'not the bits of the undisturbed run: {str(error)[:300]}') from None
    return 'bitwise at the end'


def kills(base, count=25):
    """SIGKILL inside saves, one after the other in one run."""
    other, run, row = (
        undisturbed(base.folder / 'kills'),
        base.folder / 'kills/run',
        'SIGKILL while a checkpoint is written',
    )
    inside = 0
    for turn in range(3 * count):
        if inside < count:
            case = judged(row, f'kill {turn}', killed_in_save, run, turn % 12, turn % 2, limit=600)
            inside += case[2] == INSIDE
            yield case
    yield judged(f'{row}, the end', 'the end', same_at_the_end, run, other, limit=600)


def signalled(run, phase, number):
    words, log = killed_runs.PHASES[phase], run.with_suffix('.log')
    offset = log.stat().st_size if log.exists() else 0
    cache = '' if phase == 'compilation' else os.environ['JAX_COMPILATION_CACHE_DIR']
    process, log = killed_runs.start(run, JAX_COMPILATION_CACHE_DIR=cache)
    killed_runs.wait_for(process, log, words, offset)
    time.sleep(0.3 if phase in ('imports', 'compilation') else 0.01)
    process.send_signal(number)
    code, said = process.wait(), log.read_text(encoding='utf-8')[offset:]
    expect(code == errors.STOPPED and 'Traceback' not in said, f'exit {code}: {said[-300:]}')
    expect(f'stopped by {number.name}; run the same' in said.splitlines()[-1], said[-300:])
    return 'stopped (75)'


def signals(base, count=16):
    """SIGTERM, SIGINT and SIGHUP in each phase of two runs."""
    other, row = undisturbed(base.folder / 'kills'), 'SIGTERM, SIGINT, SIGHUP'
    for turn, (name, phase) in enumerate([*itertools.product(('one', 'two'), killed_runs.PHASES)][:count]):
        number = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[turn % 3]
        yield judged(row, f'{number.name}, {phase}', signalled, base.folder / f'kills/{name}', phase, number, limit=600)
    for run in sorted(base.folder.glob('kills/[ot][nw][eo]')):
        yield judged(f'{row}, the end', run.name, same_at_the_end, run, other, limit=600)

"""What came of a case: an outcome in words, or Broken."""

import os
import signal
import sys
import tempfile

from mixln_jax.system import errors

LIMIT = 60  # seconds that anything may take
CODES = {2, 4, 5}


class Broken(BaseException):
    """A contract that does not hold; no `except Exception` takes it for something else."""


def too_long(*_):
    raise Broken('took too long')


def expect(holds, problem):
    if not holds:
        raise Broken(problem)


def judged(row, name, judge, *args, limit=LIMIT):
    """(row of the table, what was tried, what came of it or a Broken)."""
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(limit)
    try:
        return row, name, judge(*args)
    except Broken as broken:
        return row, name, broken
    finally:
        signal.alarm(0)


def refused(error, codes=CODES):
    """The outcome of an exception, as a command ends with it."""
    known = errors.to_exit(error)
    expect(known.code in codes and str(known).strip(), f'{type(error).__name__}: {str(error)[:300]} -> {known.code}')
    return f'refused ({known.code})'


def command(job, *args, codes=CODES):
    """(outcome, standard output) of a command's `main`, called here; libraries in C are heard too."""
    with tempfile.TemporaryFile('w+b') as out, tempfile.TemporaryFile('w+b') as err:
        kept = [os.dup(1), os.dup(2)]
        sys.stdout.flush()
        [os.dup2(file.fileno(), number) for number, file in ((1, out), (2, err))]
        try:
            code = job(*args)
        except SystemExit as error:  # --help
            code = error.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            [os.dup2(number, at) for at, number in enumerate(kept, 1)]
            [os.close(number) for number in kept]
        said, shown = ([file.seek(0), file.read().decode(errors='replace')][1] for file in (err, out))
    lines = [line for line in said.splitlines() if not line.startswith('mixln_jax: warning')]
    expect(code in codes | {0}, f'exit {code}: {said[-600:]}')
    if code:
        expect(len(lines) == 1 and lines[0].startswith('mixln_jax: '), f'exit {code}, not one line: {said[-600:]}')
    expect('internal error' not in said and 'panicked' not in said and 'Traceback' not in said, said[-600:])
    return (f'refused ({code})' if code else 'done'), shown

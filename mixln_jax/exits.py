"""How a process ends: exit codes, one-line errors, signals.

Imports nothing heavy, so that a command can answer a signal while it still imports JAX.
"""

import argparse
import contextlib
import errno
import logging
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback

from mixln_jax import console

STOPPED = 75
UNGUARDED = 1  # how a worker ends that runs its parent's script, the whole job, once more
# A path that cannot be used as it should: what the user gave is at fault, not the program.
UNUSABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOSPC,
    errno.ENOENT,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EIO,
    errno.ESTALE,
    errno.EBUSY,
    errno.ENOTEMPTY,
    errno.ENODEV,
    errno.ENXIO,
    errno.ETXTBSY,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOTCONN,  # a FUSE file system whose server has gone
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
    errno.EOPNOTSUPP,
}


class Exit(Exception):
    """An end that the user can act on: one clear line and an exit code, no traceback."""

    code = 1


class UsageError(Exit):
    """Usage or configuration, or a checkpoint path that does not exist."""

    code = 2


class DeviceError(Exit):
    """No such device."""

    code = 3


class DataError(Exit):
    """Data that is missing or bad."""

    code = 4


class CheckpointError(Exit):
    """A checkpoint or Hugging Face folder with unreadable or wrong content."""

    code = 5


class NumericsError(Exit):
    """A non-finite loss, gradient or weight."""

    code = 6


class MemoryExhausted(Exit):
    """The device has no memory left."""

    code = 7


class ProcessLost(Exit):
    """Another process is missing or gone."""

    code = 8


class Stopped(BaseException):
    """Stopped by a signal. Not an Exception, so that no library's `except Exception` swallows it."""

    code = STOPPED


class Stop:
    """SIGTERM, SIGINT and SIGHUP as a flag that the training loop reads; raised only where that is harmless.

    One signal ends the run at the next safe point with exit 75, a second one at once. Ctrl-C in a terminal may come
    twice, from the terminal and from the script that started the command: within a second it is one signal. SIGHUP, a
    terminal that has gone, never counts as a second one; where it is ignored, as under nohup, it stays ignored.
    """

    def __init__(self):
        self.requested = None  # the signal's name
        self._interruptible = False
        self._starting = False
        self._since = math.inf

    def install(self):
        """Takes over the signals. Until `started` is called a signal ends the process at once."""
        self._starting = True
        sys.unraisablehook = _quiet_if_stopped
        console.guard()
        for number in signals():
            signal.signal(number, self._handle)

    def started(self):
        """Imports are done: from here on there may be something to save."""
        self._starting = False

    def reached(self, step):
        """Whether to stop behind `step`, which the devices are working on."""
        del step
        return bool(self.requested)

    def check(self):
        """Raises Stopped if a signal has come."""
        if self.requested:
            raise Stopped(f'stopped by {self.requested}')

    @contextlib.contextmanager
    def may_interrupt(self):
        """Inside, a signal raises Stopped at once: for start-up and compilation, where nothing is to be saved."""
        self.check()
        with self.interruptible():
            yield
        self.check()  # a raise inside a callback may have been swallowed

    @contextlib.contextmanager
    def interruptible(self):
        """Inside, a signal raises Stopped at once; one that came before waits for the next `reached` or `check`."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    @contextlib.contextmanager
    def wait(self):
        """Inside, also within `may_interrupt`, a signal waits: for what must not be cut short, such as a restore."""
        before, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = before
        self.check()

    def _handle(self, number, frame):
        del frame
        again = False
        if number != signal.SIGHUP:
            again = time.monotonic() > self._since + 1
            self._since = min(self._since, time.monotonic())
        self.requested = signal.Signals(number).name
        if again or self._starting:
            with contextlib.suppress(OSError):
                os.write(2, f'{stopped_line(f"stopped by {self.requested}")}\n'.encode())
            os._exit(STOPPED)
        if self._interruptible:
            self._interruptible = False  # a second raise, while the first one unwinds, would meet locks half released
            self.check()


def signals():
    """The signals that stop a run: SIGTERM, SIGINT and, unless it is ignored, SIGHUP."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


def _quiet_if_stopped(unraisable, default=sys.unraisablehook):
    """A Stopped that a garbage collector's callback swallowed is raised again by `check`; Python need not print it."""
    if not isinstance(unraisable.exc_value, Stopped):
        default(unraisable)


def stopped_line(reason):
    """What a stopped command says last."""
    return f'mixln_jax: {reason}; run the same command again to continue'


stop = Stop()


def parse(parser, argv, known=False):
    """The options that argparse finds; UsageError in one line where it would print its usage. --help exits with 0.

    With `known` a pair: the options that the parser knows, and the other words.
    """
    parser.exit_on_error = False
    parser.register('type', int, integer)  # what `type=int` and `type=float` read
    parser.register('type', float, finite)

    def error(message):
        raise UsageError(f'{message} (--help lists the options)')

    parser.error = error
    if empty := next((word for word in argv if re.fullmatch(r'--[\w-]+=--', word)), None):
        error(f'{empty}: -- is no value')  # some Pythons' argparse makes an empty list of it
    try:
        return parser.parse_known_args(argv) if known else parser.parse_args(argv)
    except argparse.ArgumentError as problem:
        error(str(problem))


def integer(text: str) -> int:
    """The integer of a text such as 1000, 1_000 or 1e3. Raises ValueError for any other text."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


def finite(text: str) -> float:
    """The number of a text. Raises ValueError for one that is none, or not finite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text} is not finite')
    return value


def listed(text: str) -> list[str]:
    """The parts of a list such as 'a,b' or 'a, b', without blanks."""
    return [part.strip() for part in text.split(',') if part.strip()]


def digits(text: str) -> int | None:
    """The number of a text of up to 18 decimal digits, more than anything here has; None for any other text."""
    return int(text) if re.fullmatch(r'[0-9]{1,18}', text) else None


def end_with_parent():
    """Lets a worker process end when the process that started it does; one that was killed tells nobody."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def end_if_imported():
    """Ends, without a word, a worker process that is only there to import its parent's script.

    A script whose job is not under `if __name__ == '__main__':` would begin it once more in each worker. Who waits for
    the worker says so.
    """
    if getattr(multiprocessing.current_process(), '_inheriting', False):  # as multiprocessing itself finds out
        os._exit(UNGUARDED)


def call(job, *args, show_traceback=False):
    """Runs `job(*args)`, prints the one line that an error deserves and returns the exit code.

    With `show_traceback` Python's own report of where it comes from stands before it.
    """
    console.guard()
    if not show_traceback:
        _quiet_libraries()
    try:
        job(*args)
    except Stopped as stopped:
        console.say(stopped_line(stopped), file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        console.say('mixln_jax: stopped by SIGINT', file=sys.stderr)
        return STOPPED
    except Exception as error:
        if show_traceback:
            console.say(''.join(traceback.format_exception(error)).rstrip(), file=sys.stderr)
        error = known(error)
        console.say(f'mixln_jax: {one_line(error)}', file=sys.stderr)
        return error.code
    return 0


def _quiet_libraries():
    """Keeps off the terminal what libraries report of errors that end as one line here, or that are none, such as event
    loops that are closed while something still waits."""
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    if 'absl.logging' in sys.modules:
        sys.modules['absl.logging'].set_verbosity('fatal')
    sys.unraisablehook = lambda unraisable: None
    threading.excepthook = _say_of_thread


def _say_of_thread(ended):
    """One line of an exception that ended a thread of a library; the job may still be right without it."""
    if ended.exc_type is not SystemExit:
        error = ended.exc_value or ended.exc_type()
        where = ended.thread.name if ended.thread else 'a thread'
        console.say(f'mixln_jax: warning: {where}: {type(error).__name__}: {first_line(error)}', file=sys.stderr)


@contextlib.contextmanager
def reading(path: object, kind: type[Exit], problem: str = 'cannot be read'):
    """Inside, a file that a user gave is read: whatever a reader raises becomes one line that names the file.

    Raises `kind`, '{path}: {problem}: {why}', from whatever is not an Exit already: also from libraries' own
    BaseExceptions, such as the panics of those in Rust, but for those that end a process or a generator.
    """
    try:
        yield
    except (Exit, Stopped, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise kind(f'{path}: {problem}: {why(error)}') from error


def why(error: BaseException) -> str:
    """What a reader's exception says of a file, for people."""
    if isinstance(error, RecursionError):
        return 'nested too deeply'
    if isinstance(error, MemoryError):
        return f'more than fits into memory ({first_line(error)})'
    if isinstance(error, (OSError, ValueError)):
        return getattr(error, 'strerror', None) or first_line(error)
    return f'of another form ({type(error).__name__}: {first_line(error)})'


def known(error):
    """The Exit that an exception stands for; a defect of ours becomes exit 1."""
    if isinstance(error, Exit):
        return error
    text = first_line(error)
    if re.search('No space left on device|File too large|Disk quota exceeded', str(error)):
        return UsageError(f'the disk is full: {text}')
    if isinstance(error, MemoryError) or re.search(
        'RESOURCE_EXHAUSTED|[Oo]ut of memory|Cannot allocate memory', str(error)
    ):
        advice = 'lower batch_size, raise accumulate or set model.remat=full'
        return MemoryExhausted(f'out of memory: {advice} ({text})')
    if isinstance(error, OSError) and (error.errno in UNUSABLE or error.filename is not None):
        return UsageError(text)
    return Exit(f'internal error: {type(error).__name__}: {error} (--traceback shows where)')


def first_line(error):
    """The first line of an error's text, its type where it has none, or cannot say it."""
    try:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    except Exception:
        return type(error).__name__


def one_line(error: BaseException) -> str:
    """An error's text as one line, cut after 600 letters."""
    words = ' '.join(str(error).split())
    return words if len(words) <= 600 else f'{words[:600]} ...'

"""Signals that stop a run.

Imports nothing heavy, so that a command can answer a signal while it still imports JAX.
"""

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from mixln_jax.system import console
from mixln_jax.system.errors import STOPPED, Stopped

UNGUARDED = 1  # exit code of a worker that would run its parent's script, the whole job, once more


class Stop:
    """SIGTERM, SIGINT and SIGHUP as a flag that the training loop reads; raised only where that is harmless.

    The first signal ends the run at the next safe point with exit code 75, a second one at once. Ctrl-C in a terminal
    may arrive twice, from the terminal and from the script that started the command: within a second it counts once.
    SIGHUP (the terminal was closed) never counts as a second signal. Where it is ignored, as under nohup, it stays
    ignored.
    """

    def __init__(self) -> None:
        self.requested: str | None = None  # name of the signal
        self._interruptible = False
        self._starting = False
        self._first_time = math.inf

    def install(self) -> None:
        """Takes over the signals. Until `started` is called a signal ends the process at once."""
        self._starting = True
        sys.unraisablehook = _quiet_if_stopped
        console.guard()
        for number in signals():
            signal.signal(number, self._handle)

    def started(self) -> None:
        """Declares that all imports are done: from now on a run may have something to save."""
        self._starting = False

    def reached(self, step: int) -> bool:
        """Returns whether to stop after `step`, which the devices are computing."""
        del step
        return bool(self.requested)

    def check(self) -> None:
        """Raises Stopped if a signal has arrived."""
        if self.requested:
            raise Stopped(f'stopped by {self.requested}')

    @contextlib.contextmanager
    def may_interrupt(self) -> Iterator[None]:
        """Lets a signal raise Stopped at once inside the block: for start-up and compilation, which have nothing to
        save."""
        self.check()
        with self.interruptible():
            yield
        self.check()  # a raise inside a callback may have been swallowed

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets a signal raise Stopped at once inside the block; an earlier one waits for `reached` or `check`."""
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False

    @contextlib.contextmanager
    def wait(self) -> Iterator[None]:
        """Defers signals to the end of the block, also within `may_interrupt`: for a restore, which must not be cut
        short."""
        before, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = before
        self.check()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        again = False
        if number != signal.SIGHUP:
            again = time.monotonic() > self._first_time + 1
            self._first_time = min(self._first_time, time.monotonic())
        self.requested = signal.Signals(number).name
        if again or self._starting:
            with contextlib.suppress(OSError):
                os.write(2, f'{stopped_line(f"stopped by {self.requested}")}\n'.encode())
            os._exit(STOPPED)
        if self._interruptible:
            self._interruptible = False  # a second raise while the first one unwinds would find locks half released
            self.check()


def signals() -> list[signal.Signals]:
    """Returns the signals that stop a run: SIGTERM, SIGINT and, unless it is ignored, SIGHUP."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if ignored else [signal.SIGHUP])]


def from_signal(error: BaseException) -> bool:
    """Returns whether a signal has raised an error, and not the user's code in which it was raised."""
    # If SIGINT has another handler than Python's, the code itself has raised the KeyboardInterrupt.
    default_handler = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, Stopped) or (isinstance(error, KeyboardInterrupt) and default_handler)


def _quiet_if_stopped(
    unraisable: 'sys.UnraisableHookArgs',
    default: 'Callable[[sys.UnraisableHookArgs], object]' = sys.unraisablehook,
) -> None:
    """Hides a Stopped that was raised in a garbage collector's callback and is lost there; `check` raises it again."""
    if not isinstance(unraisable.exc_value, Stopped):
        default(unraisable)


def stopped_line(reason: object) -> str:
    """Returns the last line of a command that was stopped."""
    return f'mixln_jax: {reason}; run the same command again to continue'


stop = Stop()


def end_with_parent() -> None:
    """Makes a worker process end together with the process that started it, also if that one is killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError('this process is not a worker of multiprocessing')

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def end_if_imported() -> None:
    """Ends, without a message, a worker process that is importing its parent's script.

    A script whose job is not under `if __name__ == '__main__':` would run the job again in each worker. The process
    that waits for the worker explains it.
    """
    if getattr(multiprocessing.current_process(), '_inheriting', False):  # multiprocessing's own test
        os._exit(UNGUARDED)

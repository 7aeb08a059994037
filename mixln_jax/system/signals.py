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

from mixln_jax.system import console
from mixln_jax.system.errors import STOPPED, Stopped

UNGUARDED = 1  # how a worker ends that runs its parent's script, the whole job, once more


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

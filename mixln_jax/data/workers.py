"""Worker processes: how they start, and one-line errors that explain why one has ended."""

import contextlib
import errno
import os
import re
import select
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker, util
from typing import Any

from mixln_jax.system import signals
from mixln_jax.system.errors import Exit, MemoryExhausted, UsageError

SHARED = '/dev/shm'
NO_SEMAPHORES = errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOSYS
GUARD = (
    'a worker process ended before its work began: it imports the script again, so the script must start its job under '
    "`if __name__ == '__main__':` (a script that is read from standard input cannot have workers)"
)


def start_tracker() -> None:
    """Starts multiprocessing's resource tracker, the process that frees shared memory which others have left.

    It must survive a SIGHUP, which the run handles, and must not report what a killed worker has left: the run reports
    it.
    """
    quiet, before = 'ignore:resource_tracker', signal.pthread_sigmask(signal.SIG_BLOCK, signals.signals())
    sys.warnoptions.append(quiet)  # inherited by the processes that Python starts
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Inside this context, starting a worker ends even if the worker dies before it has read all of its data.

    multiprocessing alone would then write for ever, because it keeps the worker's end of the pipe open too.
    """
    spawn = util.spawnv_passfds

    def spawn_and_watch(path: Any, args: Any, passfds: Any) -> int:
        pid = spawn(path, args, passfds)
        pipe = re.search(r'pipe_handle=(\d+)', ' '.join(map(os.fsdecode, args)))
        if pipe and hasattr(os, 'waitid'):  # not on macOS
            threading.Thread(target=_drain, args=(pid, os.dup(int(pipe[1]))), daemon=True).start()
        return pid

    util.spawnv_passfds = spawn_and_watch
    try:
        yield
    finally:
        util.spawnv_passfds = spawn


def _drain(pid: int, pipe: int) -> None:
    """Waits until a process ends, then reads what is left in its pipe."""
    with contextlib.suppress(ChildProcessError):  # multiprocessing was faster
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    while select.select([pipe], [], [], 1)[0] and os.read(pipe, 2**16):
        pass
    os.close(pipe)


def explained(error: Exception, settings: tuple[str, str], begun: bool) -> Exception:
    """Returns an error that explains why workers cannot start or have ended; `error` itself if it has another cause.

    Args:
        error: raised while workers were started, or while their results were read.
        settings: the setting that determines the number of workers, and the one without workers; for the message.
        begun: whether workers have done part of their work.
    """
    code = re.search(r'terminated unexpectedly with exit code (-?\d+)', str(error))  # grain's words
    if code:
        return ended(int(code[1]), settings, begun)
    if (
        isinstance(error, OSError)
        and error.errno in ((errno.ENOSPC,) if begun else NO_SEMAPHORES)
        and (not error.filename or str(error.filename).startswith('/psm'))  # as Python names shared memory
    ):
        return _no_shared_memory(error.strerror, settings)
    return error


def ended(code: int, settings: tuple[str, str], begun: bool) -> Exit:
    """Returns an error that explains the end of a worker.

    Args:
        code: the exit code of the worker, as multiprocessing reports it.
        settings: as in `explained`.
        begun: as in `explained`.
    """
    if code >= 0:
        return Exit(f'a worker process has ended with exit code {code}') if begun else UsageError(GUARD)
    if -code == signal.SIGBUS:
        return _no_shared_memory('SIGBUS', settings)
    if -code == signal.SIGKILL:
        return MemoryExhausted(
            f'a worker process was killed (SIGKILL), most often because memory ran out: lower {settings[0]}'
        )
    return Exit(f'a worker process was ended by signal {-code} ({signal.strsignal(-code)})')


def _no_shared_memory(reason: str | None, settings: tuple[str, str]) -> UsageError:
    """Returns the error for a lack of shared memory, in which workers keep their batches and locks."""
    with contextlib.suppress(OSError):
        reason = f'{shutil.disk_usage(SHARED).total / 1e6:,.1f} MB: {reason}'
    return UsageError(
        f'worker processes get no shared memory in {SHARED} ({reason}): give {settings[1]}, or make {SHARED} larger '
        '(docker run --shm-size=2g)'
    )

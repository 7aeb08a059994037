"""Worker processes: how they start, and what has gone wrong where one has ended, in one line."""

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

from mixln_jax.system import signals
from mixln_jax.system.errors import Exit, MemoryExhausted, UsageError

SHARED = '/dev/shm'
NO_SEMAPHORES = errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOSYS
GUARD = (
    'a worker process ended before its work began: it runs the script once more, so the script must have its job under '
    "`if __name__ == '__main__':` (one that is read from standard input cannot have workers)"
)


def start_tracker():
    """Starts multiprocessing's process that frees what others have left in shared memory.

    It must not end by a SIGHUP, which the run answers, nor tell of what a killed worker has left: the run does.
    """
    quiet, before = 'ignore:resource_tracker', signal.pthread_sigmask(signal.SIG_BLOCK, signals.signals())
    sys.warnoptions.append(quiet)  # which processes that Python starts inherit
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Inside, starting a worker ends also where the worker dies before it has read all of its data.

    multiprocessing by itself would then write for ever: it keeps the worker's end of the pipe open too.
    """
    spawn = util.spawnv_passfds

    def spawn_and_watch(path, args, files):
        pid = spawn(path, args, files)
        pipe = re.search(r'pipe_handle=(\d+)', ' '.join(map(os.fsdecode, args)))
        if pipe and hasattr(os, 'waitid'):  # not on macOS
            threading.Thread(target=_drain, args=(pid, os.dup(int(pipe[1]))), daemon=True).start()
        return pid

    util.spawnv_passfds = spawn_and_watch
    try:
        yield
    finally:
        util.spawnv_passfds = spawn


def _drain(pid, pipe):
    """Reads what a process has left in its pipe when it ends."""
    with contextlib.suppress(ChildProcessError):  # multiprocessing was faster
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    while select.select([pipe], [], [], 1)[0] and os.read(pipe, 2**16):
        pass
    os.close(pipe)


def explained(error: Exception, settings: tuple[str, str], begun: bool) -> Exception:
    """What an error in starting workers or hearing from them stands for; the error itself where it is another one.

    Args:
        error: what was raised.
        settings: what says how many workers there are, and how to have none.
        begun: whether workers have done some of their work.
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
    """What the exit code of a worker, as multiprocessing gives it, stands for; `explained` has the other arguments."""
    if code >= 0:
        return Exit(f'a worker process has ended with exit code {code}') if begun else UsageError(GUARD)
    if -code == signal.SIGBUS:
        return _no_shared_memory('SIGBUS', settings)
    if -code == signal.SIGKILL:
        return MemoryExhausted(
            f'a worker process was killed (SIGKILL), most often for lack of memory: lower {settings[0]}'
        )
    return Exit(f'a worker process was ended by signal {-code} ({signal.strsignal(-code)})')


def _no_shared_memory(reason, settings):
    """Workers hand batches over in shared memory, and their locks are there."""
    with contextlib.suppress(OSError):
        reason = f'{shutil.disk_usage(SHARED).total / 1e6:,.1f} MB: {reason}'
    return UsageError(
        f'worker processes find no room in {SHARED} ({reason}): give {settings[1]}, or make {SHARED} larger '
        '(docker run --shm-size=2g)'
    )

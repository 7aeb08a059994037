"""Limits of what somebody else's code may take."""

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Iterator


class TooLong(Exception):
    """The code has taken more time than it may."""


@contextlib.contextmanager
def limited(seconds: float, num_bytes: int) -> Iterator[None]:
    """Limits the processor time and the memory that a block may take.

    Both are those of the whole process: the memory is what comes on top of the address space that it has, which macOS
    does not enforce. They hold in the main thread alone, where Python handles signals: another thread could not tell
    which limit it has to restore.

    Raises TooLong; MemoryError.
    """

    def expire(number: int, frame: object) -> None:
        del number, frame
        expired.append(True)
        raise TooLong

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    expired = list[bool]()

    with contextlib.ExitStack() as undo:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = _address_space() + num_bytes
        if soft == resource.RLIM_INFINITY or wanted < soft:
            undo.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
            resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
        undo.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, expire))
        undo.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            yield
        except Exception:
            if expired:  # the code may have made another exception of it
                raise TooLong from None
            raise


def _address_space() -> int:
    """Returns the bytes of address space that this process has; 2^46 where the system does not tell."""
    try:
        with open('/proc/self/statm', encoding='ascii') as file:
            return int(file.read().split()[0]) * os.sysconf('SC_PAGE_SIZE')
    except OSError:
        return 2**46

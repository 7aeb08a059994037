"""How a process ends: one clear line and an exit code for whatever a user can act on."""

import contextlib
import difflib
import errno
import re
from collections.abc import Iterable, Iterator

STOPPED = 75
# Errors of the system that mean that a path which the user gave cannot be used.
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
    errno.ENOTCONN,  # a FUSE file system whose server has ended
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
    errno.EOPNOTSUPP,
}


class Exit(Exception):
    """An error that the user can act on: one clear line and an exit code, no traceback."""

    code = 1


class UsageError(Exit):
    """Wrong usage or configuration, or a path that cannot be used."""

    code = 2


class DeviceError(Exit):
    """No such device."""

    code = 3


class DataError(Exit):
    """Data or a tokenizer is missing or invalid."""

    code = 4


class CheckpointError(Exit):
    """The content of a checkpoint or Hugging Face folder is unreadable or wrong."""

    code = 5


class NumericsError(Exit):
    """A loss, gradient or weight is not finite, or the network has collapsed."""

    code = 6


class MemoryExhausted(Exit):
    """The memory of the device or the machine is exhausted."""

    code = 7


class ProcessLost(Exit):
    """Another process is missing or has been lost."""

    code = 8


class Stopped(BaseException):
    """A signal has stopped the command. Not an Exception, so that no `except Exception` of a library swallows it."""

    code = STOPPED


@contextlib.contextmanager
def reading(path: object, kind: type[Exit], problem: str = 'cannot be read') -> Iterator[None]:
    """Turns whatever is raised while a user's file is read into one line that names the file.

    Raises `kind`, '{path}: {problem}: {reason}', in place of any exception but an Exit and those that end a process or
    a generator. Libraries in Rust raise their panics as BaseExceptions, so these are replaced, too.
    """
    try:
        yield
    except (Exit, Stopped, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise kind(f'{path}: {problem}: {reason(error)}') from error


def reason(error: BaseException) -> str:
    """Returns, in words for people, why a file could not be read."""
    if isinstance(error, RecursionError):
        return 'nested too deeply'
    if isinstance(error, MemoryError):
        return f'more than fits into memory ({first_line(error)})'
    if isinstance(error, (OSError, ValueError)):
        return getattr(error, 'strerror', None) or first_line(error)
    return f'of another format ({type(error).__name__}: {first_line(error)})'


def to_exit(error: Exception | SystemExit) -> Exit:
    """Returns the Exit that an exception amounts to; an unexpected one becomes an internal error, exit code 1."""
    if isinstance(error, Exit):
        return error
    text = first_line(error)
    if isinstance(error, SystemExit):
        return UsageError(f'code that the command calls wants to end it: SystemExit: {text} (--traceback shows where)')
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


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text, or the name of its type if the text is empty or raises."""
    try:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    except Exception:
        return type(error).__name__


def one_line(error: BaseException) -> str:
    """Returns an error's text as one line of at most 600 characters."""
    words = ' '.join(str(error).split())
    return words if len(words) <= 600 else f'{words[:600]} ...'


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns ', did you mean ...?' with the most similar of `names`, or '' if none is similar."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f', did you mean {close[0]}?' if close else ''

"""How a process ends: one clear line and an exit code for whatever a user can act on."""

import contextlib
import difflib
import errno
import re

STOPPED = 75
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


def nearest(name, names):
    """', did you mean ...?' with the nearest of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f', did you mean {close[0]}?' if close else ''

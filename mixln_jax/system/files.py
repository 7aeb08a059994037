"""Paths and files that users give."""

import contextlib
import json
import os
import pathlib
import re
import stat
import sys
import tempfile

from mixln_jax.system.errors import Exit, UsageError, reading, reason

LARGEST = 2**28  # bytes of a file that is read as a whole


def regular(path: str | os.PathLike, kind: type[Exit]) -> os.stat_result:
    """Returns the status of a regular file. Anything else is refused, for a pipe or a device may have no end.

    Raises FileNotFoundError, and `kind` for whatever else cannot be read.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL
        raise kind(f'{path}: cannot be read: {reason(error)}') from error
    if not stat.S_ISREG(status.st_mode):
        other = next(name for name, matches in _OTHERS if matches(status.st_mode))
        raise kind(f'{path}: cannot be read: it is {other}, not a file')
    return status


_OTHERS = (
    ('a folder', stat.S_ISDIR),
    ('a pipe', stat.S_ISFIFO),
    ('a socket', stat.S_ISSOCK),
    ('a device', lambda mode: True),
)


def read(path: str | os.PathLike, kind: type[Exit], largest: int = LARGEST) -> bytes:
    """Returns the content of a file.

    Raises FileNotFoundError, and `kind` for what is not a readable file or has more than `largest` bytes.
    """
    regular(path, kind)
    with reading(path, kind), open(path, 'rb') as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise kind(f'{path}: cannot be read: more than {largest:,} bytes, too much for such a file')
    return content


def read_json(path: str | os.PathLike, kind: type[Exit], problem: str = 'not readable JSON') -> dict:
    """Returns the object in a JSON file. Raises as `read`, and `kind` if the content is not a JSON object."""
    content = read(path, kind)
    with reading(path, kind, problem):
        value = json.loads(content)
    if not isinstance(value, dict):
        raise kind(f'{path}: {problem}: not a JSON object')
    return value


# Characters that the libraries which write arrays misread: as separators, patterns of names, or buckets.
REWRITTEN = re.compile(r'\\|\*|\?|\[[^/]*\]|(?:gs|s3|az|hf):(?=/)|^/(?:gs|s3|az|hf)/')


def local(path: str | os.PathLike, option: str) -> pathlib.Path:
    """Returns a path on this machine, with ~ expanded.

    Args:
        path: what the user gave.
        option: the option or key that gave it, for messages; empty if the caller adds it.

    Raises:
        UsageError: the path is empty, an address such as gs://..., or starts with ~ where there is no home directory;
            or its bytes are not UTF-8, which the libraries that write arrays use for paths.
    """
    text = os.fspath(path)
    shown = f'{option} {text}'.strip()
    if not text:
        raise UsageError(f'{option or "a path"} is empty')
    if '\0' in text:
        raise UsageError(f'{option} {text!r}: a path cannot contain a NUL'.strip())
    if re.match(r'[A-Za-z][A-Za-z0-9+.-]*://', text):
        raise UsageError(
            f'{shown}: a path on this machine is needed, not an address; mount the bucket, or copy the files'
        )
    try:
        spelled_alike = os.fsencode(text) == text.encode()
    except UnicodeEncodeError:
        spelled_alike = False
    if not spelled_alike and sys.getfilesystemencoding() == 'utf-8':
        raise UsageError(f'{shown!a}: the path contains bytes that are not UTF-8 (\\udc..); rename it')
    if not spelled_alike:
        raise UsageError(f'{shown}: this locale cannot write the path in UTF-8; set LC_ALL=C.UTF-8 or PYTHONUTF8=1')
    try:
        return pathlib.Path(re.sub('^//+', '/', text)).expanduser()
    except RuntimeError:
        raise UsageError(f'{shown}: this user has no home directory; give the full path') from None


def for_arrays(path: str | os.PathLike, option: str) -> pathlib.Path:
    """Returns the absolute path of a folder that is to hold arrays.

    Raises UsageError as `local`, and for characters, which it names, that the libraries which write arrays misread.
    """
    path = local(local(path, option).absolute(), option)
    if misread := dict.fromkeys(REWRITTEN.findall(str(path))):
        raise UsageError(
            f'{option or path}: checkpoints cannot be kept in a path with {" ".join(misread)} '
            f'({path}): the library that writes arrays misreads it; rename the folder or use another'
        )
    return path


def cache_folder() -> pathlib.Path:
    """Returns the folder for files that can be made or downloaded again.

    This is $XDG_CACHE_HOME/mixln_jax, else ~/.cache/mixln_jax; without a home directory a folder of this user's among
    the temporary files.
    """
    try:
        return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'mixln_jax'
    except RuntimeError:
        folder = pathlib.Path(tempfile.gettempdir(), f'mixln_jax-{os.getuid()}')
        with contextlib.suppress(OSError):
            folder.mkdir(0o700)
        if folder.lstat().st_uid != os.getuid():  # it is another user's, who could put anything into it
            folder = pathlib.Path(tempfile.mkdtemp(prefix='mixln_jax-'))
        return folder

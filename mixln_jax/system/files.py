"""Paths and files that users give."""

import contextlib
import json
import os
import pathlib
import re
import stat
import sys
import tempfile

from mixln_jax.system.errors import Exit, UsageError, reading, why

LARGEST = 2**28  # bytes of a file that is read whole


def regular(path: str | os.PathLike, kind: type[Exit]) -> os.stat_result:
    """What the system says of a file, after a check that it is one: a pipe or a device may have no end.

    Raises FileNotFoundError; `kind` for what else cannot be read.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in it
        raise kind(f'{path}: cannot be read: {why(error)}') from error
    if not stat.S_ISREG(found.st_mode):
        what = next(name for name, is_one in _OTHERS if is_one(found.st_mode))
        raise kind(f'{path}: cannot be read: it is {what}, not a file')
    return found


_OTHERS = (
    ('a folder', stat.S_ISDIR),
    ('a pipe', stat.S_ISFIFO),
    ('a socket', stat.S_ISSOCK),
    ('a device', lambda mode: True),
)


def read(path: str | os.PathLike, kind: type[Exit], largest: int = LARGEST) -> bytes:
    """The content of a file. Raises FileNotFoundError; `kind`, as `regular`, also for more than `largest` bytes."""
    regular(path, kind)
    with reading(path, kind), open(path, 'rb') as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise kind(f'{path}: cannot be read: more than {largest:,} bytes, too much for such a file')
    return content


def read_json(path: str | os.PathLike, kind: type[Exit], problem: str = 'not readable JSON') -> dict:
    """The object in a JSON file. Raises FileNotFoundError; `kind`, as `read`, also for what is no JSON object."""
    content = read(path, kind)
    with reading(path, kind, problem):
        found = json.loads(content)
    if not isinstance(found, dict):
        raise kind(f'{path}: {problem}: not a JSON object')
    return found


# What the libraries that write arrays take for something else: another separator, patterns of names, buckets.
REWRITTEN = re.compile(r'\\|\*|\?|\[[^/]*\]|(?:gs|s3|az|hf):(?=/)|^/(?:gs|s3|az|hf)/')


def local(path: str | os.PathLike, what: str) -> pathlib.Path:
    """A path of this machine, ~ expanded.

    Raises UsageError for an empty one, for an address such as gs://..., where there is no home, and for what is not
    UTF-8, in which the libraries that write arrays spell it.

    `what`: the option or key, for the error; empty where the caller names it.
    """
    text = os.fspath(path)
    shown = f'{what} {text}'.strip()
    if not text:
        raise UsageError(f'{what or "a path"} is empty')
    if '\0' in text:
        raise UsageError(f'{what} {text!r}: no path has a NUL in it'.strip())
    if re.match(r'[A-Za-z][A-Za-z0-9+.-]*://', text):
        raise UsageError(
            f'{shown}: a path of this machine is needed, not an address; mount the bucket, or copy the files'
        )
    try:
        spelled_alike = os.fsencode(text) == text.encode()
    except UnicodeEncodeError:
        spelled_alike = False
    if not spelled_alike and sys.getfilesystemencoding() == 'utf-8':
        raise UsageError(f'{shown!a}: bytes of the path that are not UTF-8 (\\udc..) cannot be used; rename it')
    if not spelled_alike:
        raise UsageError(f'{shown}: this locale cannot spell the path in UTF-8; set LC_ALL=C.UTF-8 or PYTHONUTF8=1')
    try:
        return pathlib.Path(re.sub('^//+', '/', text)).expanduser()
    except RuntimeError:
        raise UsageError(f'{shown}: this user has no home directory; give the whole path') from None


def for_arrays(path: str | os.PathLike, what: str) -> pathlib.Path:
    """As `local`, whole: where arrays are kept. Raises UsageError, naming them, for characters that would make the
    libraries look elsewhere."""
    path = local(local(path, what).absolute(), what)
    if found := dict.fromkeys(REWRITTEN.findall(str(path))):
        raise UsageError(
            f'{what or path}: checkpoints cannot be kept in a path with {" ".join(found)} '
            f'({path}): the library that writes arrays takes it for something else; rename the folder or take another'
        )
    return path


def cache():
    """Folder of what may be made or fetched again: $XDG_CACHE_HOME/mixln_jax, else ~/.cache/mixln_jax; without a home
    a folder of this user's where temporary files are."""
    try:
        return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'mixln_jax'
    except RuntimeError:
        folder = pathlib.Path(tempfile.gettempdir(), f'mixln_jax-{os.getuid()}')
        with contextlib.suppress(OSError):
            folder.mkdir(0o700)
        if folder.lstat().st_uid != os.getuid():  # another user's, who could put anything there
            folder = pathlib.Path(tempfile.mkdtemp(prefix='mixln_jax-'))
        return folder

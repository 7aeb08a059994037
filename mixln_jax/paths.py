"""Paths that users give."""

import os
import pathlib
import re
import sys

from mixln_jax.exits import UsageError

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

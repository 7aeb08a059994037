"""Paths that users give."""

import os
import pathlib
import re

from mixln_jax.exits import UsageError


def local(path: str | os.PathLike, what: str) -> pathlib.Path:
    """A path of this machine, ~ expanded.

    Raises UsageError for an address such as gs://..., where there is no home, and for letters that this locale spells
    otherwise than the libraries that write arrays, in UTF-8.

    `what`: the option or key, for the error; empty where the caller names it.
    """
    text = os.fspath(path)
    shown = f'{what} {text}'.strip()
    if re.match(r'[A-Za-z][A-Za-z0-9+.-]*://', text):
        raise UsageError(
            f'{shown}: a path of this machine is needed, not an address; mount the bucket, or copy the files'
        )
    try:
        spelled_alike = os.fsencode(text) == text.encode()
    except UnicodeEncodeError:
        spelled_alike = False
    if not spelled_alike:
        raise UsageError(f'{shown}: this locale cannot spell the path in UTF-8; set LC_ALL=C.UTF-8 or PYTHONUTF8=1')
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f'{shown}: this user has no home directory; give the whole path') from None

"""Paths that users give."""

import os
import pathlib
import re

from mixln_jax.exits import UsageError


def local(path: str | os.PathLike, what: str) -> pathlib.Path:
    """A path of this machine, ~ expanded. UsageError for an address such as gs://..., or where there is no home.

    `what`: the option or key, for the error; empty where the caller names it.
    """
    text = os.fspath(path)
    shown = f'{what} {text}'.strip()
    if re.match(r'[A-Za-z][A-Za-z0-9+.-]*://', text):
        raise UsageError(
            f'{shown}: a path of this machine is needed, not an address; mount the bucket, or copy the files'
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f'{shown}: this user has no home directory; give the whole path') from None

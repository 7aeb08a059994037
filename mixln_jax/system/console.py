"""Output for people. No output stream may end a run: not a closed terminal, a full disk, or an encoding that lacks a
character."""

import codecs
import contextlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

PLAIN = 'mixln_jax.plain'  # name of the error handler that replaces what an encoding lacks


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Replaces characters that an encoding lacks: block characters of bars by #, all others by escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = ['#' if '▀' <= letter <= '▟' else letter.encode('ascii', 'backslashreplace').decode() for letter in letters]
    return ''.join(plain), error.end


codecs.register_error(PLAIN, _plain)


class _Unfailing(io.FileIO):
    """A file whose writes never raise. What the system does not accept is dropped."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None  # also FileIO's own answer where a write would block
        return len(data) if written is None else written


def guard() -> None:
    """Replaces Python's standard output and error by streams that never raise.

    Standard files that are closed are opened as /dev/null. Otherwise the next file that is opened, such as
    metrics.jsonl, would get the number of standard output or error.
    """
    guard_files()
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        old = getattr(sys, name)
        if type(old) is not io.TextIOWrapper:  # replaced by a notebook or a test
            continue
        raw = getattr(old.buffer, 'raw', old.buffer)
        if type(raw) is io.FileIO and raw.fileno() == number:
            with contextlib.suppress(OSError):
                old.flush()
            _set_stream(number, name, old.encoding, old.line_buffering, old.write_through)


def guard_files() -> None:
    """Opens closed standard files as /dev/null, as `guard` does, and leaves open streams alone."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        if getattr(sys, name) is None:  # it was closed when Python started
            _set_stream(number, name, 'utf-8')


def _set_stream(
    number: int, name: str, encoding: str, line_buffering: bool = False, write_through: bool = False
) -> None:
    raw = _Unfailing(number, 'w', closefd=False)
    stream = io.TextIOWrapper(
        raw if write_through else io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=encoding,
        errors=PLAIN,
        line_buffering=line_buffering,
        write_through=write_through,
    )
    setattr(sys, name, stream)
    setattr(sys, f'__{name}__', stream)


def say(*lines: object, file: TextIO | None = None, end: str = '\n') -> None:
    """Prints lines for a person to `file` (standard output). Never raises because of the stream's state."""
    file, text = file or sys.stdout, '\n'.join(map(str, lines))
    try:
        try:
            print(text, file=file, flush=True, end=end)
        except UnicodeEncodeError:
            print(text.encode(file.encoding, PLAIN).decode(file.encoding), file=file, flush=True, end=end)
    except (OSError, ValueError):  # the reader has gone, the disk is full, or the stream is closed
        with contextlib.suppress(OSError, ValueError):
            _drop(file)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discards standard error inside the block, for one thread at a time.

    For libraries in Rust and C++ that print the errors which they also raise.
    """
    with _QUIET:
        sys.stderr.flush()
        kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(null)


_QUIET = threading.RLock()


def _drop(file: TextIO) -> None:
    """Drops what a stream has buffered: Python would write it again, at exit too, and then exit with 120."""
    number = file.fileno()
    inheritable, kept, null = os.get_inheritable(number), os.dup(number), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, number)
        file.flush()
    finally:
        os.dup2(kept, number, inheritable)
        os.close(kept)
        os.close(null)

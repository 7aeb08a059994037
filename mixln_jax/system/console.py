"""What a process prints for people. No output stream may end a run: not a closed terminal, a full disk, or an encoding
that lacks a letter."""

import codecs
import contextlib
import io
import os
import sys
import threading
from typing import TextIO

PLAIN = 'mixln_jax.plain'  # how to encode what an encoding lacks: bars as #, all other letters escaped


def _plain(error):
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = ['#' if '▀' <= letter <= '▟' else letter.encode('ascii', 'backslashreplace').decode() for letter in letters]
    return ''.join(plain), error.end


codecs.register_error(PLAIN, _plain)


class _Unfailing(io.FileIO):
    """A file whose writes never raise: what it does not take is dropped."""

    def write(self, data):
        try:
            written = super().write(data)
        except OSError:
            written = None  # as where it would have to wait
        return len(data) if written is None else written


def guard():
    """Replaces Python's own standard output and error by streams that never raise; opens what is closed of the three
    standard files as /dev/null, for the next file that is opened, such as metrics.jsonl, would take its place."""
    guard_files()
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        old = getattr(sys, name)
        if type(old) is not io.TextIOWrapper:  # a notebook's, a test's
            continue
        raw = getattr(old.buffer, 'raw', old.buffer)
        if type(raw) is io.FileIO and raw.fileno() == number:
            with contextlib.suppress(OSError):
                old.flush()
            _set_stream(number, name, old.encoding, old.line_buffering, old.write_through)


def guard_files():
    """The part of `guard` that a script's own process can do without noticing."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
    for number, name in ((1, 'stdout'), (2, 'stderr')):
        if getattr(sys, name) is None:  # it was closed when Python started
            _set_stream(number, name, 'utf-8')


def _set_stream(number, name, encoding, line_buffering=False, unbuffered=False):
    raw = _Unfailing(number, 'w', closefd=False)
    stream = io.TextIOWrapper(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding=encoding,
        errors=PLAIN,
        line_buffering=line_buffering,
        write_through=unbuffered,
    )
    setattr(sys, name, stream)
    setattr(sys, f'__{name}__', stream)


def say(*lines: object, file: TextIO | None = None):
    """Prints lines for a person, into any stream, whatever has become of it."""
    file, text = file or sys.stdout, '\n'.join(map(str, lines))
    try:
        try:
            print(text, file=file, flush=True)
        except UnicodeEncodeError:
            print(text.encode(file.encoding, PLAIN).decode(file.encoding), file=file, flush=True)
    except (OSError, ValueError):  # nobody listens any more, no room, closed
        with contextlib.suppress(OSError, ValueError):
            _drop(file)


@contextlib.contextmanager
def quiet():
    """Inside, nothing reaches standard error, one thread at a time: libraries in Rust and C++ write there themselves
    what they raise too."""
    with _QUIET:
        sys.stderr.flush()
        kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nothing, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nothing)


_QUIET = threading.RLock()


def _drop(file):
    """Drops what a stream's file has not taken: Python would try again, at its end too, and end with 120."""
    number = file.fileno()
    inheritable, kept, nothing = os.get_inheritable(number), os.dup(number), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, number)
        file.flush()
    finally:
        os.dup2(kept, number, inheritable)
        os.close(kept)
        os.close(nothing)

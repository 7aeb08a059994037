"""The process of one cell: `python -m mixln_jax.sweeps.child WORDS` is `python -m mixln_jax.main WORDS` that stops,
with everything saved, when its standard input ends: when the worker asks for it, and when the worker has died."""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, which take seconds

# ruff: noqa: E402
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO, Any


def command(words: Sequence[str]) -> list[str]:
    """Returns the command that this module is."""
    return [sys.executable, '-m', 'mixln_jax.sweeps.child', *words]


def start(command: Sequence[str], output: IO[bytes], **options: Any) -> subprocess.Popen:
    """Starts a `command` of this module, which prints into `output`; the end of its standard input stops it.

    `options` are further ones of Popen. Ctrl-C in a terminal reaches the caller alone, which stops the process.
    """
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True, **options
    )


def stop_at_end_of_input() -> None:
    """Waits for the end of standard input, then stops this process as SIGTERM does, unless a signal has done so."""
    while os.read(0, 1):
        pass
    if not stop.requested:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    runpy.run_module('mixln_jax.main', run_name='__main__', alter_sys=True)

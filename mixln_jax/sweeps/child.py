"""The process of one cell: `python -m mixln_jax.sweeps.child WORDS` is `python -m mixln_jax.main WORDS` that stops,
with everything saved, when its standard input ends: when the worker asks for it, and when the worker has died."""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, which take seconds

# ruff: noqa: E402
import os
import runpy
import signal
import threading


def stop_at_end_of_input() -> None:
    """Waits for the end of standard input, then stops this process as SIGTERM does, unless a signal has done so."""
    while os.read(0, 1):
        pass
    if not stop.requested:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    runpy.run_module('mixln_jax.main', run_name='__main__', alter_sys=True)

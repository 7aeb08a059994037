"""`python -m mixln_jax.data.prepare`."""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, which take seconds

# ruff: noqa: E402
import sys

from mixln_jax.data.prepare.command import main

if __name__ == '__main__':
    stop.started()
    sys.exit(main(sys.argv[1:]))

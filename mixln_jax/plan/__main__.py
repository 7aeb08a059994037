"""`python -m mixln_jax.plan`."""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, which take seconds

# ruff: noqa: E402
import sys

from mixln_jax.plan.command import main

if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

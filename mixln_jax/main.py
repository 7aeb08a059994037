"""The main job: `python -m mixln_jax.main --config FILE [--workdir DIR] [--config.KEY=value ...]` trains."""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, which take seconds

# ruff: noqa: E402
import argparse
import sys
from collections.abc import Sequence

import jax
import ml_collections

from mixln_jax import recipes
from mixln_jax.distributed import processes
from mixln_jax.models import placements
from mixln_jax.system import cli, errors
from mixln_jax.system.errors import UsageError
from mixln_jax.training.run import run


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
    """Returns (options, ConfigDict) of the words after the command.

    --help prints the help and exits with 0. Raises UsageError for options or keys that are not valid.
    """
    parser = argparse.ArgumentParser(
        prog='python -m mixln_jax.main',
        usage='%(prog)s --config FILE[:ARG] [--workdir DIR] [--config.KEY=VALUE ...] [--verbose] [--traceback]',
        description='Trains the model of a recipe. If the run was stopped, the same command continues it.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        '-h', '--help', action='store_true', help='show this help; with --config FILE also the values of FILE'
    )
    parser.add_argument('--config', metavar='FILE[:ARG]', help='a recipe, such as configs/quickstart.py')
    parser.add_argument('--workdir', metavar='DIR', help='folder of the run [runs/<name of the recipe>]')
    parser.add_argument('--verbose', action='store_true', help='print a table of the parameters at the start')
    parser.add_argument('--traceback', action='store_true', help='print the traceback of an error')
    options, rest = cli.parse_known(parser, argv)
    config = recipes.load(options.config, recipes.overrides(rest)) if options.config else None
    if options.help:
        shown = "with the Mix-LN paper's C4 recipe as defaults"
        if config:
            shown = f'with the values of {options.config}, * where they are not the defaults'
        choices = {'model.norm_position': [*placements.PLACEMENTS, *placements.SCHEMES]}
        parser.epilog = f'keys of a recipe, {shown}:\n{recipes.help_text(config, choices)}'
        parser.print_help()
        parser.exit()
    if config is None:
        raise UsageError('--config FILE is missing; --help lists the keys')
    if options.workdir is None:
        options.workdir = recipes.default_workdir(options.config)
    return options, config


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""

    def job() -> None:
        options, config = parse(argv)
        run(config, options.workdir, stop, options.verbose)

    return cli.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    stop.started()
    code = main(sys.argv[1:])
    if code == errors.STOPPED or jax.distributed.is_initialized():
        processes.end(code)  # all files are closed; Python's exit may crash if a signal has interrupted the compiler
    sys.exit(code)

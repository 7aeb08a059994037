"""The main job: `python -m mixln_jax.main --config FILE [--workdir DIR] [--config.key=value ...]` trains."""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, which take seconds

# ruff: noqa: E402
import argparse
import pathlib
import sys

import jax

from mixln_jax import recipes
from mixln_jax.distributed import processes
from mixln_jax.models import placements
from mixln_jax.system import cli, errors
from mixln_jax.system.errors import UsageError
from mixln_jax.training.run import run


def parse(argv):
    """(options, ConfigDict) of the words after the command. Raises UsageError; --help prints and exits with 0."""
    parser = argparse.ArgumentParser(
        prog='python -m mixln_jax.main',
        usage='%(prog)s --config FILE[:ARG] [--workdir DIR] [--config.KEY=VALUE ...] [--verbose] [--traceback]',
        description='Trains what a recipe says. The same command again goes on where the run stopped.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument('-h', '--help', action='store_true', help='show this; with --config FILE the values of FILE')
    parser.add_argument('--config', metavar='FILE[:ARG]', help='a recipe, such as configs/quickstart.py')
    parser.add_argument('--workdir', metavar='DIR', help='folder of the run [runs/<name of the recipe>]')
    parser.add_argument('--verbose', action='store_true', help='list the parameters at the start')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')
    options, rest = cli.parse_known(parser, argv)
    config = recipes.load(options.config, recipes.overrides(rest)) if options.config else None
    if options.help:
        shown = "with the Mix-LN paper's C4 recipe as defaults"
        if config:
            shown = f'with the values of {options.config}, * where they are not the defaults'
        names = {'model.norm_position': [*placements.PLACEMENTS, *placements.SCHEMES]}
        parser.epilog = f'keys of a recipe, {shown}:\n{recipes.help_text(config, names)}'
        parser.print_help()
        parser.exit()
    if not options.config:
        raise UsageError('--config FILE is missing; --help lists the keys')
    file, _, argument = options.config.partition('.py:')
    if options.workdir is None:
        options.workdir = f'runs/{pathlib.Path(file).stem}{argument and f"_{argument}"}'
    return options, config


def main(argv):
    """The command; returns its exit code."""

    def job():
        options, config = parse(argv)
        run(config, options.workdir, stop, options.verbose)

    return cli.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    stop.started()
    code = main(sys.argv[1:])
    if code == errors.STOPPED or jax.distributed.is_initialized():
        processes.end(code)  # everything is closed; Python's own end may crash where a signal cut the compiler short
    sys.exit(code)

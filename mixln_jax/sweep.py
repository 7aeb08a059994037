"""Trains every combination of some values of keys, each in a work directory of its own, and compares the results.

Run the same command several times, on machines that share the folder too: each worker takes the next free cell. A sweep
may grow: more values, keys or seeds add cells, and what is done stays. --show prints and draws what is known so far.
"""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, which take seconds

# ruff: noqa: E402
import argparse
import sys
from collections.abc import Sequence

from mixln_jax import recipes
from mixln_jax.sweeps import command, show
from mixln_jax.system import cli
from mixln_jax.system.errors import UsageError

OF_TRAINING = 'config', 'over', 'seeds', 'workdir', 'parallel', 'search', 'trials'


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Returns (options, changes of all cells). Raises UsageError for options that are not valid."""
    parser = argparse.ArgumentParser(
        prog='python -m mixln_jax.sweep',
        usage='%(prog)s --config FILE[:ARG] [--config.KEY=VALUE ...] --over KEY=V1,V2,... [--over ...] --workdir DIR\n'
        '       %(prog)s --show DIR',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--config', metavar='FILE[:ARG]', help='a recipe; its sweep(), if it has one, yields changes for cells')
    add('--over', metavar='KEY=V1,V2', action='append', nargs='+', help='values of a key; keys in one --over change '
        'together, several --over are combined; a value with a comma stands in double quotes; in a search '
        'KEY=LOW..HIGH, KEY=log:LOW..HIGH, or values to choose from')  # fmt: skip
    add('--seeds', type=int, metavar='N', help='also over seed and data.seed, 0 to N - 1')
    add('--workdir', metavar='DIR', help='folder of the sweep, with a work directory for each cell')
    add('--parallel', type=int, metavar='N', help='cells that this worker trains at a time [1]')
    add('--search', choices=['optuna'], help='search in ranges instead of training all values (pip install optuna)')
    add('--trials', type=int, metavar='N', help='search: cells to train, over all calls')
    add('--show', metavar='DIR', help='print the results of a sweep, and write them into DIR/results')
    add('--traceback', action='store_true', help='show where an error comes from')
    options, rest = cli.parse_known(parser, argv)
    return options, recipes.overrides(rest)


def _check(options: argparse.Namespace, fixed: Sequence[tuple[str, str]]) -> None:
    """Raises UsageError for options that are missing, out of range or have no meaning together."""
    if options.show is not None:
        given = [f'--{name}' for name in OF_TRAINING if getattr(options, name) is not None] + ['--config'] * bool(fixed)
        if given:
            raise UsageError(f'{given[0]} has no meaning with --show')
        return
    for name, shown in (('config', 'FILE'), ('workdir', 'DIR')):
        if getattr(options, name) is None:
            raise UsageError(f'--{name} {shown} is missing; --help lists the options')
    for name in ('seeds', 'parallel', 'trials'):
        if (number := getattr(options, name)) is not None and number < 1:
            raise UsageError(f'--{name} must be at least 1, not {number}')
    if (options.search is None) != (options.trials is None):
        raise UsageError('--search optuna and --trials N are given together')
    if options.search and options.seeds:
        raise UsageError('--seeds has no meaning in a search: it trains each setting once')


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    codes: list[int] = []

    def job() -> None:
        options, fixed = parse(argv)
        _check(options, fixed)
        if options.show is not None:
            show.show(options.show)
            return
        options.parallel = options.parallel or 1
        codes.append(command.train(options, tuple(fixed), stop))

    return cli.call(job, show_traceback='--traceback' in argv) or max(codes, default=0)


if __name__ == '__main__':
    stop.started()
    sys.exit(main(sys.argv[1:]))

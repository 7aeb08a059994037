"""Which peak learning rate and how many Post-LN layers train, found by short runs of a recipe.

For each number of Post-LN layers the rate first rises linearly until the network collapses: an upper bound. Runs with
the recipe's warm-up and at least as long again at the peak follow, the highest rate first, until one trains. What these
runs do not show is printed with the advice. --losses judges the losses of a run instead.
"""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, which take seconds

# ruff: noqa: E402
import argparse
import sys
from collections.abc import Sequence

from mixln_jax import recipes
from mixln_jax.advice import command
from mixln_jax.system import cli
from mixln_jax.system.errors import UsageError

OF_RUNS = 'config', 'workdir', 'to', 'ramp_steps', 'rates', 'ratios', 'seeds', 'steps'
OF_LOSSES = 'entropy', 'warmup'


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """Returns (options, changes of the recipe). Raises UsageError for options that are not valid."""
    parser = argparse.ArgumentParser(
        prog='python -m mixln_jax.advise',
        usage='%(prog)s --config FILE[:ARG] [--config.KEY=VALUE ...] [--workdir DIR] [--to RATE] [--steps N] ...\n'
        '       %(prog)s --losses FILE [--entropy X] [--warmup N]',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add('--config', metavar='FILE[:ARG]', help='a recipe')
    add('--workdir', metavar='DIR', help='folder of the runs and of advice.json [runs/advice_<name of the recipe>]')
    add('--to', type=float, metavar='RATE', help='last rate of the ramp [0.05]')
    add('--ramp_steps', type=int, metavar='N', help='length of the ramp [as of the other runs, at most 5,000]')
    add('--rates', metavar='R1,R2', help="peak rates to try [1/2, 1/4, 1/8 of the upper bound, and the recipe's own]")
    add('--ratios', metavar='A1,A2', help="post_ratio of mix to try [the recipe's and half of it]")
    add('--seeds', type=int, metavar='N', help="runs of each rate, with seeds 0 to N - 1 [one, the recipe's seed]")
    add('--steps', type=int, metavar='N', help='steps of all runs together, at most')
    add('--losses', metavar='FILE', help='judge these losses: a work directory, JSON lines or columns of step and loss')
    add('--entropy', type=float, metavar='X', help='of the tokens, in nats: the loss of their frequencies alone')
    add(
        '--warmup',
        type=int,
        metavar='N',
        help='steps that warm up in the run of --losses [as its config.json says, if there is one]',
    )
    add('--traceback', action='store_true', help='show where an error comes from')
    options, rest = cli.parse_known(parser, argv)
    changes = recipes.overrides(rest)
    _check(options, bool(changes))
    return options, changes


def _check(options: argparse.Namespace, changed: bool) -> None:
    """Raises UsageError for options that are missing, out of range or have no meaning together."""
    if options.losses is None and options.config is None:
        raise UsageError('--config FILE or --losses FILE is missing; --help lists the options')
    others, with_what = (OF_RUNS, '--losses') if options.losses is not None else (OF_LOSSES, '--config')
    if given := [f'--{name}' for name in others if getattr(options, name) is not None]:
        raise UsageError(f'{given[0]} has no meaning with {with_what}')
    if options.losses is not None and changed:
        raise UsageError('--config.KEY has no meaning with --losses')
    for name, least in (('ramp_steps', 2), ('seeds', 1), ('steps', 1), ('warmup', 0)):
        if (number := getattr(options, name)) is not None and number < least:
            raise UsageError(f'--{name} must be at least {least}, not {number}')
    for name in ('to', 'entropy'):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise UsageError(f'--{name} must be above 0, not {value:g}')


def numbers(option: str, text: str | None) -> list[float]:
    """Returns the numbers of a list such as 0.1,0.2. Raises UsageError for anything else."""
    words = cli.split_list(text) if text is not None else []
    if text is not None and not words:
        raise UsageError(f'{option} is empty')
    try:
        return [cli.finite(word) for word in words]
    except ValueError:
        raise UsageError(f'{option}: {text!r} is not a list of numbers, such as 0.125,0.25') from None


def main(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""

    def job() -> None:
        options, changes = parse(argv)
        if options.losses is not None:
            command.judge_file(options.losses, options.entropy, options.warmup)
            return
        limits = {
            'to': 0.05 if options.to is None else options.to,
            'ramp_steps': options.ramp_steps,
            'rates': numbers('--rates', options.rates),
            'ratios': numbers('--ratios', options.ratios),
            'seeds': options.seeds,
            'steps': options.steps,
        }
        workdir = (
            options.workdir
            if options.workdir is not None
            else recipes.default_workdir(options.config).replace('/', '/advice_', 1)
        )
        command.advise(options.config, changes, workdir, limits, stop)

    return cli.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    stop.started()
    sys.exit(main(sys.argv[1:]))

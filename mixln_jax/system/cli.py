"""What every command does: it reads its words, runs its job and ends with one line and an exit code."""

import argparse
import logging
import math
import re
import sys
import threading
import traceback
import warnings

from mixln_jax.system import console
from mixln_jax.system.errors import STOPPED, Stopped, UsageError, first_line, known, one_line
from mixln_jax.system.signals import stopped_line


def parse(parser, argv, known=False):
    """Returns the options of a command line; with `known` a pair: the parser's own options, and the other words.

    Options are spelled with underscores; hyphens in their place are accepted. Raises UsageError, in one line, where
    argparse would print its usage. --help exits with 0.
    """
    parser.exit_on_error = False
    parser.register('type', int, integer)  # what `type=int` and `type=float` read
    parser.register('type', float, finite)

    def error(message):
        raise UsageError(f'{message} (--help lists the options)')

    parser.error = error
    if empty := next((word for word in argv if re.fullmatch(r'--[\w-]+=--', word)), None):
        error(f'{empty}: -- is no value')  # some Pythons' argparse makes an empty list of it
    argv = _underscored(parser, argv)
    try:
        return parser.parse_known_args(argv) if known else parser.parse_args(argv)
    except argparse.ArgumentError as problem:
        error(str(problem))


def _underscored(parser, argv):
    """Returns the words with hyphens replaced in the names of options that the parser knows with underscores."""
    options = {option for action in parser._actions for option in action.option_strings}
    words = list(argv)
    for number, word in enumerate(words):
        if word == '--':  # only values follow
            break
        name, equals, value = word.partition('=')
        spelled = f'--{name[2:].replace("-", "_")}'
        if name.startswith('--') and spelled in options:
            words[number] = f'{spelled}{equals}{value}'
    return words


def integer(text: str) -> int:
    """The integer of a text such as 1000, 1_000 or 1e3. Raises ValueError for any other text."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


def finite(text: str) -> float:
    """The number of a text. Raises ValueError for one that is none, or not finite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text} is not finite')
    return value


def listed(text: str) -> list[str]:
    """The parts of a list such as 'a,b' or 'a, b', without blanks."""
    return [part.strip() for part in text.split(',') if part.strip()]


def digits(text: str) -> int | None:
    """The number of a text of up to 18 decimal digits, more than anything here has; None for any other text."""
    return int(text) if re.fullmatch(r'[0-9]{1,18}', text) else None


def call(job, *args, show_traceback=False):
    """Runs `job(*args)`, prints the one line that an error deserves and returns the exit code.

    With `show_traceback` Python's own report of where it comes from stands before it.
    """
    console.guard()
    if not show_traceback:
        _quiet_libraries()
    try:
        job(*args)
    except Stopped as stopped:
        console.say(stopped_line(stopped), file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        console.say('mixln_jax: stopped by SIGINT', file=sys.stderr)
        return STOPPED
    except Exception as error:
        if show_traceback:
            console.say(''.join(traceback.format_exception(error)).rstrip(), file=sys.stderr)
        error = known(error)
        console.say(f'mixln_jax: {one_line(error)}', file=sys.stderr)
        return error.code
    return 0


def _quiet_libraries():
    """Keeps off the terminal what libraries report of errors that end as one line here, or that are none, such as event
    loops that are closed while something still waits."""
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    if 'absl.logging' in sys.modules:
        sys.modules['absl.logging'].set_verbosity('fatal')
    sys.unraisablehook = lambda unraisable: None
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
    threading.excepthook = _say_of_thread


def _say_of_thread(ended):
    """One line of an exception that ended a thread of a library; the job may still be right without it."""
    if ended.exc_type is not SystemExit:
        error = ended.exc_value or ended.exc_type()
        where = ended.thread.name if ended.thread else 'a thread'
        console.say(f'mixln_jax: warning: {where}: {type(error).__name__}: {first_line(error)}', file=sys.stderr)

"""What every command does: it parses its options, runs its job and ends with one line and an exit code."""

import argparse
import logging
import math
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from mixln_jax.system import console
from mixln_jax.system.errors import STOPPED, Stopped, UsageError, first_line, one_line, to_exit
from mixln_jax.system.signals import stopped_line

Parsed = TypeVar('Parsed')


class HelpShown(SystemExit):
    """The command ends, with 0, after its help. Any other SystemExit comes from code that a command calls."""


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed options. --help prints the help and exits with 0.

    Options are spelled with underscores; hyphens in their place are accepted. Raises UsageError, one line, where
    argparse would print its usage and exit.
    """
    return _parse(parser, argv, parser.parse_args)


def parse_known(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the options that the parser knows, and all other words; otherwise as `parse`."""
    return _parse(parser, argv, parser.parse_known_args)


def _parse(
    parser: argparse.ArgumentParser, argv: Sequence[str], parse_words: Callable[[Sequence[str]], Parsed]
) -> Parsed:
    parser.exit_on_error = False
    parser.register('type', int, integer)  # reads the values of options with `type=int`
    parser.register('type', float, finite)

    def error(message: str) -> NoReturn:
        raise UsageError(f'{message} (--help lists the options)')

    def leave(status: int = 0, message: str | None = None) -> NoReturn:
        raise HelpShown(status)

    parser.error, parser.exit = error, leave  # type: ignore[method-assign]
    if empty := next((word for word in argv if re.fullmatch(r'--[\w-]+=--', word)), None):
        error(f'{empty}: -- is not a value')  # in some Python versions argparse takes it for an empty list
    argv = _underscored(parser, argv)
    try:
        return parse_words(argv)
    except argparse.ArgumentError as problem:
        error(str(problem))


def _underscored(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
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
    """Returns the integer that a text such as 1000, 1_000 or 1e3 stands for. Raises ValueError for any other text."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise
        return int(value)


def finite(text: str) -> float:
    """Returns the number that a text stands for. Raises ValueError if it is not a number, or not finite."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f'{text} is not finite')
    return value


def split_list(text: str) -> list[str]:
    """Returns the items of a list such as 'a,b' or 'a, b', without blanks and empty items."""
    return [part.strip() for part in text.split(',') if part.strip()]


def parse_decimal(text: str) -> int | None:
    """Returns the number that up to 18 decimal digits stand for (no count here has more); None for any other text."""
    return int(text) if re.fullmatch(r'[0-9]{1,18}', text) else None


def call(job: Callable[..., object], *args: object, show_traceback: bool = False) -> int:
    """Runs `job(*args)` and returns the exit code. An error is printed as one line.

    With `show_traceback` Python's traceback is printed before that line.
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
    except HelpShown:
        raise
    except (Exception, SystemExit) as error:
        if show_traceback:
            console.say(''.join(traceback.format_exception(error)).rstrip(), file=sys.stderr)
        ending = to_exit(error)
        console.say(f'mixln_jax: {one_line(ending)}', file=sys.stderr)
        return ending.code
    return 0


def _quiet_libraries() -> None:
    """Silences libraries that print errors which are reported here as one line, or which are harmless, such as event
    loops that are closed while a task still waits."""
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    if 'absl.logging' in sys.modules:
        sys.modules['absl.logging'].set_verbosity('fatal')
    sys.unraisablehook = lambda unraisable: None
    warnings.filterwarnings('ignore', 'coroutine .* was never awaited', RuntimeWarning)
    threading.excepthook = _report_thread_error


def _report_thread_error(ended: threading.ExceptHookArgs) -> None:
    """Prints one line about an exception that ended a library's thread; the job may still succeed without it."""
    if ended.exc_type is not SystemExit:
        error = ended.exc_value or ended.exc_type()
        name = ended.thread.name if ended.thread else 'a thread'
        console.say(f'mixln_jax: warning: {name}: {type(error).__name__}: {first_line(error)}', file=sys.stderr)

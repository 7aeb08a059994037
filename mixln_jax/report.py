"""Runs beside what the papers say: `python -m mixln_jax.report DIR ...` prints a table in markdown."""

import argparse
import pathlib
import sys

from mixln_jax import config as configs
from mixln_jax import exits, record
from mixln_jax.exits import CheckpointError, UsageError
from mixln_jax.models import norms

COLUMNS = ('run', 'placement', 'steps', 'tokens', 'perplexity', 'paper', 'difference', 'source')


def row(folder):
    """The table's row of a work directory, a text a column.

    Raises UsageError where there is no run, CheckpointError for metrics that cannot be read.
    """
    folder = pathlib.Path(folder).resolve()
    config = configs.read(folder / 'config.json')
    lines = record.read_metrics(folder / 'metrics.jsonl')
    evaluated = [line for line in lines if 'eval/perplexity' in line]
    last, expected, model = lines[-1] if lines else {'step': 0}, config.expected, config.model
    got = evaluated[-1]['eval/perplexity'] if evaluated else None
    paper = expected.perplexity or None
    done = '' if last['step'] == config.num_steps else f' of {config.num_steps:,}'
    return (
        folder.name,
        norms.spelled(norms.resolve(model.norm_position, model.num_layers, model.post_ratio)),
        f'{last["step"]:,}{done}',
        f'{last["tokens"]:.3g}' if 'tokens' in last else '-',
        f'{got:.2f}' if got else 'not finite' if evaluated else '-',
        f'{paper:.2f}' if paper else '-',
        f'{got - paper:+.2f} ({(got / paper - 1):+.1%})' if got and paper else '-',
        expected.source or '-',
    )


def table(rows):
    """Rows of texts under COLUMNS in markdown, columns aligned."""
    widths = [max(len(text) for text in column) for column in zip(COLUMNS, *rows, strict=True)]
    lines = [COLUMNS, ['-' * width for width in widths], *rows]
    return [
        '| ' + ' | '.join(f'{text:<{width}}' for text, width in zip(line, widths, strict=True)) + ' |' for line in lines
    ]


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m mixln_jax.report', description=__doc__, allow_abbrev=False)
    parser.add_argument('runs', nargs='+', metavar='DIR', help='work directory of a run')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def job():
        rows, problems = [], []
        for folder in exits.parse(parser, argv).runs:
            try:
                rows.append(row(folder))
            except (UsageError, CheckpointError) as problem:  # the others are shown all the same
                problems.append(problem)
        if rows:
            record.say(*table(rows))
        for problem in problems[:-1]:
            record.say(f'mixln_jax: {problem}', file=sys.stderr)
        if problems:
            raise problems[-1]

    return exits.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

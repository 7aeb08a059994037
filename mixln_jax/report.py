"""Runs side by side and beside what the papers say: `python -m mixln_jax.report DIR ...`

Prints a table in markdown and writes report.html, one page with all figures in it, and report.md, its tables.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys

import numpy as np

from mixln_jax import config as configs
from mixln_jax import drawing, exits, figures, page, record, sections
from mixln_jax.exits import CheckpointError, UsageError
from mixln_jax.models import norms

COLUMNS = ('run', 'placement', 'steps', 'tokens', 'perplexity', 'paper', 'difference', 'source')
ANALYSES = ('angular', 'drop', 'gradients', 'variance')


@dataclasses.dataclass
class Run:
    """What a work directory holds."""

    folder: str  # as given
    config: configs.Config
    lines: list  # of metrics.jsonl
    environment: dict
    analyses: dict  # job -> its result.json
    name: str
    colour: int

    @property
    def placement(self):
        model = self.config.model
        return norms.spelled(norms.resolve(model.norm_position, model.num_layers, model.post_ratio))

    @property
    def tokens(self):
        return f'{self.lines[-1]["tokens"]:.3g}' if self.lines and 'tokens' in self.lines[-1] else '-'

    def results(self, job):
        """Of an analysis, by step, with the run's name and colour; `checkpoint_label` is their own label."""
        named = [
            {**result, 'label': self.name, 'checkpoint_label': result.get('label'), 'colour': self.colour}
            for result in self.analyses[job]['results']
        ]
        return sorted(named, key=lambda result: -1 if result.get('step') is None else result['step'])


def read(folders):
    """(runs, problems) of work directories; one with a problem hides no other."""
    runs, problems = [], []
    for folder in folders:
        try:
            path = pathlib.Path(folder).resolve()
            config = configs.read(path / 'config.json')
            lines = record.read_metrics(path / 'metrics.jsonl')
            _check_lines(path / 'metrics.jsonl', lines)
        except (UsageError, CheckpointError) as problem:
            problems.append(problem)
            continue
        run = Run(folder, config, lines, {}, {}, '', len(runs))
        runs.append(run)
        for name, into in (('environment', None), *((f'analysis/{job}/result', job) for job in ANALYSES)):
            try:
                content = _content(path / f'{name}.json', into)
            except CheckpointError as problem:
                problems.append(problem)
                continue
            if into is None:
                run.environment = content or {}
            elif content:
                run.analyses[into] = content
    for run, name in zip(runs, drawing.names([run.folder for run in runs]), strict=True):
        run.name = name
    return runs, problems


def _check_lines(path, lines):
    """Raises CheckpointError for a value that is not a number, or numbers."""
    for line in lines:
        for name, value in line.items():
            if not _numeric(value):
                raise CheckpointError(f'{path}: {name} of step {line["step"]} is no number')


def _numeric(value):
    """Whether a value, or all in a list of lists, are numbers or None, which stands for one that is not finite."""
    return all(map(_numeric, value)) if isinstance(value, list) else isinstance(value, int | float | None)


def _content(path, job):
    """A JSON file, None where there is none; CheckpointError where it is malformed or not the result of `job`."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError('it is not an object')
        for result in content['results'] if job else ():
            _check(job, result)
        if job and not content['results']:
            raise ValueError('it has no results')
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f'the result of mixln_jax.analysis.{job}' if job else 'what a run says of its environment'
        raise CheckpointError(f'{path} is not {what}: {type(error).__name__}: {error}') from None
    return content


def _check(job, result):
    """Raises ValueError, KeyError or TypeError for an element of `results` that is not as the figures need it."""
    L = len(result['norm_position'])
    for name, kind in (('norm_position', str), ('layer_index', int)):
        if not (isinstance(result[name], list) and {*map(type, result[name])} == {kind} and len(result[name]) == L):
            raise ValueError(f'{name} that is not a list with something of every layer')
    for name in ('step', 'tokens', 'rows', 'gradients', 'rows_per_gradient', 'theory_constant'):
        if not isinstance(result.get(name), int | float | None):
            raise ValueError(f'{name} that is no number')
    for name, kind in (('label', str | None), ('text', dict | None)):
        if not isinstance(result.get(name), kind):
            raise ValueError(f'{name} that is none')
    for metric in result['metrics'].values() if job == 'drop' else ():
        if not _numeric([metric.get('value'), metric.get('standard_error')]):
            raise ValueError('a value that is no number')
    shapes = {
        'angular': lambda: [(result['distance'], (L + 1, L + 1))],
        'gradients': lambda: [
            (result['layers'], (L,)),
            *((result['matrices'][name], (L,)) for name in figures.MATRICES),
        ],
        'variance': lambda: [
            (result['variance'], (L + 1,)),
            *((result['contribution'][name], (L,)) for name in ('attention', 'mlp')),
        ],
        'drop': lambda: [
            (quantity, (L + 1 - int(block),))
            for metric in result['metrics'].values()
            for block, quantity in metric['drop'].items()
        ],
    }
    for quantity, shape in shapes[job]():
        if not _numeric([quantity['mean'], quantity.get('standard_error')]):
            raise ValueError('what is no number among numbers')
        mean, error = np.array(quantity['mean'], float), quantity.get('standard_error')
        error = np.zeros(shape) if error is None else np.array(error, float)
        if not mean.shape == error.shape == shape:
            raise ValueError(f'shapes {mean.shape} and {error.shape} where {shape} belongs')
        if (error < 0).any():
            raise ValueError('a negative standard error')
    if job == 'variance' and result.get('theory') and np.array(result['theory'], float).shape != (L + 1,):
        raise ValueError('theory of another length')


def row(run):
    """The run's row under COLUMNS, texts."""
    evaluated = [line for line in run.lines if 'eval/perplexity' in line]
    step, expected = run.lines[-1]['step'] if run.lines else 0, run.config.expected
    got = evaluated[-1]['eval/perplexity'] if evaluated else None
    paper = expected.perplexity or None
    return (
        run.name,
        run.placement,
        f'{step:,}{"" if step == run.config.num_steps else f" of {run.config.num_steps:,}"}',
        run.tokens,
        f'{got:.2f}' if got else 'not finite' if evaluated else '-',
        f'{paper:.2f}' if paper else '-',
        f'{got - paper:+.2f} ({(got / paper - 1):+.1%})' if got and paper else '-',
        expected.source or '-',
    )


def markdown(head, rows):
    """Lines of a table in markdown, columns aligned."""
    head, *rows = [[text.replace('|', '\\|').replace('\n', ' ') for text in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ['-' * width for width in widths], *rows]
    return [
        '| ' + ' | '.join(f'{text:<{width}}' for text, width in zip(line, widths, strict=True)) + ' |' for line in lines
    ]


def document(title, lead, sections):
    """The sections in markdown, without figures, a text."""

    def lines(section, level):
        yield from (f'{"#" * level} {section.heading}', '')
        for text in (*section.texts, *section.notes):
            yield from (text, '')
        for table in section.tables:
            yield from (f'{table.caption}:', '', *markdown(table.head, table.rows), '')
        for part in section.parts:
            yield from lines(part, level + 1)

    every = itertools.chain.from_iterable(lines(section, 2) for section in sections)
    return '\n'.join([f'# {title}', '', lead, '', *every])


def write(runs, rows, out):
    """Writes report.html and report.md into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)  # or it would be found out after drawing
    title = 'Runs side by side' if len(runs) > 1 else f'The run {runs[0].name}'
    names = ', '.join(run.name for run in runs)
    lead = f'{names}: perplexity, settings, training, and what each layer does (python -m mixln_jax.report).'
    said = sections.compose(runs, COLUMNS, rows)
    colours = {run.name: drawing.look({'colour': run.colour}, 0)[0] for run in runs}
    record.write(out / 'report.html', page.render(title, lead, said, colours).encode())
    record.write(out / 'report.md', document(title, lead, said).encode())


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m mixln_jax.report', description=__doc__, allow_abbrev=False)
    parser.add_argument('runs', nargs='+', metavar='DIR', help='work directory of a run')
    parser.add_argument('--out', metavar='FOLDER', default='report', help='for report.html and report.md [report]')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def job():
        options = exits.parse(parser, argv)
        runs, problems = read(options.runs)
        rows = [row(run) for run in runs]
        if runs:
            record.say(*markdown(COLUMNS, rows))
            try:
                write(runs, rows, pathlib.Path(options.out))
            except OSError as problem:
                problems.append(UsageError(f'--out {options.out} is no folder to write into: {problem.strerror}'))
        for problem in problems[:-1]:
            record.say(f'mixln_jax: {problem}', file=sys.stderr)
        if problems:
            raise problems[-1]

    return exits.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""Compares runs with each other and with the papers: `python -m mixln_jax.report DIR ...`

Prints a table in markdown and writes report.html, one page with all figures in it, and report.md, its tables.
"""

import argparse
import dataclasses
import html
import itertools
import json
import math
import os
import pathlib
import re
import sys

import numpy as np

from mixln_jax import config as configs
from mixln_jax import drawing, exits, figures, outputs, page, paths, record, sections
from mixln_jax.exits import CheckpointError, UsageError, reading
from mixln_jax.models import norms
from mixln_jax.page import Section, Table

SEEDS = ('seed', 'data.seed')
SHOWN = ('model.norm_position', 'num_steps', 'expected.')  # keys in columns of their own: placement, steps, paper
COMMAND = 'python -m mixln_jax.report'  # stands in every report
LARGEST = 2**63  # of a whole number in a file
ANALYSES = ('angular', 'drop', 'gradients', 'variance')


@dataclasses.dataclass(eq=False)
class Run:
    """What a work directory holds."""

    folder: str  # as given
    config: configs.Config
    lines: list  # of metrics.jsonl
    environment: dict
    analyses: dict  # job -> its result.json
    name: str
    colour: int
    debug: dict = dataclasses.field(default_factory=dict)  # what it wrote where a step was not finite

    @property
    def placement(self):
        model = self.config.model
        return norms.spelled(norms.resolve(model.norm_position, model.num_layers, model.post_ratio))

    @property
    def keys(self):
        """{key: value} of the configuration, flat."""
        return configs.flatten(self.config)

    @property
    def seeds(self):
        return tuple(self.keys[name] for name in SEEDS)

    @property
    def step(self):
        return self.lines[-1]['step'] if self.lines else 0

    @property
    def steps(self):
        """How far it has come, a text."""
        last = self.config.num_steps
        return f'{self.step:,}' if self.step == last else f'{self.step:,} of {last:,}'

    @property
    def bad_step(self):
        """The step at which it ended because a loss or gradient was not finite, None where it did not."""
        step = sections.number(self.debug.get('step'))
        return int(step) if self.step < step < LARGEST else None

    @property
    def text(self):
        """{part: value} of what it has read, and of what it is evaluated on; {} where that is not known."""
        data, (_, tokens) = self.environment.get('data'), self.last('eval/tokens')
        if not isinstance(data, dict):
            return {}
        wanted = self.config.eval.tokens
        return data | {'split': self.config.eval.split, 'amount': min(wanted, tokens or wanted)}

    def last(self, key):
        """The newest value of a metric: (step, number), nan where it is not finite; (None, None): never logged."""
        line = next((line for line in reversed(self.lines) if key in line), None)
        return (line['step'], sections.number(line[key])) if line else (None, None)

    def results(self, job):
        """Of an analysis, by step, with the run's name and colour; `checkpoint_label` is their own label."""
        named = [
            {**result, 'label': self.name, 'checkpoint_label': result.get('label'), 'colour': self.colour}
            for result in self.analyses[job]['results']
        ]
        return sorted(named, key=lambda result: -1 if result.get('step') is None else result['step'])


def read(folders):
    """(runs, problems, others) of folders; one with a problem hides no other, and `others` are no runs at all."""
    runs, problems, others = [], [], []
    for path, folder in {pathlib.Path(os.path.realpath(paths.local(folder, ''))): folder for folder in folders}.items():
        try:
            if not _is_run(path):
                others.append(folder)
                continue
            config, metrics = configs.read(path / 'config.json'), path / 'metrics.jsonl'
            lines = record.read_metrics(metrics)
            with reading(metrics, CheckpointError):
                _check_lines(metrics, lines)
            run = Run(folder, config, lines, {}, {}, '', len(runs))
            with reading(path / 'config.json', UsageError):
                _ = run.placement
        except (UsageError, CheckpointError) as problem:
            problems.append(problem)
            continue
        runs.append(run)
        for name, job in (
            ('environment', ''),
            ('debug/report', ''),
            *((f'analysis/{job}/result', job) for job in ANALYSES),
        ):
            try:
                content = _content(path / f'{name}.json', job) or {}
            except CheckpointError as problem:
                problems.append(problem)
                continue
            if job and content:
                run.analyses[job] = content
            elif not job:
                setattr(run, 'environment' if name == 'environment' else 'debug', content)
    for run, name in zip(runs, drawing.names([run.folder for run in runs]), strict=True):
        run.name = name
    _colour(groups(runs))
    return runs, problems, others


def _is_run(path):
    """Whether a path, which must exist, has the config.json of a run, be it damaged. Others may have one too, such as
    Hugging Face folders."""
    try:
        return 'model' in paths.read_json(path / 'config.json', UsageError)
    except FileNotFoundError:
        if path.exists():
            return False
        raise UsageError(f'there is no {path / "config.json"}') from None
    except UsageError:
        return not path.is_file()


def _check_lines(path, lines):
    """Raises CheckpointError for a value that is not a number, or numbers."""
    for line in lines:
        for name, value in line.items():
            if not _numeric(value):
                raise CheckpointError(f'{path}: {name} of step {line["step"]} is no number')


def _numeric(value):
    """Whether a value, or all in a list of lists, are numbers or None, which stands for one that is not finite."""
    if isinstance(value, list):
        return all(map(_numeric, value))
    if isinstance(value, float):
        return not 1e100 <= abs(value) < math.inf  # no axis can be drawn for what is near the largest float
    return value is None or isinstance(value, int) and abs(value) < LARGEST


def _content(path, job):
    """A JSON file, None where there is none; CheckpointError where it is malformed or not the result of `job`."""
    problem = f'not {f"the result of mixln_jax.analysis.{job}" if job else "what a run writes"}'
    try:
        content = paths.read_json(path, CheckpointError, problem)
    except FileNotFoundError:
        return None
    with reading(path, CheckpointError, problem):
        for name in ('definition', 'unit', 'source') if job else ():
            if not isinstance(content.get(name), str | None):
                raise ValueError(f'{name} that is no text')
        for result in content['results'] if job else ():
            _check(job, result)
        if job and not content['results']:
            raise ValueError('it has no results')
    return content


def _check(job, result):
    """Raises ValueError, KeyError or TypeError for an element of `results` that is not as the figures need it."""
    L = len(result['norm_position'])
    for name, kind in (('norm_position', str), ('layer_index', int)):
        if not (isinstance(result[name], list) and {*map(type, result[name])} == {kind} and len(result[name]) == L):
            raise ValueError(f'{name} that is not a list with something of every layer')
    if not _numeric(result['layer_index']) or result['layer_index'] != sorted({*result['layer_index']}):
        raise ValueError('layer_index that does not rise')
    for name in ('step', 'tokens', 'rows', 'gradients', 'rows_per_gradient', 'theory_constant'):
        if isinstance(result.get(name), list) or not _numeric(result.get(name)):
            raise ValueError(f'{name} that is no number')
    for name, kind in (('label', str | None), ('text', dict | None)):
        if not isinstance(result.get(name), kind):
            raise ValueError(f'{name} that is none')
    if any(isinstance(value, list | dict) for value in [*(result.get('text') or {}).values(), result.get('positions')]):
        raise ValueError('a list where one value belongs')
    single = [{'mean': of.get('value'), **of} for of in result['metrics'].values()] if job == 'drop' else []
    single += (result.get('outside') or {}).values() if job == 'gradients' else []
    for one in ([of['mean'], of.get('standard_error')] for of in single):
        if any(isinstance(value, list) for value in one) or not _numeric(one):
            raise ValueError('a value that is no number')
    if job == 'drop' and any(f'{int(block)}' != block for of in single for block in of['drop']):
        raise ValueError('a block that is no number of layers')
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


def groups(runs):
    """Lists of runs: those together that differ in seeds alone and are equally far; the lowest perplexity first."""
    found = {}
    for run in runs:
        step, perplexity = run.last('eval/perplexity')
        alike = [run.step, step, run.text, {name: value for name, value in run.keys.items() if name not in SEEDS}]
        known = step is not None and math.isfinite(perplexity)
        candidates = found.setdefault(json.dumps(alike if known else run.name), [])
        # The same seeds again are no further sample.
        group = next((group for group in candidates if run.seeds not in [other.seeds for other in group]), None)
        group.append(run) if group else candidates.append([run])
    return sorted(itertools.chain(*found.values()), key=_rank)


def _rank(group):
    perplexities = [run.last('eval/perplexity')[1] for run in group]
    if None in perplexities:
        return 2, 0
    mean = np.mean(perplexities)
    return (0, mean) if np.isfinite(mean) else (1, 0)


def _colour(groups):
    """Gives runs that differ in seeds alone one colour and dashes of their own, where there are enough of both."""
    if len(groups) <= len(drawing.COLOURS) and max(map(len, groups), default=0) <= len(drawing.DASHES):
        for number, group in enumerate(sorted(groups, key=lambda group: group[0].colour)):
            for other, run in enumerate(group):
                run.colour = number + other * len(drawing.COLOURS)


def overview(runs):
    """The Section that compares the runs: a row for every group of them."""
    ordered = groups(runs)
    rows = [_row(group) for group in ordered]
    placed = list(rows[0]).index('placement') + 1
    settings = [
        {name: ', '.join(dict.fromkeys(f'{run.keys[name]}' or '(empty)' for run in group)) for name in runs[0].keys}
        for group in ordered
    ]
    shown = SHOWN + SEEDS * any(len(group) > 1 for group in ordered)  # seeds of each run are in the table of runs
    differ = [name for name in settings[0] if len({of[name] for of in settings}) > 1 and not name.startswith(shown)]
    head = [*list(rows[0])[:placed], *differ, *list(rows[0])[placed:]]
    cells = [[(row | of)[name] for name in head] for row, of in zip(rows, settings, strict=True)]
    caption = 'Last evaluation of each run, lowest perplexity first'
    if any(len(group) > 1 for group in ordered):
        caption += '; runs that differ in seeds alone in one row: mean ± standard error (number of runs)'
    table = Table(caption, *sections.filled(head, cells))
    return Section('Perplexity', notes=tuple(_notes(runs)), warnings=tuple(_unlike(runs)), tables=(table,))


def _row(group):
    """{column: text} of runs that differ in seeds alone, but for the settings."""
    run, expected = group[0], group[0].config.expected
    perplexities, *others = (
        [run.last(key)[1] for run in group] for key in ('eval/perplexity', 'eval/bits_per_byte', 'tokens')
    )
    bits, tokens = ([None if value is None or math.isnan(value) else value for value in of] for of in others)
    mean = np.mean(perplexities) if None not in perplexities else np.nan
    paper = expected.perplexity or None
    compared = paper and np.isfinite(mean)
    return {
        'run': sections.listed(group),
        'perplexity': _mean(perplexities, 2),
        'bits per byte': _mean(bits, 3),
        'paper': f'{paper:,.2f}' if paper else '-',
        'difference': f'{mean - paper:+,.2f} ({mean / paper - 1:+.1%})' if compared else '-',
        'placement': run.placement,
        'steps': run.steps,
        'tokens': f'{np.mean(tokens):,.0f}' if None not in tokens else '-',
        'source': expected.source or '-',
    }


def _mean(values, decimals):
    """A number, or the mean of several, with its standard error and how many they are, a text."""
    if None in values:
        return '-'
    text = sections.fixed(np.mean(values), decimals)
    if len(values) == 1:
        return text
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return f'{text} ± {sections.short(error, 2)} ({len(values)})'


def _unlike(runs):
    """What hinders a comparison of perplexities: that runs read other text, or read it otherwise."""
    known = [run for run in runs if run.text]
    texts = [run.text for run in known]
    names = [run.name for run in known]
    if {'tokenizer', 'mode', 'seq_length'} & {*sections.differing(texts)}:
        # Then others differ with them: how much text a number of tokens is, and the digest of rows made beforehand.
        prepared = any(run.config.data.source == 'tokens' for run in known)
        others = ('amount', 'source') if prepared else ('amount',)
        texts = [{name: value for name, value in text.items() if name not in others} for text in texts]
    if differences := sections.differences(names, texts):
        yield (
            f'Perplexities are not comparable. The runs differ in {differences}. Bits per byte may be, where the text '
            'of the evaluation is the same.'
        )


def _notes(runs):
    """What a reader should know of single runs."""
    for run in runs:
        evaluated, _ = run.last('eval/perplexity')
        if run.step != run.config.num_steps or evaluated != run.step:
            seen = 'not evaluated yet' if evaluated is None else f'evaluated at step {evaluated:,}'
            bad = f'; not finite from step {run.bad_step:,} on' if run.bad_step else ''
            yield f'{run.name} is unfinished: step {run.steps}, {seen}{bad}.'
    unknown = [run for run in runs if not run.text]
    if unknown and len(runs) > 1:
        yield f'Not known, as environment.json does not say it: what text {sections.listed(unknown)} saw.'


def markdown(head, rows):
    """Lines of a table in markdown, columns aligned."""
    head, *rows = [[escaped(text) for text in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ['-' * width for width in widths], *rows]
    return [
        '| ' + ' | '.join(f'{text:<{width}}' for text, width in zip(line, widths, strict=True)) + ' |' for line in lines
    ]


def escaped(text):
    """A text in markdown that shows it as it is: names and values make no links, tags, code or lines of their own."""
    text = html.escape(re.sub(r'\s+', ' ', text), quote=False)
    return re.sub(r'[\\`*|~\[\]@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.', r'\\\g<0>', text, flags=re.IGNORECASE)


def _paragraph(text):
    """The same of a text on a line of its own, which begins no heading or list; `code` between backticks stays code."""
    parts = re.split('`([^`]+)`', text.strip())
    text = ''.join(f'`{part}`' if number % 2 else escaped(part) for number, part in enumerate(parts))
    return re.sub(r'^(#*|\d*)([#+.)-])(?= )', r'\1\\\2', re.sub(r'\s+', ' ', text))


def document(title, lead, sections):
    """The sections in markdown, without figures, a text."""

    def lines(section, level):
        yield from (f'{"#" * level} {escaped(section.heading)}', '')
        for text in section.warnings:
            yield from (f'**Warning.** {_paragraph(text)}', '')
        for text in (*section.texts, *section.notes):
            yield from (_paragraph(text), '')
        for table in section.tables:
            yield from (f'{escaped(table.caption)}:', '', *markdown(table.head, table.rows), '')
        for part in section.parts:
            yield from lines(part, level + 1)

    every = itertools.chain.from_iterable(lines(section, 2) for section in sections)
    return '\n'.join([f'# {escaped(title)}', '', _paragraph(lead), '', *every])


def write(runs, compared, out):
    """Writes report.html and report.md into the folder `out`; their paths.

    Raises UsageError where another process does, or where files of these names are no reports.
    """
    title = 'Runs side by side' if len(runs) > 1 else f'The run {runs[0].name}'
    lead = f'{sections.listed(runs)}: perplexity, settings, training, and what each layer does ({COMMAND}).'
    pages = out / 'report.html', out / 'report.md'
    with outputs.writing_into(out):  # or it would be found out after drawing
        for path in pages:
            if os.path.lexists(path) and not (path.is_file() and COMMAND.encode() in paths.read(path, UsageError)):
                raise UsageError(f'--out {out}: {path.name} is there already and is no report; take another folder')
        said = sections.compose(runs, compared)
        colours = {run.name: drawing.look({'colour': run.colour}, 0)[0] for run in runs}
        texts = page.render(title, lead, said, colours), document(title, lead, said)
        for path, text in zip(pages, texts, strict=True):
            record.write(path, text.encode(errors='backslashreplace'))
    return pages


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m mixln_jax.report', description=__doc__, allow_abbrev=False)
    parser.add_argument('runs', nargs='+', metavar='DIR', help='work directory of a run; other folders are skipped')
    parser.add_argument('--out', metavar='FOLDER', default='report', help='for report.html and report.md [report]')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def job():
        options = exits.parse(parser, argv)
        out = outputs.place(options.out)
        runs, problems, others = read(options.runs)
        skipped = f'{", ".join(others)} (no config.json of a run)'
        if runs:
            compared = overview(runs)
            [table] = compared.tables
            record.say(*markdown(table.head, table.rows), '', *compared.notes)
            try:
                written = [pathlib.Path(options.out, path.name) for path in write(runs, compared, out)]
                record.say(f'wrote {" and ".join(map(str, written))}')
            except UsageError as problem:
                problems.append(problem)
            for warning in compared.warnings:
                record.say(f'mixln_jax: warning: {warning}', file=sys.stderr)
            if others:
                record.say(f'mixln_jax: skipped {len(others)} that are no runs: {skipped}', file=sys.stderr)
        elif others:
            problems.append(UsageError(f'nothing here is a run: {skipped}'))
        for problem in problems[:-1]:
            record.say(f'mixln_jax: {problem}', file=sys.stderr)
        if problems:
            raise problems[-1]

    return exits.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

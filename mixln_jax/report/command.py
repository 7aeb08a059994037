"""Compares runs with each other and with the papers: `python -m mixln_jax.report DIR ...`

Prints a table in markdown and writes report.html, one page with all figures in it, and report.md, its tables.
"""

import argparse
import os
import pathlib
import sys

from mixln_jax.report import page, sections, style
from mixln_jax.report.inputs import read
from mixln_jax.report.markdown import COMMAND, document, markdown
from mixln_jax.report.overview import overview
from mixln_jax.system import cli, console, files, outputs
from mixln_jax.system.errors import UsageError


def write(runs, compared, out):
    """Writes report.html and report.md into the folder `out`; their paths.

    Raises UsageError where another process does, or where files of these names are no reports.
    """
    title = 'Runs side by side' if len(runs) > 1 else f'The run {runs[0].name}'
    lead = f'{sections.listed(runs)}: perplexity, settings, training, and what each layer does ({COMMAND}).'
    pages = out / 'report.html', out / 'report.md'
    with outputs.writing_into(out):  # or it would be found out after drawing
        for path in pages:
            if os.path.lexists(path) and not (path.is_file() and COMMAND.encode() in files.read(path, UsageError)):
                raise UsageError(f'--out {out}: {path.name} is there already and is no report; take another folder')
        said = sections.compose(runs, compared)
        colours = {run.name: style.look({'colour': run.colour}, 0)[0] for run in runs}
        texts = page.render(title, lead, said, colours), document(title, lead, said)
        for path, text in zip(pages, texts, strict=True):
            outputs.write(path, text.encode(errors='backslashreplace'))
    return pages


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m mixln_jax.report', description=__doc__, allow_abbrev=False)
    parser.add_argument('runs', nargs='+', metavar='DIR', help='work directory of a run; other folders are skipped')
    parser.add_argument('--out', metavar='FOLDER', default='report', help='for report.html and report.md [report]')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def job():
        options = cli.parse(parser, argv)
        out = outputs.resolve(options.out)
        runs, problems, others = read(options.runs)
        skipped = f'{", ".join(others)} (no config.json of a run)'
        if runs:
            compared = overview(runs)
            [table] = compared.tables
            console.say(*markdown(table.head, table.rows), '', *compared.notes)
            try:
                written = [pathlib.Path(options.out, path.name) for path in write(runs, compared, out)]
                console.say(f'wrote {" and ".join(map(str, written))}')
            except UsageError as error:
                problems.append(error)
            for warning in compared.warnings:
                console.say(f'mixln_jax: warning: {warning}', file=sys.stderr)
            if others:
                console.say(f'mixln_jax: warning: skipped {len(others)} that are no runs: {skipped}', file=sys.stderr)
        elif others:
            problems.append(UsageError(f'nothing here is a run: {skipped}'))
        for problem in problems[:-1]:
            console.say(f'mixln_jax: {problem}', file=sys.stderr)
        if problems:
            raise problems[-1]

    return cli.call(job, show_traceback='--traceback' in argv)

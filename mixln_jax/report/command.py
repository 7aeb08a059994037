"""Compares runs with each other and with papers: `python -m mixln_jax.report DIR ...`

Prints a table in markdown. Writes report.html, one page that contains all figures, and report.md, the tables.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from mixln_jax.report import page, sections, style
from mixln_jax.report.inputs import Run, headlines, labels, read
from mixln_jax.report.markdown import COMMAND, document, markdown
from mixln_jax.report.overview import overview
from mixln_jax.report.texts import listed
from mixln_jax.system import cli, console, files, outputs
from mixln_jax.system.errors import UsageError


def write(runs: Sequence[Run], comparison: page.Section, out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes report.html and report.md into the folder `out`; returns their paths.

    Raises:
        UsageError: another process writes there, or files with these names exist and are not reports.
    """
    title = 'Runs side by side' if len(runs) > 1 else f'The run {runs[0].name}'
    compared = labels(headlines(runs))
    lead = f'{listed(runs)}: {compared}, settings, training, and what each layer does ({COMMAND}).'
    paths = out / 'report.html', out / 'report.md'
    with outputs.writing_into(out):  # before the figures are drawn, so that a wrong folder costs no time
        for path in paths:
            if os.path.lexists(path) and not (path.is_file() and COMMAND.encode() in files.read(path, UsageError)):
                raise UsageError(f'--out {out}: {path.name} exists and is not a report; give another folder')
        content = sections.compose(runs, comparison)
        colours = {run.name: style.look({'colour': run.colour}, 0)[0] for run in runs}
        texts = page.render(title, lead, content, colours), document(title, lead, content)
        for path, text in zip(paths, texts, strict=True):
            outputs.write(path, text.encode(errors='backslashreplace'))
    return paths


def run(folders: Sequence[str], out_folder: str) -> None:
    """Prints the comparison and writes the report; raises the last problem after everything else is done."""
    out = outputs.resolve(out_folder)
    runs, problems, others = read(folders)
    skipped = f'{", ".join(others)} (no config.json of a run)'
    if runs:
        comparison = overview(runs)
        [table] = comparison.tables
        console.say(*markdown(table.head, table.rows), '', *comparison.notes)
        try:
            written = [pathlib.Path(out_folder, path.name) for path in write(runs, comparison, out)]
            console.say(f'wrote {" and ".join(map(str, written))}')
        except UsageError as error:
            problems.append(error)
        for warning in comparison.warnings:
            console.say(f'mixln_jax: warning: {warning}', file=sys.stderr)
        if others:
            console.say(f'mixln_jax: warning: skipped {len(others)} that are not runs: {skipped}', file=sys.stderr)
    elif others:
        problems.append(UsageError(f'no folder is a run: {skipped}'))
    for problem in problems[:-1]:
        console.say(f'mixln_jax: {problem}', file=sys.stderr)
    if problems:
        raise problems[-1]


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m mixln_jax.report', description=__doc__, allow_abbrev=False)
    parser.add_argument('runs', nargs='+', metavar='DIR', help='work directory of a run; other folders are skipped')
    parser.add_argument('--out', metavar='FOLDER', default='report', help='for report.html and report.md [report]')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def job() -> None:
        options = cli.parse(parser, argv)
        run(options.runs, options.out)

    return cli.call(job, show_traceback='--traceback' in argv)

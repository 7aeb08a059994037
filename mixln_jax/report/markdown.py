"""A report as markdown."""

import html
import itertools
import re
from collections.abc import Iterator, Sequence

from mixln_jax.report.page import Section

COMMAND = 'python -m mixln_jax.report'  # every report contains it


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in markdown, with aligned columns."""
    head, *rows = [[escaped(text) for text in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ['-' * width for width in widths], *rows]
    return [
        '| ' + ' | '.join(f'{text:<{width}}' for text, width in zip(line, widths, strict=True)) + ' |' for line in lines
    ]


def escaped(text: str) -> str:
    """Returns markdown that shows a text as it is, in one line: names and values make no links, tags or code."""
    text = html.escape(re.sub(r'\s+', ' ', text), quote=False)
    return re.sub(r'[\\`*|~\[\]@]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.', r'\\\g<0>', text, flags=re.IGNORECASE)


def _paragraph(text: str) -> str:
    """Returns markdown of a text on a line of its own, which is no heading or list; `code` in backticks stays code."""
    parts = re.split('`([^`]+)`', text.strip())
    text = ''.join(f'`{part}`' if number % 2 else escaped(part) for number, part in enumerate(parts))
    return re.sub(r'^(#*|\d*)([#+.)-])(?= )', r'\1\\\2', re.sub(r'\s+', ' ', text))


def document(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Returns the report in markdown, without its figures."""

    def lines(section: Section, level: int) -> Iterator[str]:
        yield from (f'{"#" * level} {escaped(section.heading)}', '')
        for text in section.warnings:
            yield from (f'**Warning.** {_paragraph(text)}', '')
        for text in (*section.texts, *section.notes):
            yield from (_paragraph(text), '')
        for table in section.tables:
            yield from (f'{escaped(table.caption)}:', '', *markdown(table.head, table.rows), '')
        for part in section.parts:
            yield from lines(part, level + 1)

    body = itertools.chain.from_iterable(lines(section, 2) for section in sections)
    return '\n'.join([f'# {escaped(title)}', '', _paragraph(lead), '', *body])

"""The report as markdown."""

import html
import itertools
import re

COMMAND = 'python -m mixln_jax.report'  # stands in every report


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

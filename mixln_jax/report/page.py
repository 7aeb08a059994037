"""A report as one self-contained HTML page: text, tables, and figures as SVG. No scripts; nothing is fetched."""

import base64
import dataclasses
import html
import re
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from mixln_jax.report import figures

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --paper: #fff; --card: #f6f8fa;
  --link: #0969da }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #373e47; --paper: #14181d; --card: #1d232a;
    --link: #6cb2ff }
}
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
header, main { max-width: 1180px; margin: 0 auto; padding: 0 20px }
header { padding-top: 28px }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; margin: 0 0 8px }
h2 { font-size: 1.25rem; margin: 0 0 8px }
h3 { font-size: 1rem; margin: 20px 0 8px }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 0; padding: 0; list-style: none }
a { color: var(--link) }
section { padding: 24px 0 8px; margin-top: 20px; border-top: 1px solid var(--line) }
section section { border: 0; padding: 0; margin: 0 }
p { max-width: 75ch; margin: 0 0 8px; overflow-wrap: anywhere }
p.note { color: var(--soft); font-size: .87rem; margin-bottom: 2px; max-width: 110ch }
p.warning { border-left: 3px solid #d4a72c; padding-left: 10px; max-width: 110ch }
code { font: .87em ui-monospace, monospace; background: var(--card); padding: 1px 4px; border-radius: 4px }
.grid { display: grid; gap: 16px; margin: 16px 0 }
.grid { grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)) }
.grid.pairs { max-width: 876px }
figure { margin: 0; min-width: 0; max-width: 430px }
figure.wide { grid-column: 1 / -1; max-width: 860px }
.frame { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 10px; overflow-x: auto }
img { display: block; width: 100%; height: auto }
.wide img { min-width: 600px }
figcaption { color: var(--soft); font-size: .87rem; padding: 6px 2px 0 }
.scroll { overflow-x: auto; margin: 8px 0 16px; max-width: 100% }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums }
p.caption { margin: 16px 0 0 }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { font-weight: 600; white-space: nowrap }
td { white-space: nowrap; min-width: 3.5em }
.long { white-space: normal; overflow-wrap: anywhere; min-width: 18ch; max-width: 46ch }
th.long { max-width: 26ch }
@media (max-width: 600px) {
  tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 13ch; max-width: 18ch }
}
.number { text-align: right; white-space: nowrap }
.dot { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .45em }
.name { display: inline-block }
details { margin: 8px 0 12px }
summary { cursor: pointer; color: var(--soft); font-size: .87rem; padding: 4px 0 }
a:focus-visible, summary:focus-visible, .scroll:focus-visible, .frame:focus-visible { outline: 2px solid var(--link) }
"""
NUMERIC = re.compile(r'|-|not finite|[-+]?[\d.,]+(e[-+]?\d+)?( of [\d,]+| ± .*| \(.*%\))?')


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts; a `folded` table opens with a click."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure and a description of it for readers who cannot see it; a `wide` picture takes the whole width."""

    figure: Figure
    alt: str
    caption: str = ''
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """The content under a heading: texts (`code` in backticks), notes in a smaller font, pictures side by side,
    tables."""

    heading: str
    texts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    parts: 'tuple[Section, ...]' = ()  # sections below this one
    warnings: tuple[str, ...] = ()  # shown before all other texts


def without_empty_columns(
    head: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns (head, rows) of a table without the columns that have no content."""
    kept = [number for number, column in enumerate(zip(*rows, strict=True)) if not {*column} <= {'-', ''}]
    return tuple(head[number] for number in kept), [tuple(row[number] for number in kept) for row in rows]


def render(title: str, lead: str, sections: Sequence[Section], colours: Mapping[str, str]) -> str:
    """Returns the page as HTML.

    Args:
        title: the heading of the page.
        lead: the text below it.
        sections: the content.
        colours: {name of a run: CSS colour}. In a cell that names runs, each gets a dot in the colour of its lines.
    """
    links = ''.join(
        f'<li><a href="#{_anchor(section.heading)}">{_text(section.heading)}</a></li>' for section in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # or a browser would ask for one
        f'<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f'<header>\n<h1>{_text(title)}</h1>\n<p>{_text(lead)}</p>\n'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n</header>\n'
        f'<main>\n{"".join(_section(section, 2, colours) for section in sections)}</main>\n</body>\n</html>\n'
    )


def _section(section: Section, level: int, colours: Mapping[str, str]) -> str:
    id = f' id="{_anchor(section.heading)}"' if level == 2 else ''
    pictures = ''.join(map(_picture, section.pictures))
    pairs = ' pairs' if len(section.pictures) in (2, 4) else ''  # two rows of two, not three and one
    return (
        f'<section{id}>\n<h{level}>{_text(section.heading)}</h{level}>\n'
        + ''.join(f'<p class="warning"><strong>Warning.</strong> {_coded(text)}</p>\n' for text in section.warnings)
        + ''.join(f'<p>{_coded(text)}</p>\n' for text in section.texts)
        + ''.join(f'<p class="note">{_coded(text)}</p>\n' for text in section.notes)
        + (f'<div class="grid{pairs}">\n{pictures}</div>\n' if pictures else '')
        + ''.join(_table(table, colours) for table in section.tables)
        + ''.join(_section(part, level + 1, colours) for part in section.parts)
        + '</section>\n'
    )


def _picture(picture: Picture) -> str:
    source = base64.b64encode(figures.svg(picture.figure)).decode()
    caption = f'<figcaption>{_text(picture.caption)}</figcaption>' if picture.caption else ''
    kind, focus = (' class="wide"', ' tabindex="0"') if picture.wide else ('', '')
    image = f'<img src="data:image/svg+xml;base64,{source}" alt="{_text(picture.alt)}">'
    return f'<figure{kind}><div class="frame"{focus}>{image}</div>{caption}</figure>\n'


def _table(table: Table, colours: Mapping[str, str]) -> str:
    numeric = [all(NUMERIC.fullmatch(text) for text in column) for column in zip(*table.rows, strict=True)]
    numeric[0] = False  # the first column names the rows

    def cell(tag: str, text: str, number: bool, scope: str = '') -> str:
        names = text.split(', ')
        if all(name in colours for name in names):
            dot = '<span class="dot" style="background:{}"></span>{}'
            parts = [dot.format(colours[name], _text(name)) for name in names]
            between = ',</span> <span class="name">'
            content = f'<span class="name">{between.join(parts)}</span>' if len(parts) > 1 else parts[0]
        else:
            content = _text(text)
        kinds = ['number'] * number + ['long'] * (len(text) > 24)
        attributes = (f' scope="{scope}"' if scope else '') + (f' class="{" ".join(kinds)}"' if kinds else '')
        return f'<{tag}{attributes}>{content}</{tag}>'

    head = ''.join(cell('th', text, number, 'col') for text, number in zip(table.head, numeric, strict=True))
    body = ''
    for first, *rest in table.rows:
        cells = ''.join(cell('td', text, number) for text, number in zip(rest, numeric[1:], strict=True))
        body += f'<tr>{cell("th", first, False, "row")}{cells}</tr>\n'
    whole = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.caption)}"><table>\n'
        f'<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'
    )
    if table.folded:
        return f'<details><summary>{_text(table.caption)}</summary>\n{whole}</details>\n'
    return f'<p class="note caption">{_text(table.caption)}</p>\n{whole}'


def _text(text: str) -> str:
    return html.escape(text)


def _coded(text: str) -> str:
    return re.sub(r'`([^`]*)`', r'<code>\1</code>', html.escape(text))


def _anchor(heading: str) -> str:
    return re.sub(r'\W+', '-', heading.lower())

"""Draws terminal output as an SVG: `COMMAND | python docs/terminal.py TITLE FILE.svg`."""

import pathlib
import re
import sys

from rich.console import Console

title, path = sys.argv[1:]
console = Console(record=True, width=88, file=sys.stderr)
console.print(sys.stdin.read().rstrip(), highlight=False, markup=False)
svg = console.export_svg(title=title)
pathlib.Path(path).write_text(
    re.sub(r'@font-face \{.*?\}\s*', '', svg, flags=re.DOTALL), 'utf-8'
)  # no fonts from elsewhere

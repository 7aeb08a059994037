"""The progress of a sweep as one table: redrawn in a terminal; a line for each change elsewhere, as in a log."""

import collections
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

from mixln_jax.runs import sweep_folder
from mixln_jax.sweeps.workers import Worker
from mixln_jax.system import console

EVERY = 1.0  # seconds between two tables
TAIL = 65536  # bytes at the end of metrics.jsonl that hold its last lines
ORDER = 'running', sweep_folder.FAILED, 'not finite', 'collapsed', 'pruned', 'done', 'elsewhere', 'stopped', 'waiting'


class Progress:
    """Shows the cells of a worker."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty() and os.environ.get('TERM') != 'dumb'
        self._height = 0  # lines of the table that is shown
        self._states: dict[str, str] = {}
        self._next = 0.0

    def __call__(self, worker: Worker) -> None:
        """Shows what has changed, at most once in EVERY seconds, and always once nothing runs any more."""
        if worker.running and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        states = cell_states(worker)
        if self._live:
            self._redraw(table(worker, states))
        else:
            for name, state in states.items():
                if state != self._states.get(name, 'waiting'):
                    console.say(f'{name}: {state}{_reason(worker, name)}')
            if states != self._states:
                console.say(counts(states))
        self._states = states

    def _redraw(self, lines: Sequence[str]) -> None:
        columns, rows = shutil.get_terminal_size()
        head, *cells, foot = (line[: columns - 1] for line in lines)
        room = max(1, rows - 4)
        if len(cells) > room:
            cells = [*cells[: room - 1], f'... and {len(cells) - room + 1} more'[: columns - 1]]
        shown = [head, *cells, foot]
        up = f'\033[{self._height}F\033[J' if self._height else ''
        console.say(up + '\n'.join(shown))
        self._height = len(shown)


def cell_states(worker: Worker) -> dict[str, str]:
    """Returns {name of a cell: one of ORDER}."""
    running = {one.cell.name for one in worker.running}
    states = {}
    for name in (cell.name for cell in worker.cells):
        ending = worker.endings[name]
        if name in running:
            states[name] = 'running'
        elif ending and (ending.is_result or not worker.is_open(name)):
            states[name] = ending.state
        else:
            states[name] = (
                'elsewhere' if name in worker.elsewhere else 'stopped' if name in worker.stopped else 'waiting'
            )
    return states


def counts(states: dict[str, str]) -> str:
    """Returns how many cells are in each state: `12 cells: 3 running, 9 waiting`."""
    number = collections.Counter(states.values())
    return f'{len(states)} cells: {", ".join(f"{number[state]} {state}" for state in ORDER if number[state])}'


def table(worker: Worker, states: dict[str, str]) -> list[str]:
    """Returns the lines of the table: a head, a line for each cell that is not waiting, and the counts."""
    rows = [('cell', 'state', 'step', 'loss', 'evaluated')]
    totals = {cell.name: cell.config.num_steps for cell in worker.cells}
    for name, state in sorted(states.items(), key=lambda item: ORDER.index(item[1])):
        if state != 'waiting':
            train, evaluated = last_lines(worker.job.folder / name)
            step = f'{train["step"]:,}/{totals[name]:,}' if train else '-'
            values = (_shown(train, 'train/loss'), _shown(evaluated, 'eval/loss'))
            rows.append((name, f'{state}{_reason(worker, name)}', step, *values))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ['  '.join(f'{text:<{width}}' for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, counts(states)]


def last_lines(run: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the newest metrics line of a run, and the newest one with an evaluation; {} where there is none. Reads
    the end of the file alone, and skips what is malformed: it is another process's that writes it."""
    newest: dict[str, Any] = {}
    try:
        with open(run / 'metrics.jsonl', 'rb') as file:
            file.seek(-min(TAIL, os.fstat(file.fileno()).st_size), os.SEEK_END)
            texts = file.read().splitlines()
    except OSError:
        return {}, {}
    for text in reversed(texts):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get('step'), int):
            newest = newest or line
            if 'eval/loss' in line:
                return newest, line
    return newest, {}


def _shown(line: dict[str, Any], key: str) -> str:
    value = line.get(key)
    return f'{value:.4f}' if isinstance(value, float) else '-'


def _reason(worker: Worker, name: str) -> str:
    """Returns why a cell has no result, or when it collapsed."""
    ending = worker.endings[name]
    if ending is None or name in {one.cell.name for one in worker.running}:
        return ''
    if ending.state == sweep_folder.FAILED:
        return f' ({ending.code}): {ending.line}'
    return f' at step {ending.step:,}' if ending.step is not None else ''

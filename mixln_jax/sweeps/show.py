"""`sweep --show DIR`: the results of a sweep so far, as tables, a figure and a CSV file with a row for each cell."""

import collections
import csv
import io
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mixln_jax.report import figures, inputs
from mixln_jax.report.inputs import Run
from mixln_jax.report.markdown import escaped, markdown
from mixln_jax.report.sensitivity import last_loss
from mixln_jax.report.sweeps import rate_picture, sweep_section
from mixln_jax.runs import sweep_cells, sweep_folder
from mixln_jax.runs.sweep_folder import Definition
from mixln_jax.system import console, files, outputs
from mixln_jax.system.errors import UsageError, reason

STATES = (*sweep_folder.RESULTS, sweep_folder.FAILED, 'running', 'interrupted', 'not begun')


def show(workdir: str) -> None:
    """Prints the results of a sweep and writes them into its folder `results`.

    Raises UsageError, before anything is shown, if there is no sweep or a cell was edited; and the last of the problems
    with analyses of single cells after the rest is shown.
    """
    folder = files.local(workdir, '--show')
    definition = read_sweep(folder, workdir)
    sweep_cells.check_unedited(folder, definition, definition.cells)
    runs, problems, _ = inputs.read([workdir])
    states = cell_states(folder, definition)
    by_name = {pathlib.Path(run.folder).name: run for run in runs}
    written = write(folder / sweep_folder.SHOWN, table(definition, states, by_name), runs)
    number = collections.Counter(states.values())
    shown = ', '.join(f'{number[state]} {state}' for state in STATES if number[state])
    console.say(f'{len(states)} cells of {definition.config}: {shown}', '')
    if section := sweep_section(runs):
        for one in section.tables:
            console.say(f'{escaped(one.caption)}:', '', *markdown(one.head, one.rows), '')
        console.say(*section.texts, *section.notes, '')
    console.say(f'wrote {", ".join(written)} into {workdir}/{sweep_folder.SHOWN}')
    for problem in problems[:-1]:
        console.say(f'mixln_jax: {problem}', file=sys.stderr)
    if problems:
        raise problems[-1]


def read_sweep(folder: pathlib.Path, workdir: str) -> Definition:
    """Returns the definition of the sweep in a folder, which was given as `workdir`. Raises UsageError if there is
    none, or if it is malformed."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f'--show {workdir} is a file; give the folder of the sweep')
    definition = sweep_folder.read_definition(folder)
    for name in (sweep_folder.CELLS, sweep_folder.SHOWN):
        sweep_folder.check_is_folder(folder / name)
    if definition is None and sweep_folder.recorded_cells(folder):
        raise UsageError(
            f'--show {workdir}: cells of a sweep are there, but {sweep_folder.DEFINITION} is missing; put it back, or '
            'give the training command again, which makes it anew and keeps the cells'
        )
    if definition is None:
        raise UsageError(f'--show {workdir}: no sweep is there ({sweep_folder.DEFINITION} is missing)')
    return definition


def write(out: pathlib.Path, text: str, runs: Sequence[Run]) -> list[str]:
    """Writes results.csv, whose content is `text`, and the figure of the runs, if they have one, into the folder `out`;
    returns the names of the files. Raises UsageError if they cannot be written."""
    try:
        outputs.write(out / 'results.csv', text.encode())
        picture = rate_picture(runs)
        if picture is None:
            return ['results.csv']
        figures.save(picture.figure, out, 'rates')
        return ['results.csv', 'rates.svg', 'rates.png']
    except OSError as error:
        raise UsageError(
            f'{error.filename2 or error.filename or out} cannot be written: {reason(error)}; remove or rename it'
        ) from None


def cell_states(folder: pathlib.Path, definition: Definition) -> dict[str, str]:
    """Returns {name of a cell: one of STATES}."""
    states = {}
    for name in definition.cells:
        ending = sweep_folder.read_ending(folder / name)
        states[name] = ending.state if ending else 'interrupted' if (folder / name).is_dir() else 'not begun'
        if ending is None and (lock := sweep_folder.cell_file(folder, name, '.lock')).exists():
            file = outputs.hold(lock)
            if file is None:
                states[name] = 'running'
            else:
                file.close()
    return states


def table(definition: Definition, states: Mapping[str, str], runs: Mapping[str, Run]) -> str:
    """Returns a CSV file with a row for each cell: its keys, how it ended and at which step, and its losses."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['cell', *definition.keys, 'state', 'ended_at', 'steps', 'eval_loss', 'eval_step', 'last_loss'])
    for name, state in states.items():
        values: Sequence[Any] = [definition.value(name, key) for key in definition.keys]
        run = runs.get(name)
        at, loss = run.last('eval/loss') if run else (None, None)
        ended_at = run.ending.step if run and run.ending else None
        last = last_loss(run) if run else None
        writer.writerow([name, *values, state, ended_at, run.step if run else 0, loss, at, last])
    return text.getvalue()

"""The section of a report that shows the classes of images that a network recognises least."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mixln_jax.report.inputs import Run
from mixln_jax.report.numbers import number
from mixln_jax.report.page import Section, Table

WORST, MOST = 10, 3  # classes of a run that are shown, and classes that each is taken for
HEAD = 'run', 'class', 'accuracy', 'images', 'most often taken for (images)'


def class_section(runs: Sequence[Run]) -> Section | None:
    """Returns the section of the classes with the lowest accuracy; None if they are known of no run."""
    rows = [row for run in runs for row in _rows(run)]
    if not rows:
        return None
    caption = f'The {WORST} classes of the lowest accuracy of each run, from classes.json in its folder'
    return Section('Classes', tables=(Table(caption, HEAD, rows),))


def _rows(run: Run) -> Iterator[tuple[str, ...]]:
    listed = run.classes.get('classes')
    classes = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
    known = [one for one in classes if np.isfinite([number(one.get('accuracy')), number(one.get('images'))]).all()]
    for one in sorted(known, key=lambda one: one['accuracy'])[:WORST]:
        accuracy = f'{one["accuracy"]:.{run.headline.digits}f}'
        yield run.name, f'{one.get("class", "-")}', accuracy, f'{one["images"]:,}', _mistakes(one.get('taken_for'))


def _mistakes(taken_for: Any) -> str:
    """Returns the classes that images of a class are most often taken for, each with their number."""
    counts = taken_for.items() if isinstance(taken_for, Mapping) else ()
    known = [(name, count) for name, count in counts if np.isfinite(number(count))]
    first = sorted(known, key=lambda pair: -pair[1])[:MOST]
    return ', '.join(f'{name} ({count:,})' for name, count in first) or '-'

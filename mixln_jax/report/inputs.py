"""The runs of a report, and the number by which they are compared."""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mixln_jax import config as configs
from mixln_jax.models import placements
from mixln_jax.report import style
from mixln_jax.report.numbers import number
from mixln_jax.report.results import ANALYSES, LARGEST, check_lines, read_content
from mixln_jax.runs import log, sweep_cells, sweep_folder, workdir
from mixln_jax.system import files
from mixln_jax.system.errors import CheckpointError, UsageError, reading
from mixln_jax.tasks.build import TASKS
from mixln_jax.tasks.task import Task

SEEDS = ('seed', 'data.seed')
# Where `evaluate --tasks --out` and, of images, `evaluate --out` put what a report shows.
TASK_RESULTS, CLASS_RESULTS = 'tasks.json', 'classes.json'


@dataclasses.dataclass(frozen=True)
class Headline:
    """The number by which runs are compared, as their task states it: the value of the last evaluation."""

    name: str  # in the results of analyses; in metrics.jsonl `eval/` stands before it
    lower_is_better: bool
    digits: int  # decimals that are shown

    @classmethod
    def of_task(cls, task: type[Task]) -> 'Headline':
        """Returns the headline of a task."""
        return cls(task.headline, task.headline in task.lower, task.digits)

    @property
    def key(self) -> str:
        """Its key in metrics.jsonl."""
        return f'eval/{self.name}'

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.name.replace('_', ' ')


@dataclasses.dataclass(eq=False)
class Run:
    """The content of a work directory."""

    folder: str  # as given
    config: configs.Config
    lines: list[dict[str, Any]]  # of metrics.jsonl
    environment: dict[str, Any]
    analyses: dict[str, dict[str, Any]]  # {job: content of its result.json}
    name: str
    colour: int
    tasks: dict[str, Any] = dataclasses.field(default_factory=dict)  # tasks.json, from `evaluate --tasks --out`
    classes: dict[str, Any] = dataclasses.field(default_factory=dict)  # classes.json, from `evaluate --out` of images
    debug: dict[str, Any] = dataclasses.field(default_factory=dict)  # debug/report.json, of a step that was not finite
    ending: sweep_folder.Ending | None = None  # of a cell of a sweep
    swept: dict[str, Any] = dataclasses.field(default_factory=dict)  # {key: value} that vary in the sweep of a cell

    @property
    def placement(self) -> str:
        """The placement of all layers, as `post x 1, pre x 2`."""
        model = self.config.model
        return placements.spelled(placements.resolve(model.norm_position, model.num_layers, model.post_ratio))

    @property
    def keys(self) -> dict[str, Any]:
        """{key: value} of the configuration, flat."""
        return configs.flatten(self.config)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The values of SEEDS."""
        return tuple(self.keys[name] for name in SEEDS)

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return self.lines[-1]['step'] if self.lines else 0

    @property
    def steps(self) -> str:
        """How many steps have been made, for people: `10`, or `5 of 10` while the run is unfinished."""
        last = self.config.num_steps
        return f'{self.step:,}' if self.step == last else f'{self.step:,} of {last:,}'

    @property
    def bad_step(self) -> int | None:
        """The step at which the run ended because a loss or gradient was not finite; None if none was."""
        step = number(self.debug.get('step'))
        return int(step) if self.step < step < LARGEST else None

    @property
    def text(self) -> dict[str, Any]:
        """A description of the text that the run reads and is evaluated on, {part: value}; {} if it is not known."""
        data, (_, tokens) = self.environment.get('data'), self.last('eval/tokens')
        if not isinstance(data, dict):
            return {}
        wanted = self.config.eval.tokens
        return data | {'split': self.config.eval.split, 'amount': min(wanted, tokens or wanted)}

    @property
    def reads_images(self) -> bool:
        """Whether the run learns from images, not from texts."""
        return TASKS[self.config.task.name].reads == 'images'

    @property
    def headline(self) -> Headline:
        """The number by which this run is compared with others."""
        return Headline.of_task(TASKS[self.config.task.name])

    @property
    def evaluation(self) -> tuple[int | None, float | None]:
        """(step, value) of the last evaluation, as `last` returns them."""
        return self.last(self.headline.key)

    def last(self, key: str) -> tuple[int | None, float | None]:
        """Returns (step, value) of the newest value of a metric, nan if it is not finite; (None, None) if it was never
        logged."""
        line = next((line for line in reversed(self.lines) if key in line), None)
        return (line['step'], number(line[key])) if line else (None, None)

    def results(self, job: str) -> list[dict[str, Any]]:
        """Returns the results of an analysis, ordered by step, labelled with the run's name and colour.

        `checkpoint_label` is the label that the analysis gave, `headline` the name of the run's headline metric.
        """
        own = {'label': self.name, 'colour': self.colour, 'headline': self.headline.name}
        labelled = [
            {**result, 'checkpoint_label': result.get('label'), **own} for result in self.analyses[job]['results']
        ]
        return sorted(labelled, key=lambda result: -1 if result.get('step') is None else result['step'])


def known_headlines() -> list[Headline]:
    """Returns the headlines of all tasks, in the order of TASKS."""
    return list(dict.fromkeys(map(Headline.of_task, TASKS.values())))


def headlines(runs: Sequence[Run]) -> list[Headline]:
    """Returns the headlines of those runs that were evaluated, or of all runs if none was; in the order of TASKS."""
    evaluated = [run for run in runs if run.evaluation[0] is not None]
    present = {run.headline for run in evaluated or runs}
    return [one for one in known_headlines() if one in present]


def labels(several: Sequence[Headline]) -> str:
    """Returns the labels of headlines for a sentence: `perplexity and accuracy`."""
    return ' and '.join(one.label for one in several)


def read(folders: Iterable[str]) -> tuple[list[Run], list[Exception], list[str]]:
    """Reads work directories, and all cells in the folders of sweeps; a problem in one of them hides no other.

    Returns:
        The runs, the problems (UsageError, CheckpointError), and the folders that are not runs at all.
    """
    runs: list[Run] = []
    problems: list[Exception] = []
    others: list[str] = []
    by_path = {
        pathlib.Path(os.path.realpath(files.local(folder, ''))): (folder, swept)
        for folder, swept in _cells(folders, problems)
    }
    for path, (folder, swept) in by_path.items():
        try:
            if not _is_run(path):
                others.append(folder)
                continue
            run = _read_run(path, folder, len(runs))
            run.swept = swept
        except (UsageError, CheckpointError) as problem:
            problems.append(problem)
            continue
        runs.append(run)
        problems += _read_analyses(run, path)
    for run, name in zip(runs, workdir.short_names([run.folder for run in runs]), strict=True):
        run.name = name
    _assign_colours(groups(runs))
    return runs, problems, others


def _cells(folders: Iterable[str], problems: list[Exception]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (folder, {}) and, in place of the folder of a sweep, those of its cells that were begun and not edited,
    with what was swept."""
    for folder in folders:
        path = files.local(folder, '')
        try:
            definition = sweep_folder.read_definition(path) if path.is_dir() else None
        except UsageError as problem:
            problems.append(problem)
            continue
        if definition is None:
            yield folder, {}
            continue
        for name in definition.cells:
            try:
                sweep_cells.check_unedited(path, definition, [name])
            except UsageError as problem:
                problems.append(problem)
                continue
            if (path / name).is_dir():
                yield f'{folder}/{name}', {key: definition.value(name, key) for key in definition.keys}


def _read_run(path: pathlib.Path, folder: str, colour: int) -> Run:
    """Returns the run in a folder, without its analyses. Raises UsageError and CheckpointError."""
    config, metrics = configs.read(path / 'config.json'), path / 'metrics.jsonl'
    lines = log.read_metrics(metrics)
    with reading(metrics, CheckpointError):
        check_lines(metrics, lines)
    run = Run(folder, config, lines, {}, {}, '', colour)
    try:
        _ = run.placement
    except UsageError as error:
        raise UsageError(f'{path / "config.json"}: {error}') from None
    return run


def _read_analyses(run: Run, path: pathlib.Path) -> list[Exception]:
    """Adds environment, debug report and analyses to a run; returns the problems in these files."""
    problems: list[Exception] = []
    for attribute, name in (
        ('environment', 'environment.json'),
        ('debug', 'debug/report.json'),
        ('tasks', TASK_RESULTS),
        ('classes', CLASS_RESULTS),
    ):
        try:
            setattr(run, attribute, read_content(path / name) or {})
        except CheckpointError as problem:
            problems.append(problem)
    try:
        run.ending = sweep_folder.read_ending(path)
    except UsageError as problem:
        problems.append(problem)
    for job in ANALYSES:
        try:
            if content := read_content(path / f'analysis/{job}/result.json', job):
                run.analyses[job] = content
        except CheckpointError as problem:
            problems.append(problem)
    return problems


def _is_run(path: pathlib.Path) -> bool:
    """Returns whether a folder has the config.json of a run, even a damaged one. Hugging Face folders have a
    config.json too. Raises UsageError if the folder does not exist."""
    try:
        return 'model' in files.read_json(path / 'config.json', UsageError)
    except FileNotFoundError:
        if path.exists():
            return False
        raise UsageError(f'there is no {path / "config.json"}') from None
    except UsageError:
        return not path.is_file()


def groups(runs: Iterable[Run]) -> list[list[Run]]:
    """Returns the runs in groups, the best headline first.

    The runs of a group differ in seeds alone and have made equally many steps.
    """
    grouped: dict[str, list[list[Run]]] = {}
    for run in runs:
        step, value = run.evaluation
        settings = {name: value for name, value in run.keys.items() if name not in SEEDS}
        alike = [run.step, step, run.headline.key, run.text, settings]
        known = value is not None and np.isfinite(value)
        candidates = grouped.setdefault(json.dumps(alike if known else run.name), [])
        # The same seeds again are not a further sample.
        group = next((group for group in candidates if run.seeds not in [other.seeds for other in group]), None)
        group.append(run) if group else candidates.append([run])
    return sorted(itertools.chain(*grouped.values()), key=_rank)


def _rank(group: Sequence[Run]) -> tuple[int, int, float]:
    """Returns the key by which groups are sorted: those that were never evaluated are last."""
    best = group[0].headline
    values = [value for run in group if (value := run.evaluation[1]) is not None]
    if len(values) < len(group):
        return 2, 0, 0
    mean = float(np.mean(values))
    if not np.isfinite(mean):
        return 1, 0, 0
    return 0, known_headlines().index(best), mean if best.lower_is_better else -mean


def _assign_colours(grouped: Sequence[Sequence[Run]]) -> None:
    """Gives the runs of a group one colour, and each a dash of its own, if there are enough of both."""
    if len(grouped) <= len(style.COLOURS) and max(map(len, grouped), default=0) <= len(style.DASHES):
        for colour, group in enumerate(sorted(grouped, key=lambda group: group[0].colour)):
            for dash, run in enumerate(group):
                run.colour = colour + dash * len(style.COLOURS)

"""Search over ranges with Optuna: which values the next cell has, and which cells are not worth their end.

The folder of the sweep is all that workers share: the study is made anew from it, so nothing else can be lost or
disagree. What a search proposes depends on what has ended by then, so it cannot be repeated exactly; each cell can.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from mixln_jax import config as configs
from mixln_jax.report.inputs import Headline
from mixln_jax.report.numbers import number
from mixln_jax.runs import log, sweep_cells, sweep_folder
from mixln_jax.runs.sweep_folder import Definition
from mixln_jax.sweeps import definition as definitions
from mixln_jax.sweeps.grid import Cell, Pairs, make_cell, name_cells, parse_values
from mixln_jax.sweeps.progress import Progress
from mixln_jax.sweeps.workers import Job, Worker
from mixln_jax.system.cli import finite, integer
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks.build import TASKS

DIGITS = 4  # significant ones of a float that is proposed
ATTEMPTS = 50  # to propose values that no cell has yet


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool  # whether every decade is as likely as any other


Space = dict[str, Range | list[str]]  # {key: a range, or values to choose from}


def import_optuna() -> Any:
    """Returns the module optuna, which prints nothing. Raises UsageError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise UsageError('--search optuna needs a package that is not installed: pip install optuna') from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def parse_space(groups: Sequence[Sequence[str]]) -> Space:
    """Returns the space of the words of each `--over`. Raises UsageError, naming the word, if one is malformed."""
    space: Space = {}
    for word in itertools.chain(*groups):
        key, values = parse_values(word)
        if key in space:
            raise UsageError(f'--over: {key} is given twice')
        space[key] = _range(word, values[0]) if len(values) == 1 else values
    if not space:
        raise UsageError('--search optuna needs --over KEY=LOW..HIGH, KEY=log:LOW..HIGH or values to choose from')
    return space


def _range(word: str, text: str) -> Range:
    scale, colon, ends = text.rpartition(':')
    low, dots, high = ends.partition('..')
    try:
        found = Range(finite(low), finite(high), scale == 'log')
    except ValueError:
        dots = ''
    if not dots or (colon and scale != 'log'):
        raise UsageError(f'--over {word!r}: a search needs KEY=LOW..HIGH, KEY=log:LOW..HIGH or several values')
    if not found.low < found.high:
        raise UsageError(f'--over {word!r}: {low} is not below {high}')
    if found.log and found.low <= 0:
        raise UsageError(f'--over {word!r}: a logarithmic range begins above 0')
    return found


def distributions(optuna: Any, space: Space) -> dict[str, Any]:
    """Returns Optuna's distributions of a space. Raises UsageError for a range of a key that is not a number."""
    kinds = {path: field.type for path, field in configs.all_fields()}
    made = {}
    for key, values in space.items():
        if not isinstance(values, Range):
            made[key] = optuna.distributions.CategoricalDistribution(values)
        elif kinds.get(key) is int:
            if not (values.low.is_integer() and values.high.is_integer()):
                raise UsageError(f'--over {key}={values.low:g}..{values.high:g}: whole numbers are needed')
            ends = int(values.low), int(values.high)
            made[key] = optuna.distributions.IntDistribution(*ends, log=values.log)
        elif kinds.get(key, float) is float:  # an unknown key is refused with its first cell
            made[key] = optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)
        else:
            raise UsageError(f'--over {key}={values.low:g}..{values.high:g}: config.{key} is not a number')
    return made


def check_ends(recipe: str, fixed: Pairs, space: Space) -> Cell:
    """Returns a cell of a space. Raises UsageError if an end of a range, or a value to choose, cannot be used."""
    distributions(import_optuna(), space)
    columns = [
        [f'{values.low:g}', f'{values.high:g}'] if isinstance(values, Range) else values for values in space.values()
    ]
    rows = (tuple(column[row % len(column)] for column in columns) for row in range(max(map(len, columns))))
    cells = [make_cell(recipe, fixed, tuple(zip(space, row, strict=True)), 'cell') for row in rows]
    return cells[0]


class Search(Worker):
    """A worker that trains what Optuna proposes until the sweep has `trials` cells, and stops cells that are worse at
    an evaluation than most others were."""

    def __init__(self, job: Job, first: Definition, space: Space, trials: int, parallel: int) -> None:
        """`first` is the definition without cells."""
        super().__init__(job, [], parallel, self._look)
        self.trials, self._first, self._progress = trials, first, Progress()
        self._optuna = import_optuna()
        self._space = distributions(self._optuna, space)
        self._headline = Headline.of_task(TASKS[first.fixed['task.name']])
        self._seen: dict[str, int] = {}  # {cell: its last evaluation at the last look}
        with definitions.opened(job.folder) as old:
            merged, _ = definitions.merge(job.folder, old, first)
            if merged != old:
                sweep_folder.write_definition(job.folder, merged)
            self._take_over(merged)
            sweep_cells.check_unedited(job.folder, merged, merged.cells)
        self.remember()

    def _take_over(self, definition: Definition) -> None:
        """Adds cells that other workers have proposed."""
        known = {cell.name for cell in self.cells}
        for name, values in definition.cells.items():
            if name not in known:
                own = tuple((key, f'{value}') for key, value in values.items())
                self.cells.append(make_cell(self.job.recipe, self.job.fixed, own, name))
                self.endings[name] = sweep_folder.read_ending(self.job.folder / name)

    def fill(self) -> None:
        """Starts cells that were proposed before and are free, then new ones."""
        super().fill()
        while len(self.running) < len(self.devices) and self._propose():
            super().fill()

    def _propose(self) -> bool:
        """Adds a cell to the sweep; returns whether it did, or another worker has."""
        with definitions.opened(self.job.folder) as old:
            assert old, 'this worker has written it'
            before = len(self.cells)
            self._take_over(old)
            if len(self.cells) > before or len(old.cells) >= self.trials:
                return len(self.cells) > before
            cell = self._untried(old)
            if cell is None:
                return False
            cells = old.cells | {cell.name: _only(cell, old.keys)}
            sweep_folder.write_definition(self.job.folder, dataclasses.replace(old, cells=cells))
        self.cells.append(cell)
        self.endings[cell.name] = None
        return True

    def _untried(self, definition: Definition) -> Cell | None:
        """Returns a cell with values that no other has; None if none is found."""
        study, tried = self.study(definition), [*definition.cells.values()]
        for _ in range(ATTEMPTS):
            proposed = study.ask(self._space).params
            own = tuple((key, f'{self._rounded(key, proposed[key])}') for key in definition.keys)
            cell = make_cell(self.job.recipe, self.job.fixed, own, name_cells([own])[0])
            if _only(cell, definition.keys) not in tried:
                return cell
        return None

    def _rounded(self, key: str, value: Any) -> Any:
        """Returns a value with few digits, so that its name tells it whole."""
        if not isinstance(value, float):
            return value
        ends = self._space[key]
        return min(max(float(f'{value:.{DIGITS}g}'), ends.low), ends.high)

    def study(self, definition: Definition) -> Any:
        """Returns Optuna's study of all cells in the folder."""
        optuna, states = self._optuna, self._optuna.trial.TrialState
        direction = 'minimize' if self._headline.lower_is_better else 'maximize'
        study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(constant_liar=True))
        for name, values in definition.cells.items():
            ending = sweep_folder.read_ending(self.job.folder / name)
            evaluations = self._evaluations(name)
            state, value = states.RUNNING, None
            if ending and ending.code == 0 and evaluations:
                state, value = states.COMPLETE, [*evaluations.values()][-1]
            elif ending and ending.state in ('collapsed', 'not finite'):
                state, evaluations = states.PRUNED, {}  # without evaluations it counts as the worst
            elif ending:
                state = states.PRUNED if ending.state == 'pruned' else states.FAIL
            params = {key: self._as_proposed(key, value) for key, value in values.items()}
            study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=self._space, state=state, value=value, intermediate_values=evaluations
                )
            )
        return study

    def _as_proposed(self, key: str, value: Any) -> Any:
        """Returns the value of a cell as it is in the space: of values to choose from, the text that was given."""
        choices = getattr(self._space[key], 'choices', None)
        if choices is None:
            return value
        return next(text for text in choices if _same(text, value))

    def _evaluations(self, name: str) -> dict[int, float]:
        """Returns {step: headline} of the evaluations of a cell, step 0 apart."""
        lines = log.read_metrics(self.job.folder / name / 'metrics.jsonl')
        values = {line['step']: number(line[self._headline.key]) for line in lines if self._headline.key in line}
        return {step: value for step, value in values.items() if step and value == value}

    def _look(self, worker: Worker) -> None:
        """Stops the cells that are to be pruned, and shows all."""
        for one in worker.running:
            evaluations = self._evaluations(one.cell.name)
            last = max(evaluations, default=0)
            ended = last == one.cell.config.num_steps
            if last > self._seen.get(one.cell.name, 0) and not ended and not one.pruned:
                self._seen[one.cell.name] = last
                definition = sweep_folder.read_definition(self.job.folder)
                assert definition
                study = self.study(definition)
                trial = study.trials[list(definition.cells).index(one.cell.name)]
                if study.pruner.prune(study, trial):
                    one.pruned = True
                    one.stop()
        self._progress(worker)


def _only(cell: Cell, keys: Sequence[str]) -> dict[str, Any]:
    values = cell.values
    return {key: values[key] for key in keys}


def _same(text: str, value: Any) -> bool:
    """Returns whether a text that was given stands for the value of a cell."""
    if isinstance(value, bool):
        return (text.strip().lower() in ('true', '1', 'yes')) == value
    if isinstance(value, int | float):
        try:
            return (integer(text) if isinstance(value, int) else float(text)) == value
        except ValueError:
            return False
    return text == value

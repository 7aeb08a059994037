"""Loss against learning rate: what runs that differ in placement, learning rate and seeds say together.

The value of a run is min(its loss in the last evaluation, the loss at initialisation), as in Wortsman et al. 2023
(arXiv 2309.14322): a run that has diverged counts as untrained. A run that a collapse ended counts with its last
training loss, one that was not finite with the loss at initialisation. Learning-rate sensitivity (section 2 there) is
the mean of the values over the learning rates minus the smallest of them.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from mixln_jax import config as configs
from mixln_jax.report.inputs import SEEDS, Run
from mixln_jax.report.numbers import number

RATE = 'optim.learning_rate'
PLACEMENT = 'model.norm_position', 'model.post_ratio'
GUESSING = 'language', 'masked_language', 'instructions', 'classification'  # tasks that begin with about even guesses
Seeds = tuple[int, ...]
Estimate = tuple[float, float, int]  # mean, standard error (nan of a single value), number of values


@dataclasses.dataclass(frozen=True)
class Curve:
    """Runs that differ in learning rate and seeds alone, {(rate, seeds): run}; all of them have ended."""

    label: str
    runs: Mapping[tuple[float, Seeds], Run]

    @functools.cached_property
    def initial(self) -> float:
        """The loss at initialisation: as evaluated at step 0 (eval.first), else that of even guesses, log V; nan where
        neither is known."""
        lines = [run.lines[0] for run in self.runs.values() if run.lines and run.lines[0]['step'] == 0]
        measured = [loss for line in lines if math.isfinite(loss := number(line.get('eval/loss')))]
        config = next(iter(self.runs.values())).config
        if measured:
            return float(np.mean(measured))
        if config.task.name not in GUESSING:
            return math.nan
        return math.log(config.model.num_classes if config.task.name == 'classification' else config.model.vocab_size)

    @property
    def initial_is_measured(self) -> bool:
        """Whether some run has evaluated its initial weights."""
        return any(run.lines and run.lines[0]['step'] == 0 for run in self.runs.values())

    @functools.cached_property
    def values(self) -> dict[tuple[float, Seeds], float]:
        """{(rate, seeds): value of the run}, in nats; runs whose value is not known are missing."""
        known = {at: float(np.fmin(last_loss(run), self.initial)) for at, run in self.runs.items()}
        return {at: value for at, value in known.items() if math.isfinite(value)}

    @functools.cached_property
    def rates(self) -> list[float]:
        """The learning rates, ascending."""
        return sorted({rate for rate, _ in self.values})

    def values_at(self, rate: float) -> dict[Seeds, float]:
        """Returns {seeds: value} at a learning rate."""
        return {seeds: value for (own, seeds), value in self.values.items() if own == rate}

    def collapsed(self, rate: float) -> int:
        """Returns how many runs collapsed or were not finite at a learning rate."""
        return sum(own == rate and is_lost(run) for (own, _), run in self.runs.items())

    @functools.cached_property
    def best(self) -> float | None:
        """The learning rate of the smallest mean value, of those that have all seeds of the curve; None without any."""
        seeds = {seeds for _, seeds in self.values}
        whole = [rate for rate in self.rates if self.values_at(rate).keys() == seeds]
        return min(whole, key=lambda rate: estimate(self.values_at(rate).values())[0], default=None)

    @property
    def edge(self) -> str:
        """Which end of the rates the best one is, `highest swept` or `lowest swept`; '' if it is none of several."""
        if self.best is None or len(self.rates) < 2:
            return ''
        return {self.rates[0]: 'lowest swept', self.rates[-1]: 'highest swept'}.get(self.best, '')


def is_lost(run: Run) -> bool:
    """Returns whether a run collapsed or was not finite."""
    return bool(run.ending and run.ending.state in ('collapsed', 'not finite')) or run.bad_step is not None


def has_ended(run: Run) -> bool:
    """Returns whether a run was trained to its end, or has collapsed or was not finite."""
    return is_lost(run) or (run.ending is None or run.ending.state == 'done') and run.step == run.config.num_steps


def last_loss(run: Run) -> float:
    """Returns the loss of the last evaluation; if a collapse has ended the run, of its last step; nan if that is not
    finite or not known."""
    if run.step == run.config.num_steps:
        return number(run.last('eval/loss')[1])
    if run.ending and run.ending.state == 'collapsed':
        return number(run.last('train/loss')[1])
    return math.nan


def estimate(values: Iterable[float]) -> Estimate:
    """Returns mean, standard error and number of values."""
    listed = np.array([*values], float)
    error = listed.std(ddof=1) / math.sqrt(len(listed)) if len(listed) > 1 else math.nan
    return float(listed.mean()) if len(listed) else math.nan, float(error), len(listed)


def curves(runs: Sequence[Run]) -> list[Curve]:
    """Returns the curves of those runs that have ended, in the order of the runs."""
    ended = [run for run in runs if has_ended(run)]
    names = _settings(ended)
    grouped: dict[str, dict[tuple[float, Seeds], Run]] = {}
    swept: dict[str, str] = {}  # {label: with the placement as it was swept}
    for run in ended:
        parts = [f'{name.rpartition(".")[2]}={run.keys[name]}' for name in names if name not in PLACEMENT]
        placed = [run.placement] if PLACEMENT[0] in names or not parts else []
        label = ', '.join([*placed, *parts])
        words = [*(_placement_as_swept(run) for _ in placed), *parts]
        text = ', '.join(words) if all(words) else ''
        swept[label] = text if swept.get(label, text) == text else ''
        grouped.setdefault(label, {})[run.keys[RATE], run.seeds] = run
    clear = all(swept.values()) and len({*swept.values()}) == len(swept)
    return [Curve(swept[label] if clear else label, own) for label, own in grouped.items()]


def _placement_as_swept(run: Run) -> str:
    """Returns the placement of a run as it was swept, `mix` or `mix, post_ratio=0.5`; '' if it was not."""
    words = {name: run.swept[name] for name in PLACEMENT if name in run.swept}
    return ', '.join(f'{value}' if name == PLACEMENT[0] else f'post_ratio={value}' for name, value in words.items())


def _settings(runs: Sequence[Run]) -> list[str]:
    """Returns the keys in which runs differ, apart from learning rate, seeds, notes, and what changes no result."""
    free = {key for key in configs.may_change() if not key.startswith('eval.')}
    flat = [run.keys | {PLACEMENT[0]: run.placement, PLACEMENT[1]: None} for run in runs]
    names = flat[0] if flat else []
    return [name for name in names if name not in free | {RATE, *SEEDS} and len({f'{keys[name]}' for keys in flat}) > 1]


def common_rates(several: Sequence[Curve]) -> list[float]:
    """Returns the learning rates that all curves have."""
    return sorted(set.intersection(*({*curve.rates} for curve in several))) if several else []


def sensitivity(curve: Curve, rates: Sequence[float]) -> Estimate:
    """Returns the learning-rate sensitivity over `rates`, with its standard error over the seeds that have them all:
    mean over rates of the value, minus the smallest value (Wortsman et al. 2023)."""
    columns = [curve.values_at(rate) for rate in rates]
    seeds = [one for one in (columns[0] if len(rates) > 1 else ()) if all(one in column for column in columns)]
    table = np.array([[column[one] for column in columns] for one in seeds])
    return estimate(table.mean(1) - table.min(1) if len(table) else [])


def paired(one: Mapping[Seeds, float], other: Mapping[Seeds, float]) -> Estimate:
    """Returns the mean difference `other` - `one` over the seeds that both have."""
    return estimate(other[seeds] - value for seeds, value in one.items() if seeds in other)

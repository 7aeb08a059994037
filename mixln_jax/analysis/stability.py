"""Signs of a coming collapse, from the numbers of single steps and of metrics lines; no device is used."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

WINDOW = 1000  # steps whose mean and deviation a spike is measured by
FEWEST = 100  # steps before the first one that can be a spike
SIGMAS = 7.0
SMOOTH = 20  # steps over which a loss is averaged
NEAR = 0.05  # of the entropy: a loss so close to it has learned little more than frequencies
FEWEST_LINES = 5  # with a gradient ratio, before the first growth of it


class Spikes:
    """The spike score of a series: the share of its values that are at least SIGMAS standard deviations away from the
    mean of the WINDOW values before them.

    OLMo 2 (arXiv 2501.00656), section 3.1, after Karpathy; there the window includes the value. Values that have fewer
    than FEWEST before them are not counted.
    """

    def __init__(self, record: dict[str, Any] | None = None) -> None:
        """Starts anew, or where `record` ended."""
        record = record or {'window': [], 'judged': 0, 'spikes': 0}
        self.window = collections.deque[float](record['window'], WINDOW)
        self._judged, self._spikes = record['judged'], record['spikes']

    def add(self, value: float) -> None:
        """Takes the next value."""
        if len(self.window) >= FEWEST:
            window = np.array(self.window)
            self._judged += 1
            self._spikes += bool(abs(value - window.mean()) >= SIGMAS * window.std())
        self.window.append(value)

    def mean(self, count: int) -> float:
        """Returns the mean of the last `count` values, or of as many as there are; infinite without any."""
        return float(np.mean(list(self.window)[-count:])) if self.window else math.inf

    @property
    def score(self) -> float | None:
        """The share; None: no value was judged yet."""
        return self._spikes / self._judged if self._judged else None

    def record(self) -> dict[str, Any]:
        """Returns what continues the series, for a JSON file."""
        return {'window': list(self.window), 'judged': self._judged, 'spikes': self._spikes}


def growth(ratio: float, before: Sequence[float | None]) -> float | None:
    """Returns a gradient ratio over the median of those `before` it, or over 1 if that is larger; None: too few are
    known."""
    known = [value for value in before[-WINDOW:] if value is not None and math.isfinite(value)]
    return ratio / max(1.0, float(np.median(known))) if len(known) >= FEWEST_LINES else None


class Warned(NamedTuple):
    """The first line of a run at which the signs pointed to a coming collapse, and why."""

    step: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Rule:
    """When a sign points to a collapse: `reason` holds its value where `holds` is true of it, its largest value so far
    and the entropy distance, which is infinite where there is none."""

    holds: Callable[[float, float, float], bool]
    reason: str
    worst: Callable[[list[float]], float] = max  # of the values of all layers


RULES = {
    'stability/grad_ratio': Rule(
        lambda value, best, distance: value < 5e-3,
        'the gradient of the first layer is {:.2g} times that of the last one: it vanishes on its way back',
    ),
    'stability/grad_growth': Rule(
        lambda value, best, distance: value > 5,
        'the gradient of the first layer, over that of the last one, has grown to {:.2g} times its median: it explodes '
        'on its way back',
    ),
    'stability/grad_to_eps': Rule(
        lambda value, best, distance: value < 10,
        "the gradient of a layer is {:.2g} times Adam's epsilon (config.optim.eps), so the layer hardly moves",
        min,
    ),
    'stability/attention_logits': Rule(
        lambda value, best, distance: value > 100 and distance < NEAR,
        'an attention logit has grown to {:.3g}, and the loss is near that of the frequencies of tokens',
    ),
    'stability/entropy_distance': Rule(
        lambda value, best, distance: value < best - 0.1,
        'the loss rises to that of the frequencies of tokens; it is lower by {:.0%} of it, and was by 10 % more',
    ),
}


class Watch:
    """Tells from metrics lines, one after the other, whether a collapse is coming.

    The rule: one of RULES holds in LINES successive lines that have its sign, from step FIRST on. The thresholds were
    chosen on ten runs of 300 steps (docs/train.md has the table), six that trained and four that collapsed: LLaMAs of
    16 and 24 layers of width 48 on bytes, Pre-LN, Mix-LN and Post-LN, peak rates of 3e-3 to 1.5e-2.

    - `grad_ratio` < 0.005: at least 0.027 in those that trained; three that collapsed fell below it, two of them before
      the loss stood still.
    - `grad_to_eps` < 10: at least 1,500 in those that trained. Adam's updates shrink once gradients come near epsilon
      (Wortsman et al. 2023, arXiv 2309.14322, section 3.4).
    - `attention_logits` > 100, where Kimi K2 (arXiv 2507.20534), section 2.1, clips them, while the loss is within NEAR
      of the entropy: a Mix-LN network that collapsed. The logits alone are not enough: those of a Pre-LN network at too
      high a rate passed 700, and it still learned.
    - `entropy_distance` 0.1 below its best: a loss of C4 (entropy 7.3) that has risen from 3.5 to 4.2.

    A run that passes is not stable for that reason: collapses come from healthy losses, long after the warm-up.
    """

    LINES, FIRST = 2, 20

    def __init__(self) -> None:
        self.warned: Warned | None = None
        self._times, self._best = dict.fromkeys(RULES, 0), dict.fromkeys(RULES, -math.inf)

    def add(self, line: Mapping[str, Any]) -> Warned | None:
        """Takes the next line. Returns the warning if this is the line that gives it, else None."""
        if self.warned:
            return None
        distance = line.get('stability/entropy_distance')
        distance = math.inf if distance is None else distance
        for name, rule in RULES.items():
            values = line.get(name)
            known = [value for value in (values if isinstance(values, list) else [values]) if value is not None]
            if not known or line['step'] < self.FIRST:
                continue
            value = rule.worst(known)
            self._best[name] = max(self._best[name], value)
            self._times[name] = self._times[name] + 1 if rule.holds(value, self._best[name], distance) else 0
            if self._times[name] == self.LINES:
                self.warned = Warned(line['step'], rule.reason.format(value))
                return self.warned
        return None


def coming_collapse(lines: Iterable[Mapping[str, Any]]) -> Warned | None:
    """Returns the first warning in the metrics lines of a run; None: none of the signs has pointed to a collapse."""
    watch = Watch()
    return next(filter(None, map(watch.add, lines)), None)

"""A verdict on a run from its losses and the signs of its metrics lines; no device is used."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mixln_jax.analysis import stability
from mixln_jax.training.collapse import Collapse

STATES = COLLAPSED, DIVERGED, SIGNS, UNDECIDED, TRAINED = 'collapsed', 'diverged', 'signs', 'undecided', 'trained'
FALL = 0.1  # of the entropy: a network that was this much better than frequencies has learned something
LONGEST = 100  # steps near the frequencies, without progress, that make a collapse
PROGRESS = Collapse.PROGRESS  # of the entropy, from the first half of these steps to the second
DISTANCE = 'stability/entropy_distance'


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the lines of a run show.

    `state` is one of
    - collapsed: the loss stays near that of the frequencies of tokens,
    - diverged: it is not finite,
    - signs: signs point to a coming collapse (`stability.Watch`),
    - undecided: the lines end too early, or nothing was learned yet,
    - trained: as far as tried, which is after the warm-up at least as long again.
    """

    state: str
    step: int | None  # of the collapse, or of the warning; None of others
    reasons: tuple[str, ...]
    not_tried: tuple[str, ...] = ()

    def sentence(self) -> str:
        """Returns the verdict in a few words."""
        return {
            COLLAPSED: f'collapsed at step {self.step}',
            DIVERGED: f'not finite at step {self.step}',
            SIGNS: f'signs of a coming collapse from step {self.step} on',
            UNDECIDED: 'not decided',
            TRAINED: 'trained as far as tried',
        }[self.state]


def enough_steps(warmup: int) -> int:
    """Returns the steps after which a run can be said to have trained: the warm-up and as long again, or long enough
    for a collapse to be seen."""
    return warmup + max(warmup, 2 * LONGEST)


def judge(
    lines: Iterable[Mapping[str, Any]], warmup: int | None, entropy: float | None = None, planned: int | None = None
) -> Verdict:
    """Returns the verdict on the metrics lines of a run.

    Args:
        lines: with `step`, `train/loss` and any of `stability/*`, steps increasing; a loss of None is not finite.
        warmup: steps that warm up; None: not known.
        entropy: of the tokens, in nats, for lines without the entropy distance.
        planned: steps of the run that the verdict is asked for; None: not known.
    """
    made = [line for line in with_distances(lines, entropy) if 'train/loss' in line]
    if not made:
        return Verdict(UNDECIDED, None, ('there are no losses',))
    last = made[-1]['step']
    bad = next((line['step'] for line in made if line['train/loss'] is None), None)
    if bad is not None:
        return Verdict(DIVERGED, bad, (f'the loss of step {bad} is not finite',))
    found = _collapse(made, warmup)
    if found:
        return found
    if warned := stability.coming_collapse(made):
        after = [line[DISTANCE] for line in made if line['step'] > warned.step and line.get(DISTANCE) is not None]
        later = [f'the last loss is {_compared(after[-1])} that of the frequencies of tokens'] if after else []
        return Verdict(SIGNS, warned.step, (warned.reason, *later), _not_tried(last, planned))
    if reasons := _too_little(made[-1], warmup):
        return Verdict(UNDECIDED, None, reasons, _not_tried(last, planned))
    assert warmup is not None
    shown = f'{last - warmup:,} steps at the peak rate after a warm-up of {warmup:,}; loss {made[-1]["train/loss"]:.3g}'
    return Verdict(TRAINED, None, (f'{shown}, {made[-1][DISTANCE]:.0%} below that of the frequencies',),
                   _not_tried(last, planned))  # fmt: skip


def with_distances(lines: Iterable[Mapping[str, Any]], entropy: float | None) -> list[dict[str, Any]]:
    """Returns the lines; those without an entropy distance get that of the mean loss of the SMOOTH steps up to them."""
    made: list[dict[str, Any]] = []
    for line in lines:
        line = dict(line)
        if line.get('train/loss') is not None and not math.isfinite(line['train/loss']):
            line['train/loss'] = None
        made.append(line)
        if entropy and line.get(DISTANCE) is None and line.get('train/loss') is not None:
            first = line['step'] - stability.SMOOTH
            near = [one for one in made[-stability.SMOOTH :] if one['step'] > first]
            recent = [one['train/loss'] for one in near if one.get('train/loss') is not None]
            line[DISTANCE] = 1 - sum(recent) / len(recent) / entropy
    return made


def _collapse(lines: Sequence[Mapping[str, Any]], warmup: int | None) -> Verdict | None:
    """Returns the verdict if the lines end in a collapse.

    The last lines, LONGEST steps or more, are near the frequencies or worse, and in the second half of them (of their
    last LONGEST steps, if these are more) the mean is no better than before. A network that had not been better before
    is judged from the end of the warm-up on, and from where it first comes near.
    """
    known = [(line['step'], line[DISTANCE]) for line in lines if line.get(DISTANCE) is not None]
    start = 1 + max((number for number, (_, distance) in enumerate(known) if distance >= stability.NEAR), default=-1)
    stay, best = known[start:], max((distance for _, distance in known[:start]), default=-math.inf)
    if best < FALL:
        if warmup is None:
            return None
        stay = list(itertools.dropwhile(lambda one: one[0] <= warmup or one[1] < -stability.NEAR, stay))
    if len(stay) < 2 or stay[-1][0] - stay[0][0] < LONGEST or _progress(stay) >= PROGRESS:
        return None
    reason = 'the loss never was much better than that of the frequencies of tokens'
    if best >= FALL:
        step, distance = known[start - 1]
        mean = f'the loss (mean of up to {stability.SMOOTH} steps)'
        reason = (
            f'at step {step:,} {mean} was {distance:.0%} below that of the frequencies of tokens, at best {best:.0%}'
        )
    until = f'from step {stay[0][0]:,} to {stay[-1][0]:,} it is near that of the frequencies or above'
    return Verdict(COLLAPSED, stay[0][0], (reason, until))


def _progress(distances: list[tuple[int, float]]) -> float:
    """Returns how much the mean of the second half is better than that of the first, of a series of (step, entropy
    distance) without its beginning: the latter half of its steps, or LONGEST of them if these are more."""
    (first, _), (last, _) = distances[0], distances[-1]
    recent = [one for one in distances if one[0] >= last - max(LONGEST, (last - first) / 2)]
    recent = recent if len(recent) > 1 else distances[-2:]
    half = len(recent) // 2
    before, after = (sum(distance for _, distance in part) / len(part) for part in (recent[:half], recent[half:]))
    return after - before


def _too_little(line: Mapping[str, Any], warmup: int | None) -> tuple[str, ...]:
    """Returns why the lines up to `line` do not show that a run trains; empty: they do."""
    step, distance = line['step'], line.get(DISTANCE)
    reasons = []
    if warmup is None:
        reasons.append('the length of the warm-up is not known (--warmup N)')
    elif step < enough_steps(warmup):
        side = 'at' if step == warmup else f'{abs(step - warmup):,} steps {"after" if step > warmup else "before"}'
        reasons.append(
            f'the losses end at step {step:,}, {side} the end of the warm-up: collapses come at the full rate, from '
            f'healthy losses; needed are {enough_steps(warmup):,} steps'
        )
    if distance is None:
        reasons.append('the loss that frequencies of tokens alone give is not known (--entropy X)')
    elif distance < stability.NEAR:
        reasons.append(f'the loss is not yet {stability.NEAR:.0%} below that of the frequencies of tokens')
    return tuple(reasons)


def _compared(distance: float) -> str:
    return f'{abs(distance):.0%} {"below" if distance >= 0 else "above"}'


def _not_tried(last: int, planned: int | None) -> tuple[str, ...]:
    if planned is None:
        return (f'any step after {last:,}',)
    return (f'steps {last + 1:,} to {planned:,}',) if planned > last else ()

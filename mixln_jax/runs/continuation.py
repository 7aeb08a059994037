"""Whether a run may go on under another configuration, and from which of its checkpoints."""

import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.program import optim
from mixln_jax.runs.checkpoint_folders import steps
from mixln_jax.system import files
from mixln_jax.system.errors import UsageError

ANOTHER = 'give another --workdir'
# Keys of the length of a run and of its learning rates. They may change where the rates of all updates that are done
# stay as they were, and with `resume_from`.
SCHEDULE = frozenset(
    ('num_steps', 'num_epochs', 'optim.schedule', 'optim.min_ratio')
    + ('optim.warmup_ratio', 'optim.warmup_steps', 'optim.decay_ratio', 'optim.decay_steps')
)
Flat = dict[str, Any]  # a configuration with keys joined by dots


def check_same_run(
    source: object,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    way_out: str,
    also: Collection[str] = (),
) -> None:
    """Raises UsageError, naming the keys and the way out, if two resolved configurations are not of the same run.

    `source` is what holds the run of configuration `before`; `also` are further keys that may change.
    """
    old, new = _flat(before), configs.flatten(now)
    if differ := [f'{name} (was {old.get(name)}, is {new.get(name)})' for name in _differing(old, new, also)]:
        raise UsageError(f'{source} holds a run of another configuration: {", ".join(differ)}; {way_out}')


def check_continues(
    source: object, before: Mapping[str, Any], now: Mapping[str, Any], way_out: str, saved: Sequence[int]
) -> int | None:
    """Returns the step of the checkpoint from which a run goes on; None: its newest, as nothing has changed.

    A run may become longer if every update up to that checkpoint keeps its learning rate. This is the newest one or,
    where a run under wsd has begun to decay, the last one before.

    Args:
        source: what holds the run, for messages.
        before: its resolved configuration.
        now: the one under which it is to go on.
        way_out: for messages.
        saved: steps of its checkpoints, ascending.

    Raises:
        UsageError: it may not go on; the keys, or the first update whose rate would change, and the way out are named.
    """
    old, new = _flat(before), configs.flatten(now)
    differ = _differing(old, new)
    if not differ:
        return None
    if not saved or not SCHEDULE.issuperset(differ) or new['num_steps'] <= old['num_steps']:
        check_same_run(source, before, now, way_out)
    kept = _kept_updates(old, new, saved[-1])
    if step := _restart(old, kept, saved):
        return step
    warmup = _optim(old).warmup(old['num_steps'])
    keeping = new | {'optim.warmup_steps': warmup}
    if warmup and _restart(old, _kept_updates(old, keeping, saved[-1]), saved):
        out = f'config.optim.warmup_steps={warmup} keeps its warm-up'
    else:
        out = f'{way_out} with config.resume_from={source}, which may change the schedule'
    was, would_be = (float(rates(flat, kept, kept + 1)[0]) for flat in (old, new))
    raise UsageError(
        f'{source}: with config.num_steps={new["num_steps"]} (was {old["num_steps"]}) the learning rate of update '
        f'{kept + 1}, which is done, would be {would_be:.4g} (was {was:.4g}); {out}'
    )


def restart(workdir: pathlib.Path, now: Mapping[str, Any]) -> int | None:
    """Returns what `check_continues` does of a work directory; None also where it holds no run."""
    try:
        before = files.read_json(workdir / 'config.json', UsageError)
    except FileNotFoundError:
        return None
    saved = steps(workdir / 'checkpoints')
    return check_continues(workdir, before, now, ANOTHER, saved) if saved else None


def rates(flat: Mapping[str, Any], first: int, last: int) -> np.ndarray:
    """Returns the learning rates of updates `first` to `last - 1`, which count from 0; `flat` is a configuration."""
    schedule = optim.schedule(_optim(flat), flat['num_steps'], flat['compat'] != 'none')
    return np.asarray(jax.vmap(schedule)(jnp.arange(first, last)), np.float32)


def rates_around(step: int, before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[float, float] | None:
    """Returns the learning rates of update `step` before and of the next one now; None if the schedule is the same."""
    old, new = _flat(before), configs.flatten(now)
    if not SCHEDULE.intersection(_differing(old, new)) or step >= new['num_steps']:
        return None
    return float(rates(old, step - 1, step)[0]), float(rates(new, step, step + 1)[0])


def _flat(before: Mapping[str, Any]) -> Flat:
    return configs.flatten(configs.Config()) | configs.flatten(before)


def _optim(flat: Mapping[str, Any]) -> configs.Optim:
    return configs.Optim(**{name[6:]: value for name, value in flat.items() if name.startswith('optim.')})


def _differing(old: Flat, new: Flat, also: Collection[str] = ()) -> list[str]:
    """Returns the keys that differ and may not."""
    # The authors' loss, a mean of the micro-batches' means, depends on the number of micro-batches.
    may_change = configs.may_change() - ({'accumulate'} if new['compat'] != 'none' else set())
    names = (old | new).keys() - may_change - set(also)
    return sorted(name for name in names if old.get(name) != new.get(name))


def _kept_updates(old: Flat, new: Flat, number: int) -> int:
    """Returns how many of the first `number` updates come before the first one whose learning rate differs."""
    differ = np.flatnonzero(rates(old, 0, number) != rates(new, 0, number))
    return int(differ[0]) if len(differ) else number


def _restart(old: Flat, kept: int, saved: Sequence[int]) -> int | None:
    """Returns the checkpoint to go on from if the first `kept` updates keep their learning rates."""
    if saved[-1] <= kept:
        return saved[-1]
    warmup = _optim(old).warmup(old['num_steps'])
    on_plateau = [step for step in saved if warmup <= step <= kept]
    return on_plateau[-1] if on_plateau and old['optim.schedule'] == 'wsd' else None

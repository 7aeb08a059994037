"""The train step of a task that collects its batches: several updates by the same completions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax.program import step
from mixln_jax.program.step import State
from mixln_jax.tasks.task import Batch


def train_step(
    state: State,
    batch: Batch,
    *,
    task: Any,
    seed: int = 0,
    accumulate: int = 1,
    tune: configs.Tune = step.ALL,
    **options: Any,
) -> tuple[State, dict[str, jax.Array]]:
    """Returns the state after the `task.updates` updates of one step, and the means of their metrics.

    The step counts once, for the schedule and the random choices too; the optimiser counts updates. Log-probabilities
    before the updates come from the same forward pass as those in them. If one of the updates is not finite, all of
    them are undone.

    Args:
        state, batch, task, seed, accumulate, tune, options: as of `step.train_step`; `task` is a tasks.online.Online.
    """
    start = state.step
    compared = step.reference(task, state.network, state.reference)
    batch = recorded(state.network, batch, start, compared, task, seed, accumulate, tune.dropout)

    def update(state: State, _: Any) -> tuple[State, dict[str, jax.Array]]:
        after, metrics = step.train_step(
            dataclasses.replace(state, step=start),
            batch,
            task=task,
            seed=seed,
            accumulate=accumulate,
            tune=tune,
            **options,
        )
        return after.own, metrics

    if task.updates == 1:
        after, metrics = update(state, None)
        return after.with_fixed(state.fixed), metrics
    again = lambda own, _: update(own.with_fixed(state.fixed), None)  # noqa: E731
    after, metrics = jax.lax.scan(again, state.own, length=task.updates)
    bad_step = after.bad_step
    undone = dataclasses.replace(state.own, bad_step=bad_step)
    after = jax.tree.map(lambda new, old: jnp.where(bad_step == 0, new, old), after, undone)
    means = jax.tree.map(lambda values: values.mean(0), {name: metrics[name] for name in metrics if name != 'bad_step'})
    return after.with_fixed(state.fixed), means | {'bad_step': bad_step}


def recorded(
    network: Any,
    batch: Batch,
    updates_done: Any,
    reference: Any,
    task: Any,
    seed: int = 0,
    accumulate: int = 1,
    dropout: float = 0.0,
) -> Batch:
    """Returns the whole batch with what does not change in the updates, computed a micro-batch at a time."""

    def record(part: Batch) -> Batch:
        context = step.training_context(network, part, updates_done, reference, seed, dropout)
        return task.recorded(network, part, context)

    parts = jax.lax.map(record, step.micro_batches(batch, accumulate))
    whole = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1).reshape(-1, *a.shape[2:]), parts)
    return task.with_advantages(whole)

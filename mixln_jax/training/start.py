"""The state that a run begins with."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mixln_jax import config as configs
from mixln_jax.models import placements
from mixln_jax.program.program import Program
from mixln_jax.program.step import State
from mixln_jax.runs import checkpoint, continuation, weights
from mixln_jax.runs.continuation import ANOTHER, SCHEDULE, check_continues, check_same_run
from mixln_jax.system import console
from mixln_jax.system.errors import CheckpointError, UsageError
from mixln_jax.system.signals import Stop


def with_ramp_offset(config: configs.Config) -> configs.Config:
    """Returns the configuration with a number in place of `model.ramp_offset=auto`, if the network has a ramp.

    Raises UsageError or CheckpointError if `init_from` cannot be read.
    """
    model = config.model
    names = placements.resolve(model.norm_position, model.num_layers, model.post_ratio)
    if model.ramp_offset != 'auto' or not placements.has_ramp(names):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(model, ramp_offset=weights.ramp_offset(config)))


def with_num_steps(
    config: configs.Config, earlier: configs.Config | None, count_rows: Callable[[], int]
) -> configs.Config:
    """Returns the configuration with the number of steps that `num_epochs` makes: the last batch may begin one more.

    Args:
        config: has `num_epochs`.
        earlier: of the run that continues, whose number stays if its epochs are as many; None: none does.
        count_rows: returns the number of training rows.

    Raises UsageError: the number contradicts other keys.
    """
    if earlier and (earlier.num_epochs, earlier.batch_size) == (config.num_epochs, config.batch_size):
        return configs.with_num_steps(config, earlier.num_steps)
    return configs.with_num_steps(config, max(1, math.ceil(config.num_epochs * count_rows() / config.batch_size)))


def first_state(
    program: Program,
    resolved: dict[str, Any],
    checkpoints: checkpoint.Checkpoints,
    fingerprint: Mapping[str, Any],
    stop: Stop,
) -> tuple[State, dict[str, Any]]:
    """Returns the state to begin with and its JSON object.

    It is the newest good checkpoint, or else that of `resume_from`, or else a fresh state, with the weights of
    `init_from` if that is given.

    Raises UsageError if a checkpoint has seen other data or has another configuration.
    """
    config = program.config
    with stop.wait():  # an interrupted restore would look like damage
        restored, name, way_out, own = checkpoints.restore(program.state), 'checkpoint', ANOTHER, True
        if not restored and config.resume_from:
            name, way_out = f'config.resume_from={config.resume_from}: checkpoint', 'init_from takes its weights alone'
            restored, own = _resume_from(config, program.state), False
    if not restored:
        state = program.init(jax.random.key(config.seed))
        if config.init_from:
            params = weights.initial(config.init_from, program.model)
            state = state.with_params(_placed(params, program.state.params))
            console.say(f'mixln_jax: starts from the weights of {config.init_from}')
        return state, {'step': 0, 'tokens': 0, 'open_line': None}
    state, about = restored
    name = f'{name} {about["step"]}'
    if own:
        check_continues(name, about['config'], resolved, way_out, [about['step']])
    else:
        check_same_run(name, about['config'], resolved, way_out, SCHEDULE)
    differ = [
        f'data.fingerprint.{part}' for part, seen in about['data']['fingerprint'].items() if fingerprint[part] != seen
    ]
    if differ:
        raise UsageError(f'{name} has seen other data: {", ".join(differ)} differs; {way_out}')
    console.say(f'mixln_jax: goes on from step {about["step"]}')
    if not own and (rates := continuation.rates_around(about['step'], about['config'], resolved)):
        console.say(
            f'mixln_jax: the learning rate was {rates[0]:.4g} in update {about["step"]}, {rates[1]:.4g} comes next'
        )
    return state, about


def _resume_from(config: configs.Config, like: Any) -> tuple[State, dict[str, Any]]:
    """Returns (state, JSON object) of the checkpoint that `resume_from` names, which is not changed."""

    def read(folder: pathlib.Path) -> tuple[Any, dict[str, Any]]:
        with contextlib.closing(checkpoint.Checkpoints(folder.parent, read_only=True)) as source:
            return source.read(int(folder.name), like)

    try:
        _, state, about = weights.read_newest(config.resume_from, read)
        if about['step'] == config.num_steps and about['open_line'] is None:
            raise UsageError(f'it is trained to its end, step {config.num_steps}')
        if about['step'] > config.num_steps:
            raise UsageError(f'it is at step {about["step"]}, after the last one (config.num_steps={config.num_steps})')
    except (UsageError, CheckpointError) as error:
        raise type(error)(f'config.resume_from={config.resume_from}: {error}') from None
    return state, about


def _placed(params: Any, like: Any) -> Any:
    """Returns arrays, which every process has whole, in the types and shardings of `like`."""

    def placed(values: Any, leaf: Any) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index].astype(leaf.dtype))

    return jax.tree.map(placed, params, like)

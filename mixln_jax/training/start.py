"""The state that a run begins with."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models import placements
from mixln_jax.program.program import Program
from mixln_jax.program.step import State
from mixln_jax.runs import checkpoint, continuation, frozen, start_weights, weights
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
    return dataclasses.replace(config, model=dataclasses.replace(model, ramp_offset=start_weights.ramp_offset(config)))


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
    same = lambda config: (config.num_epochs, config.batch_size, config.examples_per_step)  # noqa: E731
    if earlier and same(earlier) == same(config):
        return configs.with_num_steps(config, earlier.num_steps)
    return configs.with_num_steps(
        config, max(1, math.ceil(config.num_epochs * count_rows() / config.examples_per_step))
    )


def first_state(
    program: Program,
    resolved: dict[str, Any],
    workdir: pathlib.Path,
    checkpoints: checkpoint.Checkpoints,
    fingerprint: Mapping[str, Any],
    stop: Stop,
) -> tuple[State, dict[str, Any]]:
    """Returns the state to begin with and its JSON object.

    It is the newest good checkpoint, or else that of `resume_from`, or else a fresh state, with the weights of
    `init_from` if that is given. Frozen weights are those of the same run.

    Raises UsageError if a checkpoint has seen other data or has another configuration; CheckpointError if frozen
    weights are missing or others.
    """
    config = program.config
    with stop.wait():  # an interrupted restore would look like damage
        restored, name, way_out, own = checkpoints.restore(program.state.own), 'checkpoint', ANOTHER, True
        source = workdir
        if not restored and config.resume_from:
            name, way_out = f'config.resume_from={config.resume_from}: checkpoint', 'init_from takes its weights alone'
            (source, restored), own = _resume_from(config, program.state.own), False
    if not restored:
        state = program.init(jax.random.key(config.seed))
        if config.init_from:
            values = start_weights.initial(config.init_from, program.model, fingerprint.get('tokenizer'))
            state = _with_weights(state, values, program.state)
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
    with stop.wait():
        state = state.with_fixed(frozen.read(source, program.state.fixed, about))
    console.say(f'mixln_jax: goes on from step {about["step"]}')
    if not own and (rates := continuation.rates_around(about['step'], about['config'], resolved)):
        console.say(
            f'mixln_jax: the learning rate was {rates[0]:.4g} in update {about["step"]}, {rates[1]:.4g} comes next'
        )
    return state, about


def _resume_from(config: configs.Config, like: Any) -> tuple[pathlib.Path, tuple[State, dict[str, Any]]]:
    """Returns (folder of the run, (state, JSON object)) of the checkpoint that `resume_from` names, left as it is."""

    def read(folder: pathlib.Path) -> tuple[Any, dict[str, Any]]:
        with contextlib.closing(checkpoint.Checkpoints(folder.parent, read_only=True)) as source:
            return source.read(int(folder.name), like)

    try:
        folder, state, about = weights.read_newest(config.resume_from, read)
        if about['step'] == config.num_steps and about['open_line'] is None:
            raise UsageError(f'it is trained to its end, step {config.num_steps}')
        if about['step'] > config.num_steps:
            raise UsageError(f'it is at step {about["step"]}, after the last one (config.num_steps={config.num_steps})')
    except (UsageError, CheckpointError) as error:
        raise type(error)(f'config.resume_from={config.resume_from}: {error}') from None
    return folder.parents[1], (state, about)


def _with_weights(state: State, values: Any, like: State) -> State:
    """Returns a fresh state with these weights, numpy arrays that every process has whole, in the types and shardings
    of `like`; adapters stay as they were drawn."""
    given = dict(trees.named_leaves(values))

    def placed(path: tuple, old: jax.Array, leaf: Any) -> jax.Array:
        if (name := trees.path_name(path)) not in given:
            return old
        array = given[name]
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: array[at].astype(leaf.dtype))

    return state.with_network(jax.tree_util.tree_map_with_path(placed, state.network, like.network))

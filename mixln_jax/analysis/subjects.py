"""What an analysis measures: networks with their weights on the devices, and a fixed sample of text."""

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax.data import batches
from mixln_jax.data import rows as data_rows
from mixln_jax.distributed import mesh as meshes
from mixln_jax.models import transformer
from mixln_jax.models.network import Network
from mixln_jax.program import lora
from mixln_jax.program.program import Program
from mixln_jax.runs import checkpoint_folders, frozen, start_weights, weights, workdir
from mixln_jax.runs.weights import Weights
from mixln_jax.system import cli
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks import build
from mixln_jax.tasks.task import Task

INITIAL = 'init'  # the step of weights that no training has changed


@dataclasses.dataclass(frozen=True)
class Place:
    """Where weights are: the folder of a checkpoint or of Hugging Face, and the run that it belongs to, or None.

    `initial`: the weights that the run began with are meant instead. `label` is their name among others. `newest`: the
    run's newest checkpoint is meant, whichever it is when it is opened.
    """

    folder: pathlib.Path
    run: pathlib.Path | None
    initial: bool
    label: str
    newest: bool = False


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network in float32 as its task sees it, its weights on all devices that share `batch_size` rows evenly.

    `reference` is the network that the run began with, where the task's losses depend on its weights, else None.
    """

    weights: Weights
    task: Task
    params: Any
    reference: Any = None

    @property
    def model(self) -> Network:
        """The network."""
        return self.task.model

    @property
    def step(self) -> Any:
        """Number of updates that made the weights, where the network has a ramp, else None; see angular.measure."""
        step = self.weights.step
        return None if step is None else transformer.needed_step(self.model, jnp.int32(step))

    def of_text(self) -> 'Subject':
        """Returns the network as plain text measures it: one that was taught to answer, by language modelling."""
        if not (self.weights.config and weights.taught(self.weights.config)):
            return self
        return dataclasses.replace(self, task=build.of_network(self.model), reference=None)


def places(checkpoints: Iterable[str], steps: str | None = None) -> list[Place]:
    """Returns what is to be measured, each place once.

    Args:
        checkpoints: folders of runs, of single checkpoints of them, or of Hugging Face.
        steps: of every run, separated by commas: `init`, numbers of steps, `all` (that are kept); None: the newest.

    Raises:
        UsageError: nothing there, a step that is not kept, or steps of what is not a run.
    """
    # (folder, initial) -> (folder, run, initial, suffix of the run's name, whether the newest)
    chosen: dict[Any, Any] = {}
    for path in checkpoints:
        folder, of_run = weights.find(path)
        run = folder.parents[1] if of_run else None
        is_run = (pathlib.Path(path).expanduser() / 'checkpoints').is_dir()
        if not steps:
            folders: Iterable[tuple[pathlib.Path, bool, str]] = [
                (folder, False, f' step {folder.name}' if run and not is_run else '')
            ]
        elif not is_run:
            raise UsageError(f'--steps {steps}: {path} is not the folder of a run')
        else:
            folders = _steps(folder, steps)
        for folder, initial, suffix in folders:
            newest = is_run and of_run and (initial or not steps)
            chosen.setdefault((os.path.realpath(folder), initial), (folder, run, initial, suffix, newest))
    names = workdir.short_names([run or folder for folder, run, *_ in chosen.values()])
    return [
        Place(folder, run, initial, name + suffix, newest)
        for name, (folder, run, initial, suffix, newest) in zip(names, chosen.values(), strict=True)
    ]


def _steps(newest: pathlib.Path, steps: str) -> Iterator[tuple[pathlib.Path, bool, str]]:
    """Yields (folder, whether initial, suffix of the name) of the steps of the run with this newest checkpoint."""
    kept = checkpoint_folders.steps(newest.parent)
    for step in cli.split_list(steps) or ['']:
        if step == INITIAL:
            yield newest, True, ' at init'
        elif step == 'all' or cli.parse_decimal(step) in kept:
            for number in kept if step == 'all' else [int(step)]:
                yield newest.with_name(str(number)), False, f' step {number}'
        else:
            listed = ', '.join([INITIAL, *map(str, kept)])
            raise UsageError(f'--steps: {newest.parents[1]} has no checkpoint {step!r} (there is {listed})')


def open_subject(
    place: Place, norm_position: str | None = None, batch_size: int = 8, data_path: str | None = None
) -> Subject:
    """Opens one of `places`.

    Args:
        place: the weights to open.
        norm_position: placement of a Hugging Face folder that does not say it.
        batch_size: number of rows that the devices share.
        data_path: where the run's data is now; None: where it was.

    Raises:
        UsageError, CheckpointError: as `weights.load`; DataError where initial weights need the run's data.
    """
    folder = place.run if place.run and place.newest else place.folder
    loaded = weights.load(folder, norm_position=norm_position)
    mesh = _mesh(batch_size)
    if place.initial:
        params = _initial(loaded, data_path)
        model = loaded.model.clone(trained_steps=transformer.needed_step(loaded.model, 0))
        name = f'{place.run} at initialisation'
        loaded = dataclasses.replace(loaded, model=model, params=params, step=0, where=name)
    model = loaded.model.clone(stream_sharding=meshes.batch_sharding(mesh))
    task = build.from_config(loaded.config, model) if loaded.config else build.of_network(model)
    reference = None
    if task.needs_reference and task.collect is None:  # a task that collects has no rewards of a sample of prompts
        assert loaded.workdir, 'a network without a run learns language'
        reference = meshes.params_to_devices(frozen.read_reference(loaded.workdir), mesh)
    return Subject(loaded, task, meshes.params_to_devices(loaded.params, mesh), reference)


def _mesh(rows: int) -> jax.sharding.Mesh:
    """Returns a mesh of as many devices, along `data`, as share `rows` evenly."""
    return meshes.make_mesh(configs.Mesh(data=parts(rows)), meshes.devices('auto'))


def parts(rows: int) -> int:
    """Returns how many devices share `rows` evenly."""
    return math.gcd(rows, len(meshes.devices('auto')))


def _initial(loaded: Weights, data_path: str | None) -> Any:
    """Returns the weights that a run began with, made again from its config, on one device."""
    config, mesh = loaded.config, _mesh(1)
    assert config and loaded.workdir, 'only a run has initial weights'
    given = None if config.task.num_outputs else frozen.read_base(loaded.workdir)
    if given is None and config.init_from:
        given = start_weights.initial(config.init_from, loaded.model)
    if given is not None and given.keys() == loaded.params.keys():
        return given  # else the head was new
    program = Program(config, mesh)
    state = program.init(jax.random.key(config.seed))
    if given is not None:
        return jax.device_get(lora.base(state.network)) | given
    if program.model.measured():
        rows = data_rows.open_rows_of_run(loaded.workdir, config, config.data.split, loaded.tokenizer, data_path)
        first = batches.training(rows, seed=config.data.seed, batch_size=config.batch_size)[0]
        state = program.measure_factors(state, meshes.to_devices(first, meshes.batch_sharding(mesh)))
    return jax.device_get(state.network)

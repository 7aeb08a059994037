"""Whether the folders of a sweep's cells hold what the sweep says, and what the cells have written."""

import pathlib
from collections.abc import Iterable
from typing import Any

from mixln_jax import config as configs
from mixln_jax.models import placements
from mixln_jax.runs import sweep_folder
from mixln_jax.runs.sweep_folder import Definition
from mixln_jax.system.errors import UsageError, reading

NOTES = 'expected.'  # keys that a run only carries along


def flat(config: configs.Config) -> dict[str, Any]:
    """Returns {key: value} of a configuration without its secret and the notes on what a paper expects."""
    values = configs.flatten(configs.public(config))
    return {key: value for key, value in values.items() if not key.startswith(NOTES)}


def config_of(folder: pathlib.Path, definition: Definition, name: str) -> configs.Config:
    """Returns the configuration of a cell. Raises UsageError if the definition has values that no run can have."""
    path, config = folder / sweep_folder.DEFINITION, configs.default()
    with sweep_folder.advising(sweep_folder.ANEW), reading(path, UsageError, f'damaged, cell {name} is no run'):
        with config.unlocked():
            config.update_from_flattened_dict(definition.fixed | definition.cells[name])
        try:
            return configs.build(config)
        except UsageError as error:
            raise ValueError(str(error)) from None


def check_unedited(folder: pathlib.Path, definition: Definition, names: Iterable[str]) -> None:
    """Raises UsageError, naming the cell and the way out, if the folder of one of the cells `names` holds another run,
    or not what the cell has written."""
    free = configs.may_change() - {*definition.keys}
    for name in names:
        run = folder / name
        sweep_folder.check_is_folder(run)
        again = f'remove {run} to train the cell again'
        ending = sweep_folder.read_ending(run)
        if (run / 'config.json').exists():
            with sweep_folder.advising(again):
                there = configs.read(run / 'config.json')
            expected = _comparable(config_of(folder, definition, name), there)
            seen = _comparable(there, there)
            for key in expected.keys() - free:
                if seen[key] != expected[key]:
                    raise UsageError(
                        f'the folder of cell {name} was edited: config.json has {key}={seen[key]}, not '
                        f'{expected[key]}; {again}'
                    )
        elif ending and ending.is_result:
            raise UsageError(f'cell {name} has ended ({ending.state}), but its config.json is missing; {again}')
        if ending and ending.metrics:
            with sweep_folder.advising(again):
                _check_metrics(run, ending)


def _check_metrics(run: pathlib.Path, ending: sweep_folder.Ending) -> None:
    """Raises an Exit if the metrics.jsonl of a cell is not what it was when the cell ended."""
    if sweep_folder.digest(run) != ending.metrics:
        path = run / 'metrics.jsonl'
        happened = 'it was edited since' if path.exists() else 'it is missing'
        raise UsageError(f'{path} is not what the cell has written: {happened}')


def _comparable(config: configs.Config, there: configs.Config) -> dict[str, Any]:
    """Returns {key: value} of a configuration, with what a run works out as the run in its folder, `there`, has it."""
    model = config.model
    values = flat(config) | {
        'model.norm_position': placements.resolve(model.norm_position, model.num_layers, model.post_ratio)
    }
    if config.num_epochs:
        values['num_steps'] = there.num_steps
    worked_out = flat(there)
    return {key: worked_out[key] if value == 'auto' else value for key, value in values.items()}

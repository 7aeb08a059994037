"""Work directories: which run a folder holds, and whether that run may continue."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

from mixln_jax import config as configs
from mixln_jax.distributed import processes
from mixln_jax.runs import checkpoint, checkpoint_folders, log, weights
from mixln_jax.runs.continuation import ANOTHER, check_continues
from mixln_jax.system import errors, files, outputs
from mixln_jax.system.errors import CheckpointError, UsageError


def short_names(folders: Iterable[str | os.PathLike]) -> list[str]:
    """Returns for each folder the shortest end of its path that no other folder has; often this is its last part."""
    parts = [pathlib.Path(os.path.realpath(folder)).parts for folder in folders]

    def shortest(own: tuple[str, ...]) -> tuple[str, ...]:
        others = [other for other in parts if other != own]
        return next(own[-n:] for n in range(1, len(own) + 1) if all(other[-n:] != own[-n:] for other in others))

    return ['/'.join(shortest(own)) for own in parts]


# What a run writes after config.json.
WRITTEN = 'metrics.jsonl', 'tokenizer/*', 'environment.json', 'debug/*', 'profile/*', 'frozen/*', 'reference/*'


def resolved_config(config: configs.Config, model: Any) -> dict[str, Any]:
    """Returns the config as a dict that names the placement of every layer of `model`, as it is saved with weights."""
    resolved = configs.public(config)
    resolved['model'] |= {
        'norm_position': list(model.norm_position),
        'layer_index': list(model.layer_index),
        'depth': model.depth,
    }
    return resolved


def earlier_config(config: configs.Config, workdir: str | os.PathLike) -> configs.Config | None:
    """Returns the configuration of the run that continues, in `workdir` or from `resume_from`; None if none does."""
    workdir = pathlib.Path(workdir).expanduser()
    try:
        if _has_results(workdir):
            return configs.read(workdir / 'config.json')
        folder = weights.checkpoint_folder(config.resume_from) if config.resume_from else None
        return configs.read(folder.parents[1] / 'config.json') if folder else None
    except (errors.Exit, OSError):  # whatever is wrong with it is reported when it is opened
        return None


def _has_results(workdir: pathlib.Path) -> bool:
    return any((workdir / 'checkpoints').glob('[0-9]*')) or bool(log.read_metrics(workdir / 'metrics.jsonl'))


def check_folder(workdir: str | os.PathLike) -> pathlib.Path:
    """Returns the absolute path of a work directory.

    Raises UsageError if checkpoints cannot be kept there, or if it is inside a folder that belongs to another run.
    """
    outputs.resolve(workdir, '--workdir')
    return files.for_arrays(workdir, '--workdir')


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike, resolved: Mapping[str, Any]) -> Iterator[pathlib.Path]:
    """Makes the folder and keeps other processes out of it. A run that ends without results leaves nothing behind.

    Args:
        workdir: the folder.
        resolved: configuration of the run, from `resolved_config`.

    Raises:
        UsageError: the folder is not writable or in use; it holds files that are not a run's and that the run would
            overwrite; or it holds results of another configuration, in which case the keys that differ are named.
    """
    workdir = check_folder(workdir)
    path, is_first = workdir / 'config.json', not jax.process_index()
    with contextlib.ExitStack() as closing:
        try:
            new_folders = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
            if is_first:  # one process makes the folder, and removes it
                workdir.mkdir(parents=True, exist_ok=True)
            processes.barrier('work directory')
            workdir.mkdir(parents=True, exist_ok=True)
            old_names = {*os.listdir(workdir)}
            before = resolved
            if _has_results(workdir) and path.exists():
                before = files.read_json(path, UsageError)
            _check_free(workdir)
            if is_first:
                busy = f'the work directory {workdir} is in use by another process'
                closing.enter_context(outputs.locked(workdir / '.lock', busy, keep=True))
                for mark in workdir.glob('.seen-by-all-*'):  # left by a start that was killed
                    mark.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            raise UsageError(f'the work directory {workdir} cannot be used: {error}') from None
        saved = checkpoint_folders.steps(workdir / 'checkpoints')
        check_continues(workdir, before, resolved, ANOTHER, saved)
        try:
            yield workdir
        except BaseException as error:
            if not workdir.is_dir():
                if isinstance(error, errors.Stopped | errors.Exit) and not isinstance(error, CheckpointError):
                    raise
                if not is_first and not isinstance(error, OSError | ValueError | CheckpointError):
                    raise  # process 0 may have removed the folder, after the same error
                problem = f'the work directory {workdir} is missing: it was moved or removed while the run used it'
                raise UsageError(problem) from error
            if is_first and not _has_results(workdir):
                _remove_traces(workdir, new_folders, old_names)
            raise


def _check_free(workdir: pathlib.Path) -> None:
    """Raises UsageError if a folder without checkpoints holds files that are not a run's and a run would overwrite."""
    if any((workdir / 'checkpoints').glob('[0-9]*')):
        return
    path = workdir / 'config.json'
    try:
        if 'model' in files.read_json(path, UsageError):
            return
    except FileNotFoundError:
        others = [path for name in WRITTEN for path in workdir.glob(name)]
        if not others:
            return
        path = others[0]
    except UsageError:
        pass
    raise UsageError(f'the work directory {workdir} holds {path.relative_to(workdir)} of something else; {ANOTHER}')


def _remove_traces(workdir: pathlib.Path, new_folders: Sequence[pathlib.Path], old_names: set[str]) -> None:
    """Removes what this process has written into the work directory, and `new_folders` if nothing else is in them.

    `old_names` are the names that the folder held before. If there is debug/ or profile/, which are for people,
    everything is kept.
    """
    new = [path for path in workdir.iterdir() if path.name not in old_names]
    if 'config.json' not in old_names and 'tokenizer' in old_names:  # it was empty: _check_free refuses any other
        new += (workdir / 'tokenizer').iterdir()
    if {path.name for path in new} & {'debug', 'profile'}:
        return
    for path in new:
        if path.name in ('checkpoints', 'frozen', 'reference', 'tokenizer'):
            shutil.rmtree(path, ignore_errors=True)
        elif (
            path.parent != workdir
            or path.name in ('.lock', 'config.json', 'environment.json', 'metrics.jsonl')
            or 'tfevents' in path.name
        ):
            path.unlink(missing_ok=True)
    for folder in new_folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def is_finished(workdir: pathlib.Path, checkpoints: checkpoint.Checkpoints, num_steps: int) -> bool:
    """Returns whether the last step is saved and its metrics line is complete.

    Raises CheckpointError if metrics.jsonl is damaged.
    """
    if checkpoints.latest() != num_steps:
        return False
    try:
        about = checkpoints.about(num_steps)
    except Exception:  # reported when the checkpoint is restored
        return False
    if about['open_line'] is not None:
        return False
    check_metrics(workdir, about, num_steps)
    return True


def check_metrics(workdir: pathlib.Path, about: Mapping[str, Any], num_steps: int) -> None:
    """Raises CheckpointError if metrics.jsonl is not what it was when a checkpoint was saved; `about` is its object."""
    complete = about['open_line'] is None
    lines = log.check_metrics(workdir / 'metrics.jsonl', about['step'] + complete, about.get('metrics'))
    at_end = complete and about['step'] == num_steps  # the last step always has a line
    if at_end and (not lines or lines[-1]['step'] != num_steps):
        raise CheckpointError(f'{workdir} is trained to the end, but its metrics.jsonl lacks the last step')

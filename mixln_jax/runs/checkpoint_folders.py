"""The folders of checkpoints on disk: which are complete, and what a kill has left of others."""

import os
import pathlib
import re
import shutil
import sys

import jax

from mixln_jax.distributed import processes
from mixln_jax.system import console, files, outputs
from mixln_jax.system.errors import CheckpointError, UsageError

COMMITTED = 'commit_success.txt'  # orbax writes it last
OURS = re.compile(r'(_CHECKPOINT_METADATA|about|state|commit_success\.txt)(\.orbax-checkpoint-tmp.*)?')
METADATA, TIMES = '_CHECKPOINT_METADATA', ('commit_timestamp_nsecs', 'init_timestamp_nsecs')


def steps(folder: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `checkpoints/`, ascending.

    A link to a checkpoint of another number does not count.
    """
    folders = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return sorted(
        int(path.name)
        for path in folders
        if os.path.basename(os.path.realpath(path)) == path.name and is_complete(path)
    )


def is_foreign(path: pathlib.Path) -> bool:
    """Returns whether something named like a checkpoint is a link or a file, or contains what no checkpoint does."""
    if not path.name.isascii() or path.is_symlink() or not path.is_dir():
        return True
    return not all(OURS.fullmatch(name) for name in os.listdir(path))


def is_other(folder: pathlib.Path) -> bool:
    """Returns whether a folder that may be named like a checkpoint is a run or a Hugging Face folder."""
    return (folder / 'checkpoints').exists() or (folder / 'config.json').exists()


def is_complete(folder: pathlib.Path) -> bool:
    """Returns whether a checkpoint was written to its end. orbax before 0.12.3 renamed its folder last instead of
    writing COMMITTED."""
    return (folder / COMMITTED).exists() or (has_content(folder) and not any(folder.glob(f'*/{COMMITTED}')))


def has_content(folder: pathlib.Path) -> bool:
    """Returns whether everything but COMMITTED is written: orbax writes the time into its metadata just before."""
    return commit_time(folder) is not None


def commit_time(folder: pathlib.Path) -> int | None:
    """Returns when a checkpoint was completed, by orbax's metadata; None if it was not, 0 if the time is unreadable."""
    try:
        metadata = files.read_json(folder / METADATA, CheckpointError)
    except FileNotFoundError:
        return None
    except CheckpointError:
        return None if not folder.is_dir() else 0
    times = [metadata.get(name, 0) for name in TIMES]
    if times[0] is None:
        return None
    return times[0] if all(type(time) is int and 0 < time < 2**62 for time in times) else 0


def clear(folder: pathlib.Path) -> None:
    """Removes incomplete checkpoints that a kill has left. Process 0 does it, the others wait.

    A checkpoint that lacks only COMMITTED is renamed instead, for that file may have been lost later. Raises
    UsageError if anything else is named like a checkpoint, for it would be removed as an old one.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.isdecimal() and is_foreign(path):
            raise UsageError(f'{path} is not a checkpoint of this run: move it, old ones are removed here')
    if not jax.process_index() and folder.is_dir():
        for path in sorted(folder.iterdir()):
            if '.orbax-checkpoint-tmp' in path.name:  # from versions of orbax that renamed complete checkpoints
                shutil.rmtree(path)
            elif path.name.isdecimal() and path.is_dir() and not is_complete(path):
                result = 'removed'
                if has_content(path):
                    outputs.rename(path, new := free_name(path, 'unfinished'))
                    result = f'now {new.name}'
                else:
                    shutil.rmtree(path)
                console.say(f'mixln_jax: checkpoint {path} was not written to its end; {result}', file=sys.stderr)
            elif path.name.isdecimal() and not commit_time(path):
                # orbax needs the time alone. Without it orbax asks for the folder's owner, who may have no name here.
                outputs.write_json(path / METADATA, dict.fromkeys(TIMES, path.stat().st_mtime_ns))
    processes.barrier('incomplete checkpoints are removed')


def free_name(folder: pathlib.Path, suffix: str) -> pathlib.Path:
    names = (f'{folder.name}.{suffix}', *(f'{folder.name}.{number}.{suffix}' for number in range(1, 1000)))
    return next(path for name in names if not (path := folder.with_name(name)).exists())

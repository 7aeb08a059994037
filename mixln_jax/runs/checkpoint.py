"""How to save and restore: orbax folders `checkpoints/<step>/`, arrays checked by sums of their bits."""

import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from mixln_jax import trees
from mixln_jax.distributed import processes
from mixln_jax.runs import environment
from mixln_jax.system import console, files, outputs
from mixln_jax.system.errors import CheckpointError, NumericsError, UsageError, first_line

COMMITTED = 'commit_success.txt'  # what orbax writes last
OURS = re.compile(r'(_CHECKPOINT_METADATA|about|state|commit_success\.txt)(\.orbax-checkpoint-tmp.*)?')
METADATA, TIMES = '_CHECKPOINT_METADATA', ('commit_timestamp_nsecs', 'init_timestamp_nsecs')
# What a file system, not a damaged file, answers, in the words of tensorstore, which raises ValueError for all.
NOT_NOW = re.compile(
    'Input/output error|Permission denied|PERMISSION_DENIED|Stale file handle|Connection timed out|Too many open files'
)
OTHERS = 'another process cannot read it'


class Damaged(ValueError):
    """What a checkpoint says is not what was saved."""


class _NotNow(str):
    """A problem with the file system, which says nothing about what is stored."""


class Checkpoints:
    """The checkpoints of a work directory.

    Each holds the train state and a JSON object: what the caller gives, versions, and of every leaf its type, shape and
    checksum.
    """

    def __init__(self, folder, keep=3, read_only=False):
        self._folder = files.for_arrays(folder, '')
        if not read_only:
            _clear(self._folder)
        # Each has its name from the start, and COMMITTED once it is whole: gcsfuse renames no folders.
        atomicity = ocp.options.AtomicityOptions(ocp.options.AtomicityMode.COMMIT_FILE, allow_legacy_atomic_rename=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, read_only=read_only, atomicity_options=atomicity
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest(self):
        """The newest step, or None."""
        return self._manager.latest_step()

    def save(self, step, state, extra):
        """Starts to write a checkpoint; returns as soon as `state` may be donated.

        Raises NumericsError, naming the leaf, for a value that is not finite: such a state is never saved.
        """
        leaves = describe(state)
        for name, leaf in leaves.items():
            if not leaf.pop('finite'):
                raise NumericsError(
                    f'step {step}: {name} is not finite; nothing was saved, the previous checkpoint stands'
                )
        about = extra | {'step': step, 'versions': environment.versions(), 'leaves': leaves}
        about |= {'digest': _digest(about)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about))
        with jax.transfer_guard('allow'):  # orbax fetches the arrays in its own way
            self._manager.save(step, args=arguments)

    def wait(self):
        """Returns when everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self):
        """Waits, then ends the writing threads."""
        self._manager.close()

    def about(self, step):
        """The JSON object of a checkpoint."""
        return _about(self._folder / str(step))

    def restore(self, like):
        """The newest good checkpoint as (state, JSON object), or None where there is none.

        One whose content is damaged is named, its folder renamed `<step>.corrupt`, and the one before it is taken,
        also where one of several processes alone finds it damaged. One that the file system does not give becomes
        `<step>.unreadable`, but only if there is a good one before it.

        Args:
            like: the state as ShapeDtypeStructs with the shardings that it is to have.

        Raises:
            CheckpointError: a checkpoint of another structure (nothing is renamed), or none of several is good.
        """
        found, bad = steps(self._folder), []
        for step in reversed(found):
            state, about, problem = self._read(step, like)
            if not processes.any_of(problem):
                problem = _difference(about['leaves'], describe(state))
                if not problem:
                    break
            bad.append((step, problem, processes.any_of(isinstance(problem, _NotNow))))
        good = len(bad) < len(found)
        for step, problem, not_now in bad:
            if good or not not_now:
                self._set_aside(step, problem, 'unreadable' if not_now else 'corrupt')
        if good:
            return state, about
        if found:
            raise CheckpointError(
                f'{self._folder}: no checkpoint is readable '
                f'({"; ".join(f"{step}: {problem or OTHERS}" for step, problem, _ in bad)})'
            )
        if aside := sorted(path.name for path in self._folder.glob('*.corrupt')):
            raise CheckpointError(
                f'{self._folder}: no checkpoint but damaged ones ({", ".join(aside)}); rename one back to '
                'try it again, or remove them to start from step 0'
            )
        return None

    def read(self, step, like):
        """(state, JSON object) of one checkpoint, which keeps its name; `like` as for `restore`.

        Raises CheckpointError for what is unreadable, damaged or of another structure.
        """
        state, about, problem = self._read(step, like)
        if processes.any_of(problem) or (problem := _difference(about['leaves'], describe(state))):
            raise CheckpointError(f'{self._folder / str(step)}: {problem or OTHERS}')
        return state, about

    def read_back(self, step: int, like):
        """Reads what was saved, each process its part, and drops it. Raises CheckpointError where it is not as saved.

        Call it where nothing else of the state's size is held."""
        try:
            self.read(step, like)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f'the last save cannot be read back: {error}') from error

    def _read(self, step, like):
        """(state, JSON object, None), or what is wrong in place of None. Each process reads by itself."""
        state = about = problem = None
        try:
            about = self.about(step)
            state = self._restore_state(step, like, about['leaves'])
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # a flipped byte can make orbax, zstd or JSON raise anything
            if 'RESOURCE_EXHAUSTED' in str(error):
                raise  # says nothing about what is stored
            problem = _problem(error)
        return state, about, problem

    def _restore_state(self, step, like, stored):
        expected = {name: (str(leaf.dtype), list(leaf.shape)) for name, leaf in trees.named_leaves(like)}
        found = {name: (leaf['dtype'], leaf['shape']) for name, leaf in stored.items()}
        for name in expected | found:
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f'{self._folder / str(step)}: {name} is {found.get(name, "not there")}, '
                    f'this run needs {expected.get(name, "no such leaf")}'
                )
        with _reader() as reader:
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like))
            return reader.restore(self._folder / str(step), args=arguments)['state']

    def _set_aside(self, step, problem, ending):
        """Renames a checkpoint; process 0 does, and all that have seen a problem say so."""
        folder = self._folder / str(step)
        aside = _free_name(folder, ending)
        processes.meet(f'aside {step}')  # all have looked
        if not jax.process_index():
            outputs.rename(folder, aside)
            problem = problem or OTHERS
        processes.meet(f'set aside {step}')
        self._manager.reload()
        if problem:
            what = 'is damaged' if ending == 'corrupt' else 'cannot be read'
            console.say(f'mixln_jax: checkpoint {folder} {what} ({problem}); now {aside.name}', file=sys.stderr)


def steps(folder: pathlib.Path) -> list[int]:
    """The steps of the checkpoints in `checkpoints/` that were written to their end, ascending.

    A link to a checkpoint of another number is none.
    """
    folders = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    return sorted(
        int(path.name) for path in folders if os.path.basename(os.path.realpath(path)) == path.name and _is_whole(path)
    )


def _is_foreign(path):
    """Whether something with a checkpoint's name holds anything that no checkpoint does, or is a link or a file."""
    if not path.name.isascii() or path.is_symlink() or not path.is_dir():
        return True
    return not all(OURS.fullmatch(name) for name in os.listdir(path))


def is_other(folder: pathlib.Path) -> bool:
    """Whether a folder that may be named like a checkpoint is a run, or Hugging Face's."""
    return (folder / 'checkpoints').exists() or (folder / 'config.json').exists()


def _is_whole(folder):
    """Whether a checkpoint was written to its end. Renamed last by orbax before 0.12.3 it has no COMMITTED at all."""
    return (folder / COMMITTED).exists() or _has_all(folder) and not any(folder.glob(f'*/{COMMITTED}'))


def _has_all(folder):
    """Whether all but COMMITTED is there: the time in orbax's metadata is written just before."""
    return _time(folder) is not None


def _time(folder):
    """When a checkpoint was written to its end, as orbax noted it; None where it did not, 0 where that is lost."""
    try:
        found = files.read_json(folder / METADATA, CheckpointError)
    except FileNotFoundError:
        return None
    except CheckpointError:
        return None if not folder.is_dir() else 0
    times = [found.get(name, 0) for name in TIMES]
    if times[0] is None:
        return None
    return times[0] if all(type(time) is int and 0 < time < 2**62 for time in times) else 0


def _clear(folder):
    """Removes what a kill left half written; process 0 does, the others wait.

    Raises UsageError where anything else has the name of a checkpoint: as one it would be removed.
    What lacks nothing but COMMITTED is set aside, for that file may have been lost.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.isdecimal() and _is_foreign(path):
            raise UsageError(f'{path} is no checkpoint of this run: move it, old ones are removed here')
    if not jax.process_index() and folder.is_dir():
        for path in sorted(folder.iterdir()):
            if '.orbax-checkpoint-tmp' in path.name:  # of versions that renamed what is whole
                shutil.rmtree(path)
            elif path.name.isdecimal() and path.is_dir() and not _is_whole(path):
                now = 'removed'
                if _has_all(path):
                    outputs.rename(path, aside := _free_name(path, 'unfinished'))
                    now = f'now {aside.name}'
                else:
                    shutil.rmtree(path)
                console.say(f'mixln_jax: checkpoint {path} was not written to its end; {now}', file=sys.stderr)
            elif path.name.isdecimal() and not _time(path):
                # Its time alone matters. Without it orbax asks for the owner of the folder, who may have no name here.
                outputs.write_json(path / METADATA, dict.fromkeys(TIMES, path.stat().st_mtime_ns))
    processes.meet('half written ones are gone')


def _free_name(folder, ending):
    names = (f'{folder.name}.{ending}', *(f'{folder.name}.{number}.{ending}' for number in range(1, 1000)))
    return next(path for name in names if not (path := folder.with_name(name)).exists())


def read_params(folder):
    """(weights, JSON object) of one checkpoint, `checkpoints/<step>`: on one device here, whatever mesh wrote them.

    The optimiser's state is not read. Raises CheckpointError for what is unreadable or damaged.
    """
    folder = files.for_arrays(folder, '')
    here, like = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), {}
    try:
        about = _about(folder)
        stored = {name: leaf for name, leaf in about['leaves'].items() if name.startswith('params/')}
        for name, leaf in stored.items():
            *groups, last = name.split('/')
            at = functools.reduce(lambda tree, group: tree.setdefault(group, {}), groups, like)
            at[last] = jax.ShapeDtypeStruct(leaf['shape'], leaf['dtype'], sharding=here)
        arguments = ocp.args.PyTreeRestore(
            like, restore_args=ocp.checkpoint_utils.construct_restore_args(like), partial_restore=True
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(folder / 'state', args=arguments)
    except CheckpointError:
        raise
    except Exception as error:  # no such step; a flipped byte can make orbax or zstd raise anything
        raise CheckpointError(f'{folder}: {_problem(error)}') from error
    if problem := _difference(stored, describe(found)):
        raise CheckpointError(f'{folder}: {problem}')
    return found['params'], about


def _about(folder):
    """The JSON object of a checkpoint. Raises Damaged where it is not what was saved, or of another step."""
    if folder.is_dir() and not _is_whole(folder):
        raise CheckpointError(f'{folder}: it was not written to its end')
    for path in folder.rglob('*'):  # the libraries would wait for a pipe, or read a device for ever
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise Damaged(f'{path} is neither a file nor a folder')
    with _reader() as reader:
        about = reader.restore(folder, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
    if about.pop('digest') != _digest(about):
        raise Damaged('its JSON has changed')
    if about['step'] != int(folder.name):
        raise Damaged(f'it is step {about["step"]}')
    return about


def _problem(error):
    """What an exception says of a checkpoint, and which file it is about."""
    file = getattr(error, 'filename', None)
    said = first_line(error) if isinstance(error, Damaged) else f'{type(error).__name__}: {first_line(error)}'
    said = f'{said} ({file})' if file and str(file) not in said else said
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    not_now = (isinstance(error, OSError) and not missing) or NOT_NOW.search(str(error))
    return _NotNow(said) if not_now else said


def _reader():
    """Reads for this process alone: orbax's own manager waits for all, also for one that has failed."""
    here = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f'process_{here}'
    )
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.StandardCheckpointHandler(multiprocessing_options=options),
        about=ocp.JsonCheckpointHandler(multiprocessing_options=options),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def describe(state):
    """{leaf name: {'dtype', 'shape', 'checksum', 'finite'}}; checksums are the same on every mesh."""
    names = [name for name, _ in trees.named_leaves(state)]
    leaves = jax.tree.leaves(state)
    sums, finite = jax.device_get(_check(leaves))
    return {
        name: {'dtype': str(leaf.dtype), 'shape': list(leaf.shape), 'checksum': int(number), 'finite': bool(good)}
        for name, leaf, number, good in zip(names, leaves, sums, finite, strict=True)
    }


@jax.jit
def _check(leaves):
    finite = [
        jnp.isfinite(leaf).all() if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.bool_(True) for leaf in leaves
    ]
    return jnp.stack([checksum(leaf) for leaf in leaves]), jnp.stack(finite)


def checksum(array):
    """Sum of every element's bit pattern times an odd hash of its index, mod 2^32: any one changed element shows.

    An integer sum does not depend on the order of its terms, so neither on how the array is sharded.
    """
    unsigned = jnp.dtype(f'uint{8 * array.dtype.itemsize}')
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    strides = np.cumprod((1, *array.shape[:0:-1]), dtype=np.uint64)[::-1].astype(np.uint32)
    index = functools.reduce(
        jnp.add,
        [jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * strides[axis] for axis in range(array.ndim)],
        jnp.zeros(array.shape, jnp.uint32),
    )
    mixed = (index ^ (index >> 16)) * np.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x846CA68B)
    return jnp.sum(bits * (mixed ^ (mixed >> 16) | 1), dtype=jnp.uint32)


def _digest(about):
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()


def _difference(stored, found):
    """What is wrong with restored leaves, or None."""
    wrong = [name for name, leaf in stored.items() if leaf['checksum'] != found[name]['checksum']]
    return f'checksum of {wrong[0]} does not match' if wrong else None

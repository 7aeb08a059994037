"""Checkpoints: orbax folders `checkpoints/<step>/` whose arrays are verified by checksums of their bits."""

import dataclasses
import os
import pathlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from mixln_jax import trees
from mixln_jax.distributed import processes
from mixln_jax.runs import checksums, environment
from mixln_jax.runs.checkpoint_folders import clear, free_name, is_complete, steps
from mixln_jax.system import console, files, outputs
from mixln_jax.system.errors import CheckpointError, NumericsError, first_line

# Messages of tensorstore, which raises ValueError for everything, that mean the file system, not a damaged file.
UNAVAILABLE = re.compile(
    'Input/output error|Permission denied|PERMISSION_DENIED|Stale file handle|Connection timed out|Too many open files'
)
OTHERS = 'another process cannot read it'
About = dict[str, Any]  # the JSON object of a checkpoint


class Damaged(ValueError):
    """The content of a checkpoint is not what was saved."""


class _Unavailable(str):
    """A problem with the file system, which does not mean that the stored content is damaged."""


@dataclasses.dataclass
class _Kept:
    """Which checkpoints stay when one is saved: the `newest`, those of every `every` steps, the `best`, and the `sound`
    one, from before a collapse."""

    newest: int
    every: int
    best: int | None = None
    sound: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns for each of `checkpoints`, ascending, whether it stays; orbax calls it."""
        del context
        first = len(checkpoints) - self.newest
        return [number >= first or self._stays(one.step) for number, one in enumerate(checkpoints)]

    def _stays(self, step: int) -> bool:
        return step in (self.best, self.sound) or bool(self.every and step % self.every == 0)


class Checkpoints:
    """The checkpoints of a work directory.

    Each of them holds the train state and a JSON object: the caller's values, versions, and the type, shape and
    checksum of every leaf.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3, read_only: bool = False, keep_every: int = 0) -> None:
        """Opens `folder` and, unless `read_only`, removes incomplete checkpoints.

        The newest `keep` are kept, also those of every `keep_every` steps (0: none), and that of step `best`.
        """
        self._folder = files.for_arrays(folder, '')
        if not read_only:
            clear(self._folder)
        # A checkpoint has its final name from the start and gets COMMITTED at its end: gcsfuse cannot rename folders.
        atomicity = ocp.options.AtomicityOptions(ocp.options.AtomicityMode.COMMIT_FILE, allow_legacy_atomic_rename=True)
        self._kept = _Kept(keep, keep_every)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._kept, create=not read_only, read_only=read_only, atomicity_options=atomicity
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def best(self) -> int | None:
        """The step that stays because it is the best; None: there is none. The same in all processes."""
        return self._kept.best

    @best.setter
    def best(self, step: int | None) -> None:
        self._kept.best = step

    def keep_sound(self, step: int | None) -> None:
        """Makes `step` the one that stays because the network had not collapsed; None: there is none. The same in all
        processes."""
        self._kept.sound = step

    def saved(self) -> list[int]:
        """Returns the steps that are saved or being saved, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Returns the newest step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint, and returns as soon as `state` may be donated. `extra` goes into its JSON.

        Raises NumericsError, naming the leaf, if a value is not finite: such a state is never saved.
        """
        leaves = checksums.describe(state)
        for name, leaf in leaves.items():
            if not leaf.pop('finite'):
                raise NumericsError(
                    f'step {step}: {name} is not finite; nothing was saved, the previous checkpoint remains'
                )
        about = {**extra, 'step': step, 'versions': environment.versions(), 'leaves': leaves}
        about |= {'digest': checksums.digest(about)}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(_present(state)), about=ocp.args.JsonSave(about))
        with jax.transfer_guard('allow'):  # orbax fetches the arrays by implicit transfers
            self._manager.save(step, args=arguments)

    def wait(self) -> None:
        """Returns when everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for saves, then ends the writing threads."""
        self._manager.close()

    def about(self, step: int) -> About:
        """Returns the JSON object of a checkpoint."""
        return read_about(self._folder / str(step))

    def restore(self, target: Any) -> tuple[Any, About] | None:
        """Returns (state, JSON object) of the newest good checkpoint, or None if there are no checkpoints.

        A damaged checkpoint is reported and renamed `<step>.corrupt`, and the one before it is used; it is enough that
        one of several processes finds the damage. A checkpoint that the file system cannot read now is renamed
        `<step>.unreadable`, but only if there is a good one before it.

        Args:
            target: the state as ShapeDtypeStructs with the shardings that it is to have.

        Raises:
            CheckpointError: a checkpoint has another structure (nothing is renamed), or no checkpoint is good.
        """
        saved, bad, good = steps(self._folder), [], None
        for step in reversed(saved):
            state, about, problem = self._read(step, target)
            if not processes.any_process(problem):
                problem = checksums.difference(about['leaves'], checksums.describe(state))
                if not problem:
                    good = state, about
                    break
            bad.append((step, problem, processes.any_process(isinstance(problem, _Unavailable))))
        for step, problem, unavailable in bad:
            if good or not unavailable:
                self._set_aside(step, problem, 'unreadable' if unavailable else 'corrupt')
        if good:
            return good
        if saved:
            raise CheckpointError(
                f'{self._folder}: no checkpoint is readable '
                f'({"; ".join(f"{step}: {problem or OTHERS}" for step, problem, _ in bad)})'
            )
        if corrupt := sorted(path.name for path in self._folder.glob('*.corrupt')):
            raise CheckpointError(
                f'{self._folder}: there are only damaged checkpoints ({", ".join(corrupt)}); rename one back to '
                'try it again, or remove them to start from step 0'
            )
        return None

    def read(self, step: int, target: Any) -> tuple[Any, About]:
        """Returns (state, JSON object) of one checkpoint, which keeps its name; `target` as for `restore`.

        Raises CheckpointError if it is unreadable, damaged or of another structure.
        """
        state, about, problem = self._read(step, target)
        if processes.any_process(problem) or (
            problem := checksums.difference(about['leaves'], checksums.describe(state))
        ):
            raise CheckpointError(f'{self._folder / str(step)}: {problem or OTHERS}')
        return state, about

    def read_back(self, step: int, target: Any) -> None:
        """Reads what was saved, each process its part, and drops it; `target` as for `restore`.

        Call it while nothing else of the state's size is in memory. Raises CheckpointError if the content is not what
        was saved.
        """
        try:
            self.read(step, target)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(f'the last save cannot be read back: {error}') from error

    def _read(self, step: int, target: Any) -> tuple[Any, About, str | None]:
        """Returns (state, JSON object, None), or the problem in place of None. Each process reads by itself."""
        state, about = None, {}
        try:
            about = self.about(step)
            state = self._restore_state(step, target, about['leaves'])
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # a flipped byte can make orbax, zstd or JSON raise anything
            if 'RESOURCE_EXHAUSTED' in str(error):
                raise  # does not mean that the checkpoint is damaged
            return state, about, describe_problem(error)
        return state, about, None

    def _restore_state(self, step: int, target: Any, leaves: Mapping[str, Any]) -> Any:
        needed = {name: (str(leaf.dtype), list(leaf.shape)) for name, leaf in trees.named_leaves(target)}
        stored = {name: (leaf['dtype'], leaf['shape']) for name, leaf in leaves.items()}
        for name in needed | stored:
            if needed.get(name) != stored.get(name):
                raise CheckpointError(
                    f'{self._folder / str(step)}: {name} is {stored.get(name, "missing")}, '
                    f'this run needs {needed.get(name, "no such leaf")}'
                )
        with _reader() as reader:
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(_present(target)))
            state = reader.restore(self._folder / str(step), args=arguments)['state']
        rebuild = getattr(target, 'replace', None)  # of a State; None of a tree of another kind
        return rebuild(**state) if rebuild else state

    def go_back(self, step: int) -> None:
        """Makes `step` the newest checkpoint: renames those after it `<step>.superseded`. Every process calls it."""
        for later in reversed([other for other in steps(self._folder) if other > step]):
            new = self._rename(later, 'superseded')
            console.say(f'mixln_jax: goes back to step {step}; checkpoint {later} is now {new.name}', file=sys.stderr)

    def _set_aside(self, step: int, problem: str | None, suffix: str) -> None:
        """Renames a checkpoint, in process 0. Every process that has seen a problem reports it."""
        new = self._rename(step, suffix)
        if not jax.process_index():
            problem = problem or OTHERS
        if problem:
            state = 'is damaged' if suffix == 'corrupt' else 'cannot be read'
            folder = self._folder / str(step)
            console.say(f'mixln_jax: checkpoint {folder} {state} ({problem}); now {new.name}', file=sys.stderr)

    def _rename(self, step: int, suffix: str) -> pathlib.Path:
        """Renames a checkpoint `<step>.<suffix>`, in process 0; returns the new path."""
        folder = self._folder / str(step)
        new = free_name(folder, suffix)
        processes.barrier(f'read {step}')  # all have looked at the folder
        if not jax.process_index():
            outputs.rename(folder, new)
        processes.barrier(f'set aside {step}')
        self._manager.reload()
        return new


def read_params(folder: str | os.PathLike, average: bool = True) -> tuple[Any, About]:
    """Returns (trained weights, JSON object) of one checkpoint, `checkpoints/<step>`: the running average of the
    weights where it has one and `average`, else the weights themselves.

    The optimiser's state is not read. See `read_tree`.
    """

    def chosen(leaves: Mapping[str, Any]) -> str:
        return 'ema' if average and any(name.startswith('ema/') for name in leaves) else 'params'

    return read_tree(folder, chosen)


def read_tree(
    folder: str | os.PathLike, chosen: Callable[[Mapping[str, Any]], str] = lambda _: ''
) -> tuple[Any, About]:
    """Returns (arrays, JSON object) of one checkpoint; of the field `chosen(leaves)`, empty: of all of it.

    The arrays are on one device of this process, whatever mesh they were saved from. Raises CheckpointError if the
    checkpoint is unreadable or damaged.
    """
    folder = files.for_arrays(folder, '')
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        about = read_about(folder)
        tree = chosen(about['leaves'])
        stored = {name: leaf for name, leaf in about['leaves'].items() if not tree or name.startswith(f'{tree}/')}
        target = trees.nested(
            (name, jax.ShapeDtypeStruct(leaf['shape'], leaf['dtype'], sharding=sharding))
            for name, leaf in stored.items()
        )
        arguments = ocp.args.PyTreeRestore(
            target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            loaded = reader.restore(folder / 'state', args=arguments)
    except CheckpointError:
        raise
    except Exception as error:  # no such step; or a flipped byte, which can make orbax or zstd raise anything
        raise CheckpointError(f'{folder}: {describe_problem(error)}') from error
    if problem := checksums.difference(stored, checksums.describe(loaded)):
        raise CheckpointError(f'{folder}: {problem}')
    return loaded[tree] if tree else loaded, about


def read_about(folder: pathlib.Path) -> About:
    """Returns the JSON object of a checkpoint. Raises Damaged if it is not what was saved, or of another step."""
    if folder.is_dir() and not is_complete(folder):
        raise CheckpointError(f'{folder}: it was not written to its end')
    for path in folder.rglob('*'):  # the libraries would wait for a pipe, and read a device for ever
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise Damaged(f'{path} is neither a file nor a folder')
    with _reader() as reader:
        about = reader.restore(folder, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
    if about.pop('digest') != checksums.digest(about):
        raise Damaged('its JSON has changed')
    if about['step'] != int(folder.name):
        raise Damaged(f'it is step {about["step"]}')
    return about


def describe_problem(error: Exception) -> str:
    """Returns what is wrong with a checkpoint, by an exception of its reader, and names the file if it is known."""
    file = getattr(error, 'filename', None)
    text = first_line(error) if isinstance(error, Damaged) else f'{type(error).__name__}: {first_line(error)}'
    text = f'{text} ({file})' if file and str(file) not in text else text
    missing = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    unavailable = (isinstance(error, OSError) and not missing) or UNAVAILABLE.search(str(error))
    return _Unavailable(text) if unavailable else text


def _reader() -> ocp.Checkpointer:
    """Returns a reader for this process alone: orbax's manager would wait for all, also for one that has failed."""
    own = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f'process_{own}'
    )
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.StandardCheckpointHandler(multiprocessing_options=options),
        about=ocp.JsonCheckpointHandler(multiprocessing_options=options),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _present(state: Any) -> Any:
    """Returns the fields of a state that are not None, by name; a tree of another kind as it is.

    orbax counts a field that is None as part of the structure. Without it, checkpoints from before the field existed
    have the structure of today's.
    """
    if not dataclasses.is_dataclass(state):
        return state
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if value is not None}

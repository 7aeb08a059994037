"""Work directories: which run a folder holds, and whether it may go on."""

import contextlib
import os
import pathlib
import shutil

import jax

from mixln_jax import config as configs
from mixln_jax.distributed import processes
from mixln_jax.runs import log, weights
from mixln_jax.system import errors, files, outputs
from mixln_jax.system.errors import CheckpointError, UsageError


def names(folders):
    """Short names that tell folders apart, of each its last part; where those are equal, with parts before it."""
    parts = [pathlib.Path(os.path.realpath(folder)).parts for folder in folders]

    def name(of):
        others = [other for other in parts if other != of]
        return next(of[-n:] for n in range(1, len(of) + 1) if all(other[-n:] != of[-n:] for other in others))

    return ['/'.join(name(of)) for of in parts]


ANOTHER = 'give another --workdir'
WRITTEN = 'metrics.jsonl', 'tokenizer/*', 'environment.json', 'debug/*', 'profile/*'  # by a run, after config.json


def resolved_config(config, model):
    """The config as a dict, the placement spelled out layer by layer, as it is saved with the weights."""
    resolved = configs.public(config)
    resolved['model'] |= {
        'norm_position': list(model.norm_position),
        'layer_index': list(model.layer_index),
        'depth': model.depth,
    }
    return resolved


def earlier_config(config, workdir):
    """The configuration of the run that goes on, in `workdir` or from `resume_from`; None where there is none."""
    workdir = pathlib.Path(workdir).expanduser()
    try:
        if _has_results(workdir):
            return configs.read(workdir / 'config.json')
        folder = config.resume_from and weights.checkpoint_folder(config.resume_from)
        return configs.read(folder.parents[1] / 'config.json') if folder else None
    except (errors.Exit, OSError):  # what is wrong with it is said where it is opened
        return None


def _has_results(workdir):
    return any((workdir / 'checkpoints').glob('[0-9]*')) or log.read_metrics(workdir / 'metrics.jsonl')


def check_place(workdir):
    """The whole path of a work directory. Raises UsageError where checkpoints cannot be kept, or in another run."""
    outputs.place(workdir, '--workdir')
    return files.for_arrays(workdir, '--workdir')


@contextlib.contextmanager
def open_workdir(workdir, resolved):
    """Makes the folder and keeps other processes out of it; refuses the folder of another run. A run that ends
    before it has results leaves nothing that was not there before.

    Raises UsageError: not writable, in use, files of something else in it that a run would write over, or results of
    another configuration, naming the keys that differ.
    """
    workdir = check_place(workdir)
    path, speaks = workdir / 'config.json', not jax.process_index()
    with contextlib.ExitStack() as closing:
        try:
            made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
            if speaks:  # one of several makes it, and removes it
                workdir.mkdir(parents=True, exist_ok=True)
            processes.meet('work directory')
            workdir.mkdir(parents=True, exist_ok=True)
            there = {*os.listdir(workdir)}
            before = resolved
            if _has_results(workdir) and path.exists():
                before = files.read_json(path, UsageError)
            _check_free(workdir)
            if speaks:
                busy = f'the work directory {workdir} is in use by another process'
                closing.enter_context(outputs.locked(workdir / '.lock', busy, keep=True))
                for mark in workdir.glob('.seen-by-all-*'):  # of a start that was killed
                    mark.unlink(missing_ok=True)
        except (OSError, ValueError) as error:
            raise UsageError(f'the work directory {workdir} cannot be used: {error}') from None
        check_same_run(workdir, before, resolved, ANOTHER)
        try:
            yield workdir
        except BaseException as error:
            if not workdir.is_dir():
                if isinstance(error, errors.Stopped | errors.Exit) and not isinstance(error, CheckpointError):
                    raise
                gone = f'the work directory {workdir} has gone: it was moved or removed while the run used it'
                raise UsageError(gone) from error
            if speaks and not _has_results(workdir):
                _remove_traces(workdir, made, there)
            raise


def _check_free(workdir):
    """Raises UsageError where a folder without checkpoints holds what is no run's and a run would write over."""
    if any((workdir / 'checkpoints').glob('[0-9]*')):
        return
    path = workdir / 'config.json'
    try:
        ours = 'model' in files.read_json(path, UsageError)
    except FileNotFoundError:
        path = next((path for name in WRITTEN for path in workdir.glob(name)), None)
        ours = path is None
    except UsageError:
        ours = False
    if not ours:
        raise UsageError(f'the work directory {workdir} holds {path.relative_to(workdir)} of something else; {ANOTHER}')


def _remove_traces(workdir, made, there):
    """Removes what this process has written into the work directory, and the folders `made`, where nothing else is in
    them; `there` are the names that it found. What is for people, debug/ and profile/, keeps all."""
    new = [path for path in workdir.iterdir() if path.name not in there]
    if 'config.json' not in there and 'tokenizer' in there:  # it was empty, as _check_free has seen
        new += (workdir / 'tokenizer').iterdir()
    if {path.name for path in new} & {'debug', 'profile'}:
        return
    for path in new:
        if path.name in ('checkpoints', 'tokenizer'):
            shutil.rmtree(path, ignore_errors=True)
        elif (
            path.parent != workdir
            or path.name in ('.lock', 'config.json', 'environment.json', 'metrics.jsonl')
            or 'tfevents' in path.name
        ):
            path.unlink(missing_ok=True)
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()


def check_same_run(where, before, now, way_out):
    """Raises UsageError, naming the keys and the way out, where two resolved configs are not of one run."""
    before, now = configs.flatten(configs.Config()) | configs.flatten(before), configs.flatten(now)
    # The authors' mean of the micro-batches' means depends on how many they are.
    may_change = configs.may_change() - ({'accumulate'} if now['compat'] != 'none' else set())
    differ = [
        f'{name} (was {before.get(name)}, is {now.get(name)})'
        for name in sorted(before | now)
        if before.get(name) != now.get(name) and name not in may_change
    ]
    if differ:
        raise UsageError(f'{where} holds a run of another configuration: {", ".join(differ)}; {way_out}')


def is_finished(workdir, checkpoints, num_steps):
    """Whether the last step is saved and its metrics line complete. Raises CheckpointError for damaged records."""
    if checkpoints.latest() != num_steps:
        return False
    try:
        about = checkpoints.about(num_steps)
    except Exception:  # whoever restores it says what is wrong
        return False
    if about['open_line'] is not None:
        return False
    check_metrics(workdir, about, num_steps)
    return True


def check_metrics(workdir, about, num_steps):
    """Raises CheckpointError where metrics.jsonl lacks what was there when the checkpoint was saved."""
    complete = about['open_line'] is None
    lines = log.check_metrics(workdir / 'metrics.jsonl', about['step'] + complete, about.get('metrics'))
    at_end = complete and about['step'] == num_steps  # the last step always has a line
    if at_end and (not lines or lines[-1]['step'] != num_steps):
        raise CheckpointError(f'{workdir} is trained to the end, but its metrics.jsonl lacks the last step')

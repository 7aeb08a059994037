"""What a reference network says of pairs, computed once before training (`task.preference.reference=precomputed`) and
kept in `<run>/reference/<split>.npz`: the log-probability of each token of their answers.

The network itself is not kept. Checkpoints hold its fingerprint, so the file can be made again as long as `init_from`
has its weights; to adapters it is their base.
"""

import functools
import io
import json
import math
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.data import batches
from mixln_jax.data.pairs import Pairs, WithReference
from mixln_jax.distributed import mesh as meshes
from mixln_jax.distributed import processes
from mixln_jax.models import transformer
from mixln_jax.program import lora, tuning
from mixln_jax.program.step import State
from mixln_jax.runs import checkpoint, checksums, frozen, start_weights, weights
from mixln_jax.system import console, files, outputs
from mixln_jax.system.errors import CheckpointError, reading
from mixln_jax.tasks.task import Context, Task

FOLDER = 'reference'  # in a run; also the name of the network's fingerprint in the JSON object of a checkpoint
AGAIN = 'remove it, and it is computed again with the network of config.init_from'
OTHERS = {'network': 'another reference network', 'rows': 'other rows'}
ROWS = 8  # at a time, of rows that a run has not seen


def log_probs_of(
    task: Any, network: Any, rows: Pairs, size: int, check: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Returns the log-probability [N, T] of each token of the answers of N rows, float32, in nats; 0 at other tokens.

    Every process has to call it, and gets all rows.

    Args:
        task: a tasks.preference.Preference whose network is on a mesh.
        network: all weights of the reference, on the mesh; ramps stand where training began.
        rows: of pairs.
        size: rows at a time, which the mesh has to divide.
        check: called before each batch; may raise to stop early.
    """
    sharding = task.model.stream_sharding
    step = transformer.needed_step(task.model, jnp.int32(0))
    compute = jax.jit(
        lambda network, batch, step: task.log_probs(network, batch, Context(step=step)),
        out_shardings=meshes.replicated(sharding.mesh),
    )
    dataset, parts = batches.evaluation(rows, size), []
    for number in tqdm(range(len(dataset)), desc='reference', leave=False, disable=None):
        check()
        parts.append(jax.device_get(compute(network, meshes.to_devices(dataset[number], sharding), step)))
    return np.concatenate(parts)[: len(rows)]


def of_training(
    task: Task,
    config: configs.Config,
    workdir: pathlib.Path,
    state: State,
    about: Mapping[str, Any],
    splits: Mapping[str, Pairs],
    check: Callable[[], None],
) -> tuple[str, dict[str, WithReference]]:
    """Returns the fingerprint of a run's reference network, and the rows of each split with what it says of them, which
    is computed unless the run has it. Every process has to call it.

    Args:
        task: of the run, on its mesh.
        config: of the run.
        workdir: its folder.
        state: that training begins or goes on with.
        about: the JSON object of its checkpoint. At step 0 the state's own weights are the reference, and a file of
            an earlier start that does not fit is written again.
        splits: rows by the name of their split.
        check: as of `log_probs_of`.

    Raises CheckpointError: a file is damaged or of something else; or it is missing, and `init_from` does not name the
    reference.
    """
    begins, adapters = not about['step'], config.tune.method == 'lora' and not config.tune.train

    @functools.cache
    def network() -> Any:
        if begins or adapters:
            return lora.base(state.network)
        return _start(task, config, about[FOLDER], workdir)

    fingerprint = frozen.fingerprint(checksums.describe(network())) if begins else about[FOLDER]
    earlier = weights.checkpoint_folder(config.resume_from) if config.resume_from else None
    folders = [run / FOLDER for run in (workdir, *([earlier.parents[1]] if earlier else []))]
    found = {}
    for split, rows in splits.items():
        facts = {'network': fingerprint, 'rows': rows.digest}
        kept = [_read(folder / f'{split}.npz', facts, rows, mend=begins) for folder in folders]
        log_probs = next((one for one in kept if one is not None), None)
        if processes.any_process(log_probs is None) or log_probs is None:
            console.say(f'mixln_jax: {split}: the reference network reads {len(rows):,} rows')
            log_probs = log_probs_of(task, network(), rows, config.batch_size // config.accumulate, check)
        if processes.any_process(kept[0] is None) and not jax.process_index():
            _write(workdir / FOLDER / f'{split}.npz', facts, log_probs)
        found[split] = WithReference(rows, log_probs)
    processes.barrier('the reference is kept')
    return fingerprint, found


def of_run(task: Task, loaded: weights.Weights, split: str, rows: Any) -> Any:
    """Returns rows for a tool that measures a run, with what its reference network says of them where the task reads
    that. Of rows that the run has not seen it is computed.

    Args:
        task: of the run, on a mesh.
        loaded: the weights of the run.
        split: of its data.
        rows: of that split.

    Raises CheckpointError as `of_training`.
    """
    if not task.precomputed:
        return rows
    assert loaded.workdir, 'the task is that of a run'
    config = configs.read(loaded.workdir / 'config.json')  # with its `tune`, which merged weights have no more
    newest = weights.checkpoint_folder(loaded.workdir)
    assert newest, 'it has the weights'
    fingerprint = checkpoint.read_about(newest)[FOLDER]
    facts = {'network': fingerprint, 'rows': rows.digest}
    log_probs = _read(loaded.workdir / FOLDER / f'{split}.npz', facts, rows, other_rows=True)
    if log_probs is None:
        base = frozen.read_base(loaded.workdir)
        mesh = task.model.stream_sharding.mesh
        if base is None:
            network = _start(task, config, fingerprint, loaded.workdir)
        else:
            network = meshes.params_to_devices(base, mesh)
        parts = meshes.row_parts(mesh)
        log_probs = log_probs_of(task, network, rows, -(-ROWS // parts) * parts)
    return WithReference(rows, log_probs)


def _read(
    path: pathlib.Path, facts: Mapping[str, str], rows: Pairs, mend: bool = False, other_rows: bool = False
) -> np.ndarray | None:
    """Returns the log-probabilities [N, T] in a file; None: there is none.

    Args:
        path: of the file.
        facts: what it must say of itself.
        rows: N rows of T positions.
        mend: whether a file that cannot be used counts as missing.
        other_rows: whether one of other rows does.

    Raises CheckpointError: it is damaged, or of something else.
    """
    shape = len(rows), rows.seq_length
    try:
        files.regular(path, CheckpointError)
        with reading(path, CheckpointError, f'damaged: {AGAIN}'), zipfile.ZipFile(path), np.load(path) as stored:
            about = json.loads(str(stored['about']))
            if other_rows and about['network'] == facts['network'] and about['rows'] != facts['rows']:
                return None
            if differ := [name for name, value in facts.items() if about[name] != value]:
                raise CheckpointError(f'{path} is of {" and ".join(OTHERS[name] for name in differ)}: {AGAIN}')
            if stored.zip.getinfo('log_probs.npy').file_size > 4 * math.prod(shape) + 2**16:  # before it is unpacked
                raise ValueError('its array is too large')
            log_probs = stored['log_probs']
            if log_probs.shape != shape or log_probs.dtype != np.float32 or not np.isfinite(log_probs).all():
                raise ValueError(f'its array is {log_probs.dtype} {list(log_probs.shape)}, not float32 {list(shape)}')
            return log_probs
    except FileNotFoundError:
        return None
    except CheckpointError:
        if mend:
            return None
        raise


def _write(path: pathlib.Path, facts: Mapping[str, str], log_probs: np.ndarray) -> None:
    body = io.BytesIO()
    np.savez_compressed(body, log_probs=log_probs, about=np.array(json.dumps(facts)))
    outputs.write(path, body.getvalue())


def _start(task: Task, config: configs.Config, fingerprint: str, workdir: pathlib.Path) -> Any:
    """Returns what `init_from` of a run names, on the mesh of a task. Raises CheckpointError unless it is the run's
    reference, of this fingerprint."""
    problem = (
        f'{workdir / FOLDER} lacks log-probabilities of the reference; to compute them, config.init_from has to name '
        'the network that the run began with'
    )
    if not config.init_from:
        raise CheckpointError(problem)
    params, kept = tuning.split(start_weights.initial(config.init_from, task.model), config.tune)
    network = trees.join(jax.tree.map(lambda leaf: leaf.astype(config.param_dtype), params), kept)
    network = meshes.params_to_devices(network, task.model.stream_sharding.mesh)
    if frozen.fingerprint(checksums.describe(network)) != fingerprint:
        raise CheckpointError(f'{problem}, and config.init_from={config.init_from} has other weights than that')
    return network

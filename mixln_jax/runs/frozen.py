"""The weights of a run that are not trained: `<run>/frozen/0`, written once in the format of a checkpoint.

Checkpoints hold their fingerprint alone. So a run folder is enough for every tool, and does not depend on where the
weights that it began with are.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax

from mixln_jax import config as configs
from mixln_jax.distributed import processes
from mixln_jax.program import lora
from mixln_jax.runs import checkpoint, checksums
from mixln_jax.system.errors import CheckpointError

FOLDER = 'frozen'


def fingerprint(leaves: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what two sets of weights have in common if and only if they are equal; `leaves` as of
    `checksums.describe`."""
    facts = {name: [leaf['dtype'], leaf['shape'], leaf['checksum']] for name, leaf in leaves.items()}
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def keep(workdir: pathlib.Path, frozen: Any) -> str | None:
    """Writes the frozen weights of a run into its folder, unless they are there, and returns their fingerprint; None
    for None. Every process has to call it.

    Raises NumericsError for a value that is not finite.
    """
    if frozen is None:
        return None
    folder, own = workdir / FOLDER, fingerprint(checksums.describe(frozen))
    with contextlib.suppress(Exception):  # whatever is there of a start that was cut short is written again
        if fingerprint(_about(folder)['leaves']) == own:
            return own
    processes.barrier('looked for frozen weights')
    if not jax.process_index():
        shutil.rmtree(folder, ignore_errors=True)
    processes.barrier('old frozen weights are removed')
    with contextlib.closing(checkpoint.Checkpoints(folder, keep=1)) as kept:
        kept.save(0, frozen, {})
        kept.wait()
    return own


def read(workdir: pathlib.Path, like: Any, about: Mapping[str, Any]) -> Any:
    """Returns the frozen weights that belong to a checkpoint; None where `like` is None.

    Args:
        workdir: the run's folder.
        like: ShapeDtypeStructs with the shardings that they are to have.
        about: the JSON object of the checkpoint.

    Raises CheckpointError: missing, unreadable, damaged, or not those of the checkpoint.
    """
    if like is None:
        return None
    folder = _check(workdir, about)
    with contextlib.closing(checkpoint.Checkpoints(folder, read_only=True)) as kept:
        return kept.read(0, like)[0]


def read_here(workdir: pathlib.Path, about: Mapping[str, Any]) -> Any:
    """Returns the frozen weights that belong to a checkpoint on one device of this process; None: it has none.

    Raises CheckpointError as `read`.
    """
    if not about.get(FOLDER):
        return None
    return checkpoint.read_tree(_check(workdir, about) / '0')[0]


def read_base(workdir: pathlib.Path) -> Any:
    """Returns the network that the adapters of a run adapt, on one device of this process; None: of another run."""
    tune = configs.read(workdir / 'config.json').tune
    if tune.method != 'lora' or tune.train:
        return None
    return lora.base(checkpoint.read_tree(workdir / FOLDER / '0')[0])


def _check(workdir: pathlib.Path, about: Mapping[str, Any]) -> pathlib.Path:
    folder, step = workdir / FOLDER, about['step']
    if not (folder / '0').is_dir():
        raise CheckpointError(
            f'{folder} is missing: it holds the weights that are not trained, without which checkpoint {step} is of no '
            'use; copy it back from where the run was'
        )
    try:
        found = fingerprint(_about(folder)['leaves'])
    except CheckpointError:
        raise
    except Exception as error:  # a flipped byte can make orbax or JSON raise anything
        raise CheckpointError(f'{folder}: damaged: {checkpoint.describe_problem(error)}') from error
    if found != about.get(FOLDER):
        raise CheckpointError(f'{folder} holds other weights than those that checkpoint {step} was trained with')
    return folder


def _about(folder: pathlib.Path) -> checkpoint.About:
    return checkpoint.read_about(folder / '0')

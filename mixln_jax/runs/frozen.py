"""The weights of a run that no update changes, written once in the format of a checkpoint: those that are not trained
in `<run>/frozen/0`, those of the reference network in `<run>/frozen/1`.

Checkpoints hold their fingerprint alone. So a run folder is enough for every tool, and does not depend on where the
weights that it began with are.
"""

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mixln_jax import config as configs
from mixln_jax.distributed import processes
from mixln_jax.program import lora
from mixln_jax.runs import checkpoint, checksums
from mixln_jax.system.errors import CheckpointError

FOLDER = 'frozen'
FROZEN, REFERENCE = 0, 1  # the folders in it, in the order of `State.fixed`


def fingerprint(leaves: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns what two sets of weights have in common if and only if they are equal; `leaves` as of
    `checksums.describe`."""
    facts = {name: [leaf['dtype'], leaf['shape'], leaf['checksum']] for name, leaf in leaves.items()}
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def keep(workdir: pathlib.Path, fixed: Sequence[Any]) -> str | None:
    """Writes the weights of a run that no update changes into its folder, unless they are there, and returns their
    fingerprint; None where there are none. Every process has to call it.

    Args:
        workdir: the run's folder.
        fixed: the frozen weights and those of the reference network, `State.fixed`; None: it has none.

    Raises NumericsError for a value that is not finite.
    """
    parts = {number: part for number, part in enumerate(fixed) if part is not None}
    if not parts:
        return None
    folder = workdir / FOLDER
    own = _joined({number: fingerprint(checksums.describe(part)) for number, part in parts.items()})
    with contextlib.suppress(Exception):  # whatever is there of a start that was cut short is written again
        if _found(folder) == own:
            return own
    processes.barrier('looked for frozen weights')
    if not jax.process_index():
        shutil.rmtree(folder, ignore_errors=True)
    processes.barrier('old frozen weights are removed')
    with contextlib.closing(checkpoint.Checkpoints(folder, keep=len(parts))) as kept:
        for number, part in parts.items():
            kept.save(number, part, {})
            kept.wait()
    return own


def read(workdir: pathlib.Path, like: Sequence[Any], about: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns the weights of `State.fixed` that belong to a checkpoint; None where `like` is None.

    Args:
        workdir: the run's folder.
        like: ShapeDtypeStructs with the shardings that they are to have.
        about: the JSON object of the checkpoint.

    Raises CheckpointError: missing, unreadable, damaged, or not those of the checkpoint.
    """
    if all(part is None for part in like):
        return tuple(like)
    folder = _check(workdir, about)
    with contextlib.closing(checkpoint.Checkpoints(folder, read_only=True)) as kept:
        return tuple(part if part is None else kept.read(number, part)[0] for number, part in enumerate(like))


def read_here(workdir: pathlib.Path, about: Mapping[str, Any]) -> Any:
    """Returns the frozen weights that belong to a checkpoint on one device of this process; None: it has none.

    Raises CheckpointError as `read`.
    """
    if not about.get(FOLDER):
        return None
    folder = _check(workdir, about) / str(FROZEN)
    return checkpoint.read_tree(folder)[0] if folder.is_dir() else None


def read_reference(workdir: pathlib.Path) -> Any:
    """Returns the reference network of a run on one device of this process; the base where it trains adapters alone."""
    if (base := read_base(workdir)) is not None:
        return base
    return checkpoint.read_tree(workdir / FOLDER / str(REFERENCE))[0]


def read_base(workdir: pathlib.Path) -> Any:
    """Returns the network that the adapters of a run adapt, on one device of this process; None: of another run."""
    tune = configs.read(workdir / 'config.json').tune
    if tune.method != 'lora' or tune.train:
        return None
    return lora.base(checkpoint.read_tree(workdir / FOLDER / str(FROZEN))[0])


def _check(workdir: pathlib.Path, about: Mapping[str, Any]) -> pathlib.Path:
    folder, step = workdir / FOLDER, about['step']
    if not any((folder / str(number)).is_dir() for number in (FROZEN, REFERENCE)):
        raise CheckpointError(
            f'{folder} is missing: it holds the weights that are not trained, without which checkpoint {step} is of no '
            'use; copy it back from where the run was'
        )
    try:
        found = _found(folder)
    except CheckpointError:
        raise
    except Exception as error:  # a flipped byte can make orbax or JSON raise anything
        raise CheckpointError(f'{folder}: damaged: {checkpoint.describe_problem(error)}') from error
    if found != about.get(FOLDER):
        raise CheckpointError(f'{folder} holds other weights than those that checkpoint {step} was trained with')
    return folder


def _found(folder: pathlib.Path) -> str:
    """Returns the fingerprint of what is in a folder."""
    parts = {number: folder / str(number) for number in (FROZEN, REFERENCE)}
    return _joined(
        {number: fingerprint(checkpoint.read_about(part)['leaves']) for number, part in parts.items() if part.is_dir()}
    )


def _joined(fingerprints: Mapping[int, str]) -> str:
    """Returns one fingerprint of the parts; that of frozen weights alone is their own."""
    return '+'.join(fingerprints.get(number, '') for number in range(max(fingerprints) + 1))

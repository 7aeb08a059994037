"""Trained weights, wherever they lie: a run's folder, one of its checkpoints, a Hugging Face folder."""

import dataclasses
import pathlib
from typing import Any

from mixln_jax import checkpoint, trees
from mixln_jax import config as configs
from mixln_jax.data import tokenizers
from mixln_jax.exits import CheckpointError, UsageError
from mixln_jax.models import hf, llama, tensors


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network, its parameters on one device here, and what is known about them."""

    model: llama.Llama
    params: Any
    where: str
    step: int | None = None  # None, as config is: a Hugging Face folder
    config: configs.Config | None = None
    tokenizer: tokenizers.Tokenizer | None = None


def load(path, compute_dtype='float32', norm_position=None) -> Weights:
    """Opens weights for evaluation, analysis or export.

    Args:
        path: the work directory of a run (its newest checkpoint is taken), `<work directory>/checkpoints/<step>`, or a
            Hugging Face folder.
        compute_dtype: of the network; the weights keep their type.
        norm_position: placement of a Hugging Face folder that does not say it.

    Raises:
        UsageError: nothing there, or a `norm_position` for a run, which has its own.
        CheckpointError: unreadable, damaged or of another structure.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_dir():
        raise UsageError(f'{path} is not a folder')
    run, steps = path, path / 'checkpoints'
    if path.name.isdigit() and path.parent.name == 'checkpoints':
        run, steps = path.parents[1], path.parent
    elif not steps.is_dir():
        tensors.refuse_pickled(path)
        if not (path / 'config.json').is_file():
            raise UsageError(f'{path} is neither a run of ours (checkpoints/) nor a Hugging Face folder (config.json)')
        model, params = hf.load(path, norm_position, compute_dtype)
        ours = (path / 'tokenizer/fingerprint.json').is_file()  # from an export
        return Weights(model, params, str(path), tokenizer=tokenizers.load(path / 'tokenizer') if ours else None)
    if norm_position:
        raise UsageError(f'{run} is a run of ours, which knows its placement')
    found = [int(folder.name) for folder in steps.iterdir() if folder.name.isdigit()]
    if not found:
        raise UsageError(f'{steps} holds no checkpoint')
    folder = path if run != path else steps / str(max(found))
    params, about = checkpoint.read_params(folder)
    config = configs.from_resolved(about['config'])
    model = llama.from_config(config.model, compute_dtype)
    expected, shapes = (
        {name: leaf.shape for name, leaf in trees.named_leaves(tree)} for tree in (model.shapes()['params'], params)
    )
    for name in sorted(expected | shapes):
        if expected.get(name) != shapes.get(name):
            raise CheckpointError(
                f'{folder}: {name} is {shapes.get(name, "not there")}, its config makes it {expected.get(name)}'
            )
    return Weights(model, params, str(folder), about['step'], config, tokenizers.load(run / 'tokenizer'))

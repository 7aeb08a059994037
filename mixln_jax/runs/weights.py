"""Trained weights, wherever they lie: a run's folder, one of its checkpoints, a Hugging Face folder."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.data import chat, tokenizers
from mixln_jax.keys.data import ANSWERS
from mixln_jax.models import families, hf, placements, transformer
from mixln_jax.models.hf import config as hf_config
from mixln_jax.models.hf import tensors, timm
from mixln_jax.models.network import Network
from mixln_jax.program import lora
from mixln_jax.runs import best, checkpoint, checkpoint_folders, frozen
from mixln_jax.system import files
from mixln_jax.system.errors import CheckpointError, UsageError

EXPORT = 'export.json'  # in a folder that mixln_jax.export wrote: where from, and of which files it consists


class Removed(UsageError):
    """A checkpoint that its run has removed for a newer one."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """A network, its parameters on one device here, and what is known about them.

    Attributes:
        model: `logits, out = model.apply({'params': params}, ids, capture=True)`; `model.config` has its sizes,
            `model.trained_steps` the step of its ramps.
        params: the tree of parameters, layers stacked; `transformer.split_layers` gives single ones.
        where: the folder that was read, of a run its `checkpoints/<step>`.
        step: updates that made the weights; None: of a Hugging Face folder.
        config: of the run, `tune` apart: adapters are merged; None: of a Hugging Face folder.
        tokenizer: has `encode` and `decode`; None: of a Hugging Face folder that is no export of ours, whose own one
            `open_tokenizer` opens.
    """

    model: Network
    params: Any
    where: str
    step: int | None = None
    config: configs.Config | None = None
    tokenizer: tokenizers.Tokenizer | None = None
    workdir: pathlib.Path | None = None  # of the run

    @property
    def max_length(self) -> int:
        """Number of tokens of the longest row that the weights were trained for."""
        if self.config:
            return self.config.seq_length
        path = pathlib.Path(self.where, 'config.json')
        length = hf_config.read_json(path).get('max_position_embeddings', 2048)
        if type(length) is not int or not 0 < length < 2**31:
            raise CheckpointError(f'{path}: max_position_embeddings={length!r} is not a number of positions')
        return length

    @property
    def data_mode(self) -> str | None:
        """config.data.mode of the rows that the weights were trained on; None where nothing says it."""
        if self.config:
            return self.config.data.mode
        return about_export(pathlib.Path(self.where)).get('data_mode')

    @property
    def template(self) -> str | None:
        """config.data.template by which the weights were taught to answer; None: by none, or nothing says it.

        Raises CheckpointError where an export has another value.
        """
        if self.config:
            return taught(self.config)
        template = about_export(pathlib.Path(self.where)).get('template')
        if template not in (None, 'chat', *chat.NAMED):
            raise CheckpointError(f'{pathlib.Path(self.where, EXPORT)}: template={template!r} is not a template')
        return template

    @property
    def class_names(self) -> list[str]:
        """Names of the classes of a network that reads images, in the order of its labels; [] where nothing says them.

        Raises CheckpointError where a run or a folder has another number of them.
        """
        if self.workdir:
            path = self.workdir / 'environment.json'
            names = files.read_json(path, CheckpointError).get('classes', []) if path.exists() else []
        else:
            path = pathlib.Path(self.where, 'config.json')
            content = hf_config.read_json(path)
            names = (hf_config if 'id2label' in content else timm).label_names(path, content)
        if not isinstance(names, list) or len(names) not in (0, self.model.config.num_classes):
            raise CheckpointError(f'{path} does not name {self.model.config.num_classes} classes')
        return names


def taught(config: configs.Config) -> str | None:
    """Returns config.data.template if a run learns to answer by it, else None."""
    return config.data.template if config.task.name in ANSWERS else None


def load(
    path: str | os.PathLike, compute_dtype: str = 'float32', norm_position: str | None = None, merge: bool = True
) -> Weights:
    """Opens weights for evaluation, analysis or export.

    Args:
        path: the work directory of a run (its newest checkpoint is taken), `<work directory>/checkpoints/<step>`, or a
            Hugging Face folder.
        compute_dtype: of the network; the weights keep their type.
        norm_position: placement of a Hugging Face folder that does not say it.
        merge: whether adapters of a run become a part of its matrices; the config is then that of a run without.

    Raises:
        UsageError: nothing there, or a `norm_position` for a run or a BERT, which have their own; as `read_newest`.
        CheckpointError: unreadable, damaged or of another structure.
    """
    folder, of_run = find(path)
    if not of_run:
        model, params = hf.load(folder, norm_position, compute_dtype)
        tokenizer = None
        if (folder / 'tokenizer/fingerprint.json').is_file():  # from an export
            tokenizer = tokenizers.load(folder / 'tokenizer', about_export(folder).get('tokenizer'))
        return Weights(model, params, str(folder), tokenizer=tokenizer)
    if norm_position:
        raise UsageError(f'--norm_position: {folder} is a run of ours, which knows its placement')
    folder, params, about = read_newest(path, checkpoint.read_params)
    params = trees.join(params, frozen.read_here(folder.parents[1], about))
    config = configs.from_resolved(about['config'])
    if merge:
        params, config = lora.merged(params), dataclasses.replace(config, tune=configs.Tune())
    model = families.from_config(config.model, compute_dtype, num_outputs=config.task.num_outputs)
    model = model.clone(trained_steps=transformer.needed_step(model, about['step']))
    expected, shapes = (
        {name: leaf.shape for name, leaf in trees.named_leaves(tree)}
        for tree in (model.shapes()['params'], lora.base(params))
    )
    for name in sorted(expected | shapes):
        if expected.get(name) != shapes.get(name):
            raise CheckpointError(
                f'{folder}: {name} is {shapes.get(name, "not there")}, its config makes it {expected.get(name)}'
            )
    workdir = folder.parents[1]
    fingerprint = about['data']['fingerprint'].get('tokenizer')  # runs on images have none
    tokenizer = tokenizers.load(workdir / 'tokenizer', fingerprint) if fingerprint else None
    return Weights(model, params, str(folder), about['step'], config, tokenizer, workdir)


def about_export(folder: pathlib.Path) -> dict[str, Any]:
    """Returns what mixln_jax.export noted in a folder that it wrote; {} for other folders."""
    path = folder / EXPORT
    if not path.exists():
        return {}
    found = files.read_json(path, CheckpointError)
    for name in ('data_mode', 'tokenizer', 'base'):
        if not isinstance(found.get(name), str | None):
            raise CheckpointError(f'{path}: {name} is not a text')
    return found


def without_layers(found: Weights, removed: Collection[int]) -> Weights:
    """Returns the network without some layers, as if `layer_mask` were False for them; the others keep their constants.

    Args:
        found: from `load`.
        removed: numbers of layers, as `layer_index` has them: the first is 1, a pruned network has gaps.

    Raises UsageError for a number that no layer has, for all of them, and where a norm of the embedding, which goes
    with the first layer's placement, would appear or vanish.
    """
    model, numbers = found.model, found.model.layer_index
    if wrong := sorted({*removed} - {*numbers}):
        listed = ', '.join(map(str, numbers))
        raise UsageError(f'there is no layer {wrong[0]}: {found.where} has the layers {listed}')
    kept = [at for at, number in enumerate(numbers) if number not in removed]
    if not kept:
        raise UsageError(f'all {len(numbers)} layers of {found.where} would be removed')
    names = tuple(model.norm_position[at] for at in kept)
    if placements.PLACEMENTS[names[0]].embed_norm != placements.PLACEMENTS[model.norm_position[0]].embed_norm:
        raise UsageError(
            f'layer {numbers[0]} ({model.norm_position[0]}) cannot be removed before a layer of {names[0]}: of the two '
            'only one has the embedding normalised'
        )
    layers = transformer.split_layers(found.params['layers'], model.norm_position)
    config = dataclasses.replace(model.config, num_layers=len(kept), norm_position=hf_config.spell(names))
    pruned = model.clone(config=config, norm_position=names, layer_index=tuple(model.layer_index[at] for at in kept))
    params = dict(found.params, layers=transformer.stack_layers([layers[at] for at in kept], names))
    return dataclasses.replace(found, model=pruned, params=params)


def find(given: str | os.PathLike) -> tuple[pathlib.Path, bool]:
    """Returns (`checkpoint_folder(given)`, True) of a run, (the folder, False) of Hugging Face.

    Raises UsageError for other folders.
    """
    path = files.local(given, '--checkpoint')
    if folder := checkpoint_folder(path):
        return folder, True
    tensors.refuse_others(path)
    if not (path / 'config.json').is_file():
        raise UsageError(f'{path} is neither a run of ours (checkpoints/) nor a Hugging Face folder (config.json)')
    return path, False


def checkpoint_folder(given: str | os.PathLike) -> pathlib.Path | None:
    """Returns `<run>/checkpoints/<step>`: the newest of a run, the best one for `<run>/best`, or the checkpoint itself;
    None for another folder.

    Links are followed, so that the run's own folder is found. A run, or a Hugging Face folder, may have the name of a
    checkpoint: what is in a folder decides.

    Raises UsageError: not a folder, a run without a checkpoint, or a checkpoint that was moved out of its run.
    """
    path = files.local(given, '')
    if path.name == best.NAME and not path.exists() and (path.parent / 'checkpoints').is_dir():
        return best.best_folder(path.parent)
    if not path.is_dir():
        raise UsageError(f'{path} is not a folder')
    if (folder := path / 'checkpoints').is_dir():
        if found := checkpoint_folders.steps(folder):
            return folder / str(found[-1])
        if not (path / 'config.json').exists() or not any(path.glob('*.safetensors*')):
            raise UsageError(f'{folder} holds no checkpoint')
    if checkpoint_folders.is_other(path):
        return None
    for at in sorted(_hops(path), key=lambda at: at.is_symlink()):  # as it was given, rather than in full
        if at.name.isdecimal() and at.parent.name == 'checkpoints' and '..' not in at.parts:
            return at
    if (path / 'about').is_dir():
        raise UsageError(f'{path} is a checkpoint outside of its run: <run>/checkpoints/<step> is needed')
    return None


def read_newest(path: str | os.PathLike, read: Callable[[pathlib.Path], tuple[Any, dict]]) -> tuple[Any, Any, Any]:
    """Returns (folder, *`read(folder)`) of the checkpoint that `checkpoint_folder(path)` names.

    A run in training removes old checkpoints: where a newer one has come while the newest was read, it is taken.

    Raises UsageError: not a run of ours; Removed where `path` names a single checkpoint, which is removed meanwhile.
    """
    folder = checkpoint_folder(path)
    while folder:
        try:
            return folder, *read(folder)
        except (CheckpointError, OSError):
            newer = any(step > int(folder.name) for step in checkpoint_folders.steps(folder.parent))
            if not newer or jax.process_count() > 1:  # several processes have to agree on what they read
                raise
            for _ in range(20):  # it may be half gone
                if not folder.exists():
                    break
                time.sleep(0.05)
            again = checkpoint_folder(path) if _names_several(path) else None
            if not again:
                raise Removed(f'{folder} was removed while it was read: newer checkpoints took its place') from None
            if again == folder:
                raise
            folder = again
    raise UsageError(f'{path} is not a run of ours')


def _names_several(path: str | os.PathLike) -> bool:
    """Returns whether a path names a run or its best checkpoint, rather than a checkpoint that has been removed."""
    path = pathlib.Path(path).expanduser()
    return path.is_dir() or path.name == best.NAME


def _hops(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path, what it links to, what that links to and so on, and last its real one, which has no links."""
    for _ in range(40):  # as many as Linux follows
        yield path
        if not path.is_symlink():
            break
        path = path.parent / os.readlink(path)
    yield pathlib.Path(os.path.realpath(path))

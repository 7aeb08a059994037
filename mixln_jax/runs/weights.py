"""Trained weights, wherever they lie: a run's folder, one of its checkpoints, a Hugging Face folder."""

import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import numpy as np

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.data import chat, tokenizers
from mixln_jax.models import families, hf, placements, transformer
from mixln_jax.models.hf import config as hf_config
from mixln_jax.models.hf import peft, tensors
from mixln_jax.models.network import Network
from mixln_jax.program import lora, tuning
from mixln_jax.runs import best, checkpoint, checkpoint_folders, checksums, frozen
from mixln_jax.system import console, files
from mixln_jax.system.errors import CheckpointError, UsageError

ANSWERS = 'instructions', 'preference', 'online'  # the tasks that teach to answer, by a template
EXPORT = 'export.json'  # in a folder that mixln_jax.export wrote: where from, and of which files it consists


ADAPTER = 'adapter:'  # begins an init_from
NEW_TOKENS = 1024  # that a vocabulary may have more than the weights, at most; more belong to another tokenizer


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
        return _of_export(pathlib.Path(self.where)).get('data_mode')

    @property
    def template(self) -> str | None:
        """config.data.template by which the weights were taught to answer; None: by none, or nothing says it.

        Raises CheckpointError where an export has another value.
        """
        if self.config:
            return taught(self.config)
        template = _of_export(pathlib.Path(self.where)).get('template')
        if template not in (None, 'chat', *chat.NAMED):
            raise CheckpointError(f'{pathlib.Path(self.where, EXPORT)}: template={template!r} is not a template')
        return template


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
            tokenizer = tokenizers.load(folder / 'tokenizer', _of_export(folder).get('tokenizer'))
        return Weights(model, params, str(folder), tokenizer=tokenizer)
    if norm_position:
        raise UsageError(f'--norm_position: {folder} is a run of ours, which knows its placement')
    folder, params, about = read_newest(path, checkpoint.read_params)
    params = trees.join(params, frozen.read_here(folder.parents[1], about))
    config = configs.from_resolved(about['config'])
    if merge:
        params, config = lora.merged(params), dataclasses.replace(config, tune=configs.Tune())
    model = families.from_config(config.model, compute_dtype)
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
    tokenizer = tokenizers.load(workdir / 'tokenizer', about['data']['fingerprint']['tokenizer'])
    return Weights(model, params, str(folder), about['step'], config, tokenizer, workdir)


def _of_export(folder: pathlib.Path) -> dict[str, Any]:
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


def initial(where: str, model: Network, tokenizer: str | None = None) -> Any:
    """Returns what `config.init_from` names as parameters of `model`, numpy arrays: no device needs to hold them all.

    Args:
        where: `hf:FOLDER`, `adapter:FOLDER` of peft, or what `load` opens as ours.
        model: the network that is to start from them. A Hugging Face folder that does not say its placement, as the
            authors' do not, is read under this network's.
        tokenizer: fingerprint of the new run's, for a warning if a run of ours had another one; None: it is not known.

    Raises:
        UsageError: nothing there, or weights of another network, naming the key that differs. The vocabulary may have
            up to NEW_TOKENS more tokens.
        CheckpointError: unreadable, damaged, or tensors that are not those of this network.
    """
    try:
        if where.startswith('hf:'):
            params, size = _of_hugging_face(_hugging_face_folder(where, model.config.family), model)
        elif where.startswith(ADAPTER):
            params, size = _of_adapter(files.local(where.removeprefix(ADAPTER), ''), model)
        elif checkpoint_folder(where):
            loaded = load(where)
            _check_same(model, loaded.model)
            params, size = jax.device_get(loaded.params), loaded.model.config.vocab_size
            if loaded.tokenizer and tokenizer not in (None, loaded.tokenizer.fingerprint):
                own = f'{where} has learned the ids of another tokenizer: that in {loaded.workdir}/tokenizer'
                console.say(f'mixln_jax: warning: config.init_from={own}', file=sys.stderr)
        else:
            raise UsageError(f'not a run of ours; a Hugging Face folder is hf:{where}')
    except (UsageError, CheckpointError) as error:
        raise type(error)(f'config.init_from={where}: {error}') from None
    return _with_new_tokens(params, size, model)


def _with_new_tokens(params: Any, vocab_size: int, model: Network) -> Any:
    """Returns the numpy parameters of a network of `vocab_size` tokens as those of `model`, which may have more: the
    vector of each new token is the mean of the old ones (Hewitt 2021, "Initializing New Word Embeddings")."""
    wanted = model.config.vocab_size
    if wanted == vocab_size:
        return params
    console.say(f'mixln_jax: {wanted - vocab_size:,} new tokens begin with the mean of the {vocab_size:,} vectors')

    def enlarged(path: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
        axis = model.padded.get(trees.path_name(path))
        if axis is None:
            return leaf
        known = np.take(leaf, range(vocab_size), axis)
        mean = known.mean(axis, keepdims=True, dtype=np.float32)
        return np.concatenate([known, np.repeat(mean, wanted - vocab_size, axis)], axis)

    return model.with_padding(jax.tree_util.tree_map_with_path(enlarged, params))


def _of_hugging_face(folder: pathlib.Path, model: Network) -> tuple[Any, int]:
    """Returns the parameters of a Hugging Face folder, and the size of its vocabulary."""
    found, stated = hf_config.read(folder / 'config.json')
    _check_same(model, found, stated)
    return hf.read(folder, model.norm_position)[1], found.config.vocab_size


def _of_adapter(folder: pathlib.Path, model: Network) -> tuple[Any, int]:
    """Returns the parameters of the base that a folder of peft names, with its adapters merged into them, and the size
    of its vocabulary."""
    config = peft.read_config(folder)
    name = config.get(peft.BASE) or ''
    candidates = [path for path in (pathlib.Path(name), folder / name) if (path / 'config.json').is_file()]
    if not name or not candidates:
        raise UsageError(
            f'{folder / peft.CONFIG}: {peft.BASE}={name!r} is not a folder here: write there the folder of the weights '
            'that were adapted'
        )
    params, size = _of_hugging_face(_hugging_face_folder(f'hf:{candidates[0]}', model.config.family), model)
    about = _of_export(folder)
    if about.get('base') and about['base'] != base_fingerprint(params, about.get('base_dtype')):
        raise CheckpointError(f'{folder} was trained on another base than {candidates[0]}, which {peft.CONFIG} names')
    return peft.merged(folder, config, model, params), size


def base_fingerprint(base: Any, dtype: Any) -> str:
    """Returns the fingerprint of the weights that adapters adapt; `dtype`: config.tune.base_dtype."""
    if dtype not in ('float32', 'bfloat16'):
        raise CheckpointError(f'{EXPORT}: base_dtype={dtype!r} is not float32 or bfloat16')
    return frozen.fingerprint(checksums.describe(tuning.in_base_dtype(base, dtype)))


def _hugging_face_folder(where: str, family: str) -> pathlib.Path:
    """Returns the folder of `hf:FOLDER`. Raises UsageError if it is a run, or a BERT, which no network here starts
    from: the head of Hugging Face's has a bias over the vocabulary."""
    if where == 'hf:':
        raise UsageError('hf: must be followed by a folder')
    folder = files.local(where.removeprefix('hf:'), '')
    tensors.refuse_others(folder)
    if hf.is_bert(folder):
        raise UsageError(
            f'{folder} is a BERT, config.model.family is {family}: only folders of LLaMA can start a run; a BERT can '
            'start from a run of config.model.family=bert'
        )
    return folder


def ramp_offset(config: configs.Config) -> int:
    """Returns how many updates the ramps of the weights of `config.init_from` have made: they go on from there.

    It is 0 for random weights. The ramps of a Hugging Face folder that does not state their step have ended.

    Raises:
        UsageError, CheckpointError: as `initial`.
    """
    sizes, where = config.model, config.init_from
    if not where:
        return 0
    done = sizes.ramp_steps * sizes.num_layers
    try:
        if where.startswith('hf:'):
            found, _ = hf_config.read(_hugging_face_folder(where, sizes.family) / 'config.json')
            return done if found.trained_steps is None else min(found.trained_steps, done)
        if where.startswith(ADAPTER) or not (folder := checkpoint_folder(where)):
            return 0  # `initial` says what is wrong
        earlier = configs.read(folder.parents[1] / 'config.json').model
        return min(earlier.ramp_start + int(folder.name), done)
    except (UsageError, CheckpointError) as error:
        raise type(error)(f'config.init_from={where}: {error}') from None


def _check_same(model: Network, found: Any, stated: bool = True) -> None:
    """Raises UsageError where weights belong to another network than `model`; `stated`: whether they say placements."""

    def facts(of: Any) -> dict[str, Any]:
        found = {name: getattr(of.config, name) for name in configs.same_weights()}
        found |= {'num_kv_heads': of.config.kv_heads, 'head_dim': of.config.head_size}
        if of.config.rope_type == 'llama3':
            found |= {name: getattr(of.config, name) for name in hf_config.ROPE}
        if any(placements.PLACEMENTS[name].attention.grouped for name in of.norm_position):
            found['norm_groups'] = of.config.norm_groups
        if stated and placements.has_ramp(of.norm_position):
            found['ramp_steps'] = of.config.ramp_steps
        return found | ({'norm_position': hf_config.spell(of.norm_position)} if stated else {})

    ours, theirs = facts(model), facts(found)
    for name, value in ours.items():
        if name == 'vocab_size' and 0 < value - theirs[name] <= NEW_TOKENS:
            continue
        if theirs.get(name, value) != value:
            raise UsageError(f'its network has {name} {theirs[name]}, config.model.{name} is {value}')
    for number, (one, other) in enumerate(zip(_constants(model), _constants(found), strict=True), 1):
        if stated and one != other:
            raise UsageError(
                f'its layer {number} is layer {found.layer_index[number - 1]} of {found.depth}, with other constants'
            )


def _constants(model: Any) -> list[list[tuple[dict[str, list[float]], int]]]:
    layers = [placements.PLACEMENTS[name] for name in model.norm_position]
    return [
        [(at.constants([index], model.depth), index if at.ramp else 0) for at in (layer.attention, layer.mlp)]
        for layer, index in zip(layers, model.layer_index, strict=True)
    ]

"""The weights that `config.init_from` names, as those that a network begins with."""

import pathlib
import sys
from typing import Any

import jax
import numpy as np

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models import hf, placements, vit
from mixln_jax.models.hf import config as hf_config
from mixln_jax.models.hf import llama, peft, tensors
from mixln_jax.models.hf import vit as hf_vit
from mixln_jax.models.network import Network
from mixln_jax.program import tuning
from mixln_jax.runs import checksums, frozen, weights
from mixln_jax.system import console, files
from mixln_jax.system.errors import CheckpointError, UsageError

ADAPTER = 'adapter:'  # begins an init_from
RESIZED = 'num_classes', 'image_size'  # keys of config.model that may differ: see `_of_other_images`
NEW_TOKENS = 1024  # that a vocabulary may have more than the weights, at most; more belong to another tokenizer


def initial(where: str, model: Network, tokenizer: str | None = None) -> Any:
    """Returns what `config.init_from` names as parameters of `model`, numpy arrays: no device needs to hold them all.

    Args:
        where: `hf:FOLDER`, `adapter:FOLDER` of peft, or what `weights.load` opens as ours.
        model: the network that is to start from them. A Hugging Face folder that does not say its placement, as the
            authors' do not, is read under this network's.
        tokenizer: fingerprint of the new run's, for a warning if a run of ours had another one; None: it is not known.

    Returns:
        All parameters, but for the head where the weights have one for words and `model` has `num_outputs`, or one
        for another number of classes.

    Raises:
        UsageError: nothing there, or weights of another network, naming the key that differs. The vocabulary may have
            up to NEW_TOKENS more tokens. A head with `num_outputs` that has learned the ids of another tokenizer.
        CheckpointError: unreadable, damaged, or tensors that are not those of this network.
    """
    try:
        if where.startswith('hf:'):
            params, found = _of_hugging_face(_hugging_face_folder(where, model.config.family), model)
        elif where.startswith(ADAPTER):
            params, found = _of_adapter(files.local(where.removeprefix(ADAPTER), ''), model)
        elif weights.checkpoint_folder(where):
            loaded = weights.load(where)
            _check_same(model, loaded.model)
            params, found = jax.device_get(loaded.params), loaded.model
            if loaded.tokenizer and tokenizer not in (None, loaded.tokenizer.fingerprint):
                learned = f'has learned the ids of another tokenizer: that in {loaded.workdir}/tokenizer'
                if found.num_outputs:
                    raise UsageError(f'its head {learned}')
                console.say(f'mixln_jax: warning: config.init_from={where} {learned}', file=sys.stderr)
        else:
            raise UsageError(f'not a run of ours; a Hugging Face folder is hf:{where}')
    except (UsageError, CheckpointError) as error:
        raise type(error)(f'config.init_from={where}: {error}') from None
    if model.reads == 'images':
        return _of_other_images(params, found, model, where)
    return _with_new_tokens(_without_head(params, found, model, where), found.config.vocab_size, model)


def _without_head(params: Any, found: Network, model: Network, where: str) -> Any:
    """Returns parameters without the head for words where `model` has another one, which stays as it was drawn."""
    if found.num_outputs == model.num_outputs:
        return params
    console.say(f'mixln_jax: the head, of size {model.num_outputs}, is new: that of {where} is for words')
    return {name: part for name, part in params.items() if name != 'head'}


def _of_other_images(params: Any, found: Network, model: Network, where: str) -> Any:
    """Returns the parameters of a ViT as those of `model`, which may have other classes, so that its head stays as it
    was drawn, or other image sizes, to which learned positions are resized."""
    theirs, ours = found.config, model.config
    if 'classes' not in params or theirs.num_classes != ours.num_classes:
        known = f'{theirs.num_classes} classes' if 'classes' in params else 'none'
        console.say(f'mixln_jax: the head, for {ours.num_classes} classes, is new: that of {where} is for {known}')
        params = {name: part for name, part in params.items() if name != 'classes'}
    if theirs.image_size == ours.image_size:
        return params
    sides = f'images of {theirs.image_size} pixels are those of {where}, these have {ours.image_size}'
    if 'positions' not in params:
        console.say(f'mixln_jax: {sides}: positions are computed, none are resized')
        return params
    before, after = (at.config.image_size // at.config.patch_size for at in (found, model))
    grids = f'from {before} x {before} to {after} x {after}'
    console.say(f'mixln_jax: {sides}: learned positions are resized, bicubically, {grids}')
    table = vit.resized_positions(params['positions']['embedding'], before, after)
    return params | {'positions': {'embedding': table}}


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


def _of_hugging_face(folder: pathlib.Path, model: Network) -> tuple[Any, Network]:
    """Returns the parameters of a Hugging Face folder, and its network."""
    if hf_vit.is_vit(folder):
        found_vit, params = hf_vit.read(folder)
        _check_same(model, found_vit)
        return params, found_vit
    found, stated = hf_config.read(folder / 'config.json')
    _check_same(model, found, stated)
    return llama.read(folder, model.norm_position)[1], found


def _of_adapter(folder: pathlib.Path, model: Network) -> tuple[Any, Network]:
    """Returns the parameters of the base that a folder of peft names, with its adapters merged into them, and the
    base's network."""
    config = peft.read_config(folder)
    name = config.get(peft.BASE) or ''
    candidates = [path for path in (pathlib.Path(name), folder / name) if (path / 'config.json').is_file()]
    if not name or not candidates:
        raise UsageError(
            f'{folder / peft.CONFIG}: {peft.BASE}={name!r} is not a folder here: write there the folder of the weights '
            'that were adapted'
        )
    params, found = _of_hugging_face(_hugging_face_folder(f'hf:{candidates[0]}', model.config.family), model)
    about = weights.about_export(folder)
    if about.get('base') and about['base'] != base_fingerprint(params, about.get('base_dtype')):
        raise CheckpointError(f'{folder} was trained on another base than {candidates[0]}, which {peft.CONFIG} names')
    return peft.merged(folder, config, model, params), found


def base_fingerprint(base: Any, dtype: Any) -> str:
    """Returns the fingerprint of the weights that adapters adapt; `dtype`: config.tune.base_dtype."""
    if dtype not in ('float32', 'bfloat16'):
        raise CheckpointError(f'{weights.EXPORT}: base_dtype={dtype!r} is not float32 or bfloat16')
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
            f'{folder} is a BERT, config.model.family is {family}: only folders of LLaMA and ViT can start a run; '
            'a BERT can start from a run of config.model.family=bert'
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
            source = _hugging_face_folder(where, sizes.family)
            is_vit = hf_vit.is_vit(source)
            found = hf_vit.read(source)[0] if is_vit else hf_config.read(source / 'config.json')[0]
            return done if found.trained_steps is None else min(found.trained_steps, done)
        if where.startswith(ADAPTER) or not (folder := weights.checkpoint_folder(where)):
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

    if found.num_outputs not in (0, model.num_outputs):
        wanted = f'of size {model.num_outputs}' if model.num_outputs else 'for words'
        raise UsageError(f'its network has a head of size {found.num_outputs}, this one has a head {wanted}')
    ours, theirs = facts(model), facts(found)
    for name, value in ours.items():
        if name in RESIZED or (name == 'vocab_size' and 0 < value - theirs[name] <= NEW_TOKENS):
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

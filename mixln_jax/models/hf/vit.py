"""Hugging Face folders of ViT: transformers' ViTForImageClassification, and those that timm reads its weights from.

Tensors have the names that the Hub's folders have, which transformers 4 and 5 both read. Networks that the stock class
cannot express have the same names where it has one, and a modelling file. timm's folders are in `timm.py`.
"""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models import vit
from mixln_jax.models.hf import config as hf_config
from mixln_jax.models.hf import tensors, timm
from mixln_jax.models.network import Network
from mixln_jax.system.errors import CheckpointError, UsageError, reading

CONFIG_KEYS = {
    'hidden_size': 'hidden_size',
    'intermediate_size': 'intermediate_size',
    'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads',
    'norm_eps': 'layer_norm_eps',
    'image_size': 'image_size',
    'patch_size': 'patch_size',
}
FIXED = {'num_channels': 3, 'qkv_bias': True}  # further keys, and the only value with which `vit` computes
GELUS = {'gelu': 'erf', 'gelu_pytorch_tanh': 'tanh', 'gelu_new': 'tanh'}
KINDS = ('positions', 'pool', 'representation')  # keys of ours that a folder of OTHER_TYPE has
STOCK = {'positions': 'learned', 'pool': vit.TOKEN, 'representation': False}  # what the stock class computes
STOCK_TYPE, OTHER_TYPE = 'vit', 'mixln_vit'
MODELLING = [hf_config.MODELLING.with_name(name) for name in ('modeling_mixln_vit.py', 'modeling_mixln.py')]
PROCESSOR = 'preprocessor_config.json'
RESAMPLE = {'bilinear': 2, 'bicubic': 3}  # numbers of Pillow's filters
WHOLE = {
    'patch': 'embeddings.patch_embeddings.projection',
    'token': 'embeddings.cls_token',
    'positions': 'embeddings.position_embeddings',
    'embed_norm': 'embeddings.embed_norm',
    'norm': 'layernorm',
    'representation': 'representation',
}
LAYER = {
    'attention/q': 'attention.attention.query',
    'attention/k': 'attention.attention.key',
    'attention/v': 'attention.attention.value',
    'attention/o': 'attention.output.dense',
    'attention/q_norm': 'attention.attention.query_norm',
    'attention/k_norm': 'attention.attention.key_norm',
    'attention/v_norm': 'attention.attention.value_norm',
    'mlp/up': 'intermediate.dense',
    'mlp/down': 'output.dense',
}
STOCK_NORMS = {'attention_norm_in': 'layernorm_before', 'mlp_norm_in': 'layernorm_after'}
PREFIX, HEAD = 'vit.', 'classifier'
LAYOUTS = TRANSFORMERS, TIMM = ('transformers', 'timm')  # whose folders are written
UNUSED = re.compile(r'(vit\.)?(pooler\..*|embeddings\.mask_token)')  # of ViTModel, and of masked pre-training


def tensor_name(path: str, norm_position: Sequence[str], stock: bool, prefix: str = PREFIX) -> str:
    """Returns the name of the tensor of a leaf.

    Args:
        path: names joined by slashes; leaves of layer l (from 0) begin with `layers/<l>`.
        norm_position: placement name of each layer.
        stock: whether the stock class computes the network.
        prefix: before the names of all tensors but the head's.
    """
    module, _, leaf = path.rpartition('/')
    value = {'embedding': '', 'bias': '.bias'}.get(leaf, '.weight')
    if module == 'classes':
        return f'{HEAD}{value}'
    if module in WHOLE:
        return f'{prefix}{WHOLE[module]}{value}'
    _, number, inside = path.split('/', 2)
    layer = f'{prefix}encoder.layer.{number}'
    if inside in hf_config.LEARNED:
        return f'{layer}.{hf_config.LEARNED[inside]}'
    inside = inside.rpartition('/')[0]
    norm = STOCK_NORMS.get(inside) if stock else hf_config.norm_name(norm_position[int(number)], inside)
    return f'{layer}.{norm or LAYER[inside]}{value}'


def is_vit(folder: pathlib.Path) -> bool:
    """Returns whether a folder is a ViT's. Raises CheckpointError if its config.json cannot be read."""
    path = folder / 'config.json'
    if not path.is_file():
        return False
    content = hf_config.read_json(path)
    return content.get('model_type') in (STOCK_TYPE, OTHER_TYPE) or timm.is_timm(content)


def load(
    folder: str | pathlib.Path, norm_position: str | Sequence[str] | None = None, compute_dtype: str = 'float32'
) -> tuple[vit.ViT, Any]:
    """Returns the network and the parameters of a ViT folder.

    Args:
        folder: of transformers or timm: config.json and safetensors. preprocessor_config.json or timm's pretrained_cfg
            have the mean and deviation of pixels; without them they are 0.5, as in transformers.
        norm_position: if it is given, it has to be that of the folder, which is Pre-LN if it states none.
        compute_dtype: of the network; weights are float32.

    Returns:
        (model, params): `logits, out = model.apply({'params': params}, {'images': images})`.

    Raises:
        UsageError: no such folder or file, a run of ours, or another `norm_position`.
        CheckpointError: unreadable content, a network that is not modelled here, or one without a head; tensors
            missing or left over, wrong shapes.
    """
    model, params = read(folder, norm_position, compute_dtype)
    if 'classes' not in params:
        raise CheckpointError(f'{folder} has no head for classes: it can only start a run (config.init_from=hf:DIR)')
    return model, jax.tree.map(jnp.asarray, params)


def read(
    folder: str | pathlib.Path, norm_position: str | Sequence[str] | None = None, compute_dtype: str = 'float32'
) -> tuple[vit.ViT, Any]:
    """Returns what `load` returns, in numpy arrays, and without a head if the folder has none."""
    folder = pathlib.Path(folder)
    tensors.refuse_others(folder)
    path = folder / 'config.json'
    content = hf_config.read_json(path)
    arrays = {name: tensor for name, tensor in tensors.read(folder).items() if not UNUSED.fullmatch(name)}
    name_of: Callable[[str], str]
    if timm.is_timm(content):
        config = timm.model_config(path, content, {name: tensor.shape for name, tensor in arrays.items()})
        model = _network(path, {}, config, norm_position, compute_dtype)
        arrays, name_of, head = timm.split(arrays), timm.tensor_name, timm.HEAD
    else:
        with reading(path, CheckpointError, 'not the config.json of a network'):
            model = _network(path, content, _model_config(path, content), norm_position, compute_dtype)
        prefix = PREFIX if any(name.startswith(PREFIX) for name in arrays) else ''
        stock, head = is_stock(model), HEAD
        name_of = lambda path: tensor_name(path, model.norm_position, stock, prefix)  # noqa: E731
    shapes = model.shapes()['params']
    if not any(name.startswith(f'{head}.') for name in arrays):
        del shapes['classes']
    described = f'norm_position={model.config.norm_position}'
    return model, tensors.fill(folder, _flat(arrays), shapes, model.norm_position, name_of, described)


def _flat(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors of torch with the axes of ours: patches [D,3,P,P] as [D,P*P*3], tables [1,T,D] as [T,D]."""

    def flat(tensor: np.ndarray) -> np.ndarray:
        if tensor.ndim == 4:
            return tensor.transpose(0, 2, 3, 1).reshape(len(tensor), -1)
        return tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor

    return {name: flat(tensor) for name, tensor in arrays.items()}


def _unflat(path: str, leaf: np.ndarray, patch: int) -> np.ndarray:
    """Returns a leaf with the axes of torch's tensor; the inverse of `_flat`."""
    if path == 'patch/kernel':
        return leaf.T.reshape(-1, patch, patch, 3).transpose(0, 3, 1, 2)
    return leaf[None] if path.endswith('embedding') else leaf.T if path.endswith('kernel') else leaf


def _network(
    path: pathlib.Path,
    content: Mapping[str, Any],
    config: configs.Model,
    norm_position: str | Sequence[str] | None,
    compute_dtype: str,
) -> vit.ViT:
    """Returns the network of these sizes with the layers that a config.json states."""
    other = content.get('model_type') == OTHER_TYPE
    layers = hf_config.layers(path, content, config, norm_position, other)
    model = vit.ViT(*layers, compute_dtype, trained_steps=hf_config.ramp_step(path, content))
    if other:
        hf_config.check_described(path, content, model, _content(model))
    elif set(layers[1]) != {'pre'}:
        raise UsageError(f'{path} is Pre-LN, not {model.config.norm_position}')
    return model


def _model_config(path: pathlib.Path, content: Mapping[str, Any]) -> configs.Model:
    """Returns config.Model of a config.json of transformers, without its placement."""
    values = hf_config.take(path, content, CONFIG_KEYS, FIXED)
    for name in ('image_size', 'patch_size'):
        side = values[name]
        if isinstance(side, list) and len(side) == 2 and side[0] == side[1]:
            values[name] = side[0]
    activation = content.get('hidden_act')
    if not isinstance(activation, str) or activation not in GELUS:
        raise CheckpointError(f'{path}: hidden_act={activation!r} is not modelled here, only {", ".join(GELUS)}')
    other = content.get('model_type') == OTHER_TYPE
    values |= {name: content.get(name) for name in KINDS} if other else STOCK
    for name in ('norm_groups', 'ramp_steps'):
        if content.get(name) is not None:
            values[name] = content[name]
    values |= {'num_classes': len(hf_config.label_names(path, content)), 'gelu': GELUS[activation]}
    return hf_config.build(path, values | {'family': 'vit', 'norm_position': 'pre', 'pixels': _pixels(path.parent)})


def _pixels(folder: pathlib.Path) -> str:
    """Returns the name of the mean and deviation that preprocessor_config.json states."""
    path = folder / PROCESSOR
    content = hf_config.read_json(path) if os.path.lexists(path) else {}
    expected = {'do_rescale': True, 'rescale_factor': 1 / 255, 'do_normalize': True}
    for name, value in expected.items():
        if (found := content.get(name, value)) is not value and not (isinstance(found, float) and found == value):
            raise CheckpointError(f'{path}: {name}={found!r} is not modelled here, only {value!r}')
    return hf_config.named_pixels(path, content.get('image_mean', [0.5] * 3), content.get('image_std', [0.5] * 3))


def is_stock(model: Network) -> bool:
    """Returns whether ViTForImageClassification computes a network."""
    return {name: getattr(model.config, name) for name in KINDS} == STOCK and _is_plain(model)


def _is_plain(model: Network) -> bool:
    """Returns whether all layers of a network are Pre-LN, without anything else."""
    pre = {name: {'pre': hf_config.STOCK_NORMS[f'{name}_norm_in']} for name in ('attention', 'mlp')}
    return all(layer == pre for layer in hf_config.described(model))


def _content(model: Network, names: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the config.json of a network; `names`: of its classes."""
    config, stock = model.config, is_stock(model)
    kind, module = 'ForImageClassification', MODELLING[0].stem
    auto_map = {'AutoConfig': f'{module}.MixlnViTConfig', f'AutoModel{kind}': f'{module}.MixlnViT{kind}'}
    gelu = next(theirs for theirs, ours in GELUS.items() if ours == config.gelu)
    return {
        'architectures': [f'{"ViT" if stock else "MixlnViT"}{kind}'],
        'model_type': STOCK_TYPE if stock else OTHER_TYPE,
        **({} if stock else {'auto_map': auto_map} | {name: getattr(config, name) for name in KINDS}),
        **hf_config.labels(names or [f'LABEL_{number}' for number in range(config.num_classes)]),
        **{theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS.items()},
        **FIXED,
        'hidden_act': gelu,
        'hidden_dropout_prob': 0.0,
        'attention_probs_dropout_prob': 0.0,
        'initializer_range': config.init_std,
        **hf_config.stated_layers(model, None if stock else hf_config.described(model)),
    }


def _processor(config: configs.Model, images: configs.Images | None) -> dict[str, Any]:
    """Returns preprocessor_config.json: how transformers makes of an image what our evaluation makes of it."""
    size, (mean, deviation) = config.image_size, vit.PIXELS[config.pixels]
    content: dict[str, Any] = {'do_resize': True, 'do_rescale': True, 'rescale_factor': 1 / 255, 'do_normalize': True}
    content |= {'image_mean': list(mean), 'image_std': list(deviation)}
    if images is None:
        return content | {'image_processor_type': 'ViTImageProcessor', 'size': {'height': size, 'width': size}}
    resized = {'shortest_edge': round(size / images.eval_crop)}
    crop = {'do_center_crop': True, 'crop_size': {'height': size, 'width': size}, 'do_convert_rgb': True}
    resample = RESAMPLE[images.interpolation]
    return content | crop | {'image_processor_type': 'CLIPImageProcessor', 'size': resized, 'resample': resample}


def save(
    folder: str | pathlib.Path,
    model: vit.ViT,
    params: Any,
    dtype: str = 'float32',
    max_shard_gb: float = 5.0,
    names: Sequence[str] = (),
    images: configs.Images | None = None,
    layout: str = TRANSFORMERS,
) -> None:
    """Writes a folder that `load` and transformers or timm read.

    Pre-LN networks with learned positions whose head reads a token become stock ViT. All others have a modelling file
    that `AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)` runs. For timm, sines and
    cosines become a table of learned positions.

    Args:
        folder: an empty folder, or one that does not exist yet.
        model: the network; its compute_dtype does not matter.
        params: its parameters, whole in this process.
        dtype: float32 or bfloat16.
        max_shard_gb: largest size of a file; see `llama.save`.
        names: of the classes; empty: LABEL_0 and so on.
        images: how the run prepares images for evaluation; None: it is not known.
        layout: one of LAYOUTS.

    Raises UsageError: a folder with something in it, bad options, or a network that such a folder cannot describe.
    """
    folder, params = pathlib.Path(folder), jax.device_get(params)
    tensors.check_options(dtype, max_shard_gb)
    name_of: Callable[[str], str] = timm.tensor_name
    modules: Sequence[pathlib.Path] = ()
    if of_timm := layout == TIMM:
        contents = {'config.json': timm.content(model, _is_plain(model), names, images)}
        params = timm.with_table(model, params)
    else:
        stock = is_stock(model)
        name_of = lambda path: tensor_name(path, model.norm_position, stock)  # noqa: E731
        kinds = {'dtype': dtype, 'torch_dtype': dtype}  # the latter for transformers 4
        contents = {'config.json': _content(model, names) | kinds, PROCESSOR: _processor(model.config, images)}
        modules = () if stock else MODELLING
    named: dict[str, np.ndarray] = {}
    for path, leaf in trees.named_leaves(tensors.by_layer(params, model.norm_position)):
        name = name_of(path)
        if name in named:
            raise UsageError(f'two parameters of {hf_config.spell(model.norm_position)} have the tensor name {name}')
        named[name] = _unflat(path, leaf, model.config.patch_size)
    tensors.make_empty(folder)
    tensors.write(folder, timm.join(named) if of_timm else named, jnp.dtype(dtype), int(max_shard_gb * 1e9))
    for module in modules:
        shutil.copy(module, folder)
    for file, keys in contents.items():
        (folder / file).write_text(json.dumps(keys, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

"""Folders of timm's Vision Transformers: config.json with an `architecture`, and the names of their tensors.

After timm 1.0, models/vision_transformer.py: `VisionTransformer` with the defaults of its builders. What is written,
`timm.create_model('local-dir:FOLDER', pretrained=True)` opens.
"""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixln_jax import config as configs
from mixln_jax.models import vit
from mixln_jax.models.hf import config as hf_config
from mixln_jax.system.errors import CheckpointError, UsageError, reading

# Names of VisionTransformer without options that change what it computes, and the heads of each size.
ARCHITECTURE = re.compile(r'vit_(tiny|small|base|large|huge)_patch\d+_\d+')
HEADS = {'tiny': 3, 'small': 6, 'base': 12, 'large': 16, 'huge': 16}
BUILDERS = {384: 'vit_small_patch16_224', 768: 'vit_base_patch16_224', 1024: 'vit_large_patch16_224'}  # by width
BUILDERS |= {1280: 'vit_huge_patch14_224'}
ANY_WIDTH = 'vit_tiny_patch16_224'  # `model_args` state all sizes, so that the builder is only a name
ARGUMENTS = {  # of the class that may be stated: those that tensors show, or that evaluation does not use; others below
    'img_size', 'patch_size', 'embed_dim', 'depth', 'mlp_ratio', 'num_classes', 'class_token', 'num_heads',
    'global_pool', 'fc_norm', 'act_layer', 'drop_rate', 'pos_drop_rate', 'patch_drop_rate', 'proj_drop_rate',
    'attn_drop_rate', 'drop_path_rate', 'weight_init', 'fix_init',
}  # fmt: skip
FIXED = {  # further ones, and the only value with which `vit` computes, the class's own
    'in_chans': 3, 'qkv_bias': True, 'qk_norm': False, 'proj_bias': True, 'init_values': None, 'pos_embed': 'learn',
    'no_embed_class': False, 'reg_tokens': 0, 'pre_norm': False, 'final_norm': True, 'pool_include_prefix': False,
    'dynamic_img_size': False, 'dynamic_img_pad': False, 'norm_layer': None, 'embed_norm_layer': None,
}  # fmt: skip
GELUS = {'gelu': 'erf', 'gelu_tanh': 'tanh'}
EPS = 1e-6  # of timm's LayerNorm
WHOLE = {
    'patch': 'patch_embed.proj',
    'token': 'cls_token',
    'positions': 'pos_embed',
    'norm': 'norm',
    'representation': 'pre_logits.fc',  # which timm had before version 0.8
    'classes': 'head',
}
LAYER = {
    'attention/q': 'attn.qkv.q',
    'attention/k': 'attn.qkv.k',
    'attention/v': 'attn.qkv.v',
    'attention/o': 'attn.proj',
    'attention_norm_in': 'norm1',
    'mlp_norm_in': 'norm2',
    'mlp/up': 'mlp.fc1',
    'mlp/down': 'mlp.fc2',
}
HEAD, LABELS = 'head', 'label_names'


def is_timm(content: Mapping[str, Any]) -> bool:
    """Returns whether a config.json is timm's."""
    return 'architecture' in content and 'model_type' not in content


def tensor_name(path: str) -> str:
    """Returns the name of the tensor of a leaf, after `split`; see `vit.tensor_name`."""
    module, _, leaf = path.rpartition('/')
    value = {'embedding': '', 'bias': '.bias'}.get(leaf, '.weight')
    if module in WHOLE:
        return f'{WHOLE[module]}{value}'
    _, number, inside = module.split('/', 2)
    return f'blocks.{number}.{LAYER[inside]}{value}'


def split(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors with `attn.qkv`, which has queries, keys and values one below the other, as three."""
    found: dict[str, np.ndarray] = {}
    for name, tensor in arrays.items():
        module, _, value = name.rpartition('.')
        if module.endswith('attn.qkv') and tensor.ndim and len(tensor) % 3 == 0:
            found |= {f'{module}.{part}.{value}': third for part, third in zip('qkv', np.split(tensor, 3), strict=True)}
        else:
            found[name] = tensor
    return found


def join(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns tensors with queries, keys and values in one; the inverse of `split`."""
    joined: dict[str, np.ndarray] = {}
    for name in arrays:
        module, _, value = name.rpartition('.')
        if module.endswith('attn.qkv.q'):
            whole = module.removesuffix('.q')
            joined[f'{whole}.{value}'] = np.concatenate([arrays[f'{whole}.{part}.{value}'] for part in 'qkv'])
        elif not module.endswith(('attn.qkv.k', 'attn.qkv.v')):
            joined[name] = arrays[name]
    return joined


def with_table(model: vit.ViT, params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns parameters with sines and cosines as a table of learned positions, zeros for a token."""
    if 'positions' in params:
        return dict(params)
    table = vit.sincos2d(model.grid, model.config.hidden_size)
    zeros = np.zeros((model.row_length(0) - len(table), table.shape[1]), np.float32)
    return dict(params, positions={'embedding': np.concatenate([zeros, table])})


def content(
    model: vit.ViT, plain: bool, names: Sequence[str] = (), images: configs.Images | None = None
) -> dict[str, Any]:
    """Returns the config.json of a network, with the keys of timm's save_config_for_hf.

    Args:
        model: the network.
        plain: whether its layers are Pre-LN, without anything else.
        names: of the classes; empty: none are stated.
        images: how the run prepares images for evaluation; None: it is not known.

    Raises UsageError: a network that timm's class does not compute.
    """
    config = model.config
    for obstacle, words in (
        (not plain, f'norm_position={hf_config.spell(model.norm_position)}: timm has pre alone'),
        (config.representation, 'representation=True: timm has no layer between the last norm and the head'),
        (config.norm_eps != EPS, f'norm_eps={config.norm_eps}: timm has {EPS}'),
    ):
        if obstacle:
            raise UsageError(f'--format timm: config.model.{words}; leave out --format for a folder of transformers')
    token, (mean, deviation) = config.pool == vit.TOKEN, vit.PIXELS[config.pixels]
    pool, width, hidden = 'token' if token else 'avg', config.hidden_size, config.intermediate_size
    ratio = next(ratio for ratio in (hidden / width, (hidden + 0.5) / width) if int(width * ratio) == hidden)
    arguments: dict[str, Any] = {'global_pool': pool, 'embed_dim': width}
    arguments |= {'img_size': config.image_size, 'patch_size': config.patch_size}
    arguments |= {'depth': config.num_layers, 'num_heads': config.num_heads, 'mlp_ratio': ratio}
    arguments |= {} if token else {'class_token': False, 'fc_norm': False}
    arguments |= {'act_layer': next(theirs for theirs, ours in GELUS.items() if ours == config.gelu)}
    stated: dict[str, Any] = {'input_size': [3, config.image_size, config.image_size], 'fixed_input_size': True}
    stated |= {'mean': list(mean), 'std': list(deviation), 'custom_load': False, 'num_classes': config.num_classes}
    stated |= {'first_conv': 'patch_embed.proj', 'classifier': HEAD, 'crop_mode': 'center', 'pool_size': None}
    stated |= {'crop_pct': images.eval_crop, 'interpolation': images.interpolation} if images else {}
    head: dict[str, Any] = {'architecture': BUILDERS.get(width, ANY_WIDTH), 'num_classes': config.num_classes}
    head |= {'num_features': width, 'global_pool': pool, **({LABELS: list(names)} if names else {})}
    return head | {'model_args': arguments, 'pretrained_cfg': stated}


def label_names(path: pathlib.Path, content: Mapping[str, Any]) -> list[str]:
    """Returns the names of the classes in a config.json, in their order; empty if it has none, or some of them."""
    names = content.get(LABELS) or []
    if isinstance(names, dict):  # timm's, where labels have gaps
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f'{path}: {LABELS} is not a list of names')
    return names


def model_config(path: pathlib.Path, content: Mapping[str, Any], shapes: Mapping[str, tuple]) -> configs.Model:
    """Returns config.Model of a config.json of timm; sizes are those of the tensors, {name: shape}.

    Raises CheckpointError for another architecture, or options that are not modelled here.
    """
    with reading(path, CheckpointError, 'not the config.json of a network of timm'):
        architecture, stated = content['architecture'], content.get('pretrained_cfg') or {}
        arguments = content.get('model_args') or {}
        match = ARCHITECTURE.fullmatch(architecture) if isinstance(architecture, str) else None
        if not match:
            raise CheckpointError(
                f'{path}: architecture={architecture!r} is not modelled here, only vit_SIZE_patchP_S with the sizes '
                f'{", ".join(HEADS)}'
            )
        for name in sorted(arguments.keys() - ARGUMENTS):
            value = arguments[name]
            if name not in FIXED or type(value) is not type(FIXED[name]) or value != FIXED[name]:
                raise CheckpointError(f'{path}: model_args: {name}={value!r} is not modelled here')
        token = 'cls_token' in shapes
        pool = arguments.get('global_pool', content.get('global_pool', 'token'))
        late = arguments.get('fc_norm')
        if pool != ('token' if token else 'avg') or (late if token else late is not False):
            raise CheckpointError(
                f'{path}: global_pool={pool!r}, fc_norm={late!r} {"with" if token else "without"} cls_token are not '
                'modelled here, only token with it, and avg without it after the last norm (fc_norm=false)'
            )
        values: dict[str, Any] = _sizes(path, shapes)
        values |= {'pool': vit.TOKEN if token else vit.GAP, 'positions': 'learned'}
        values |= {'num_heads': arguments.get('num_heads', HEADS[match[1]]), 'norm_eps': EPS, 'family': 'vit'}
        if (activation := arguments.get('act_layer') or 'gelu') not in GELUS:
            raise CheckpointError(f'{path}: model_args: act_layer={activation!r} is not modelled here')
        values |= {'gelu': GELUS[activation], 'norm_position': 'pre'}
        values |= {'representation': 'pre_logits.fc.weight' in shapes}
        values |= {'pixels': hf_config.named_pixels(path, stated.get('mean'), stated.get('std'))}
        return hf_config.build(path, values)


def _sizes(path: pathlib.Path, shapes: Mapping[str, tuple]) -> dict[str, int]:
    """Returns the keys of config.Model that the shapes of tensors show."""
    needed = ('patch_embed.proj.weight', 'pos_embed', 'blocks.0.mlp.fc1.weight')
    for name, axes in zip(needed, (4, 3, 2), strict=True):
        if len(shapes.get(name, ())) != axes:
            raise CheckpointError(f'{path.parent}: no tensor {name} with {axes} axes, which a ViT of timm needs')
    patch, positions, mlp = (shapes[name] for name in needed)
    grid = math.isqrt(positions[1])  # with a token it is one more than a square
    layers = [int(match[1]) for name in shapes if (match := re.fullmatch(r'blocks\.(\d+)\.norm1\.weight', name))]
    found = {'hidden_size': patch[0], 'patch_size': patch[2], 'intermediate_size': mlp[0], 'num_layers': len(layers)}
    return found | {'image_size': grid * patch[2], 'num_classes': shapes.get('head.weight', (2,))[0]}

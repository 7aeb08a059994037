"""Folders of timm's Vision Transformers: config.json with an `architecture`, and the names of their tensors.

After timm 1.0, models/vision_transformer.py: `VisionTransformer` with the defaults of its builders.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixln_jax import config as configs
from mixln_jax.models import vit
from mixln_jax.models.hf import config as hf_config
from mixln_jax.system.errors import CheckpointError, reading

# Names of VisionTransformer without options that change what it computes, and the heads of each size.
ARCHITECTURE = re.compile(r'vit_(tiny|small|base|large|huge)_patch\d+_\d+')
HEADS = {'tiny': 3, 'small': 6, 'base': 12, 'large': 16, 'huge': 16}
ARGUMENTS = {  # of the class that may be stated: those that tensors show, or that evaluation does not use; others below
    'img_size', 'patch_size', 'embed_dim', 'depth', 'mlp_ratio', 'num_classes', 'class_token', 'num_heads',
    'global_pool', 'fc_norm', 'act_layer', 'drop_rate', 'pos_drop_rate', 'patch_drop_rate', 'proj_drop_rate',
    'attn_drop_rate', 'drop_path_rate', 'weight_init', 'fix_init',
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
HEAD = 'head'


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
        if others := sorted(arguments.keys() - ARGUMENTS):
            raise CheckpointError(f'{path}: model_args: {others[0]}={arguments[others[0]]!r} is not modelled here')
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

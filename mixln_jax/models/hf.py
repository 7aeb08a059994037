"""Hugging Face folders (config.json, model.safetensors): tensor names here, nowhere else.

Stock LLaMA names, and the Mix-LN authors' layout for the placements that stock LLaMA cannot express.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.exits import CheckpointError, UsageError
from mixln_jax.models import llama, norms, transformer

MATRICES = {
    'attention/q/kernel': 'self_attn.q_proj.weight',
    'attention/k/kernel': 'self_attn.k_proj.weight',
    'attention/v/kernel': 'self_attn.v_proj.weight',
    'attention/o/kernel': 'self_attn.o_proj.weight',
    'mlp/gate/kernel': 'mlp.gate_proj.weight',
    'mlp/up/kernel': 'mlp.up_proj.weight',
    'mlp/down/kernel': 'mlp.down_proj.weight',
}
STOCK_NORMS = {'attention_norm_in': 'input_layernorm', 'mlp_norm_in': 'post_attention_layernorm'}
OTHER_NORMS = {  # as soon as a layer normalises after a sub-layer
    'attention_norm_in': 'input_layernorm',
    'attention_norm_out': 'post_attention_layernorm',
    'attention_norm_post': 'post_attention_layernorm',
    'mlp_norm_in': 'pre_feedforward_layernorm',
    'mlp_norm_out': 'post_feedforward_layernorm',
    'mlp_norm_post': 'post_feedforward_layernorm',
}
WHOLE = {
    'embed/embedding': 'model.embed_tokens.weight',
    'norm/scale': 'model.norm.weight',
    'head/kernel': 'lm_head.weight',
}
CONFIG_KEYS = {
    'vocab_size': 'vocab_size',
    'hidden_size': 'hidden_size',
    'intermediate_size': 'intermediate_size',
    'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads',
    'norm_eps': 'rms_norm_eps',
}


FIXED = {  # what a config.json may say besides, and the only value that `llama` computes
    'model_type': 'llama',
    'hidden_act': 'silu',
    'rope_scaling': None,
    'rope_parameters.rope_type': 'default',
    'attention_bias': False,
    'mlp_bias': False,
    'tie_word_embeddings': False,
}


def tensor_name(path, norm_position):
    """The tensor of a leaf `layers/<l>/...` (l from 0) or of one outside the layers, `path` joined by slashes."""
    if path in WHOLE:
        return WHOLE[path]
    _, number, inside = path.split('/', 2)
    if inside in MATRICES:
        return f'model.layers.{number}.{MATRICES[inside]}'
    placement = norms.PLACEMENTS[norm_position[int(number)]].attention
    names = OTHER_NORMS if placement.out or placement.post else STOCK_NORMS
    return f'model.layers.{number}.{names[inside.removesuffix("/scale")]}.weight'


def load(folder, norm_position=None, compute_dtype='float32'):
    """Reads a LLaMA folder.

    Args:
        folder: holds config.json and model.safetensors.
        norm_position: as in a config, or a sequence of L names. None: what config.json says, or Pre-LN for stock LLaMA.
        compute_dtype: of the network; weights are float32.

    Returns:
        (model, params): `logits, out = model.apply({'params': params}, input_ids, capture=True)`.

    Raises:
        UsageError: no such folder or file, or a `norm_position` that does not fit.
        CheckpointError: unreadable content, tensors missing or left over (so another placement), wrong shapes.
    """
    folder = pathlib.Path(folder)
    config = read_config(folder, norm_position)
    model = llama.from_config(config, compute_dtype)
    tensors = _read_tensors(folder / 'model.safetensors')

    def take(path, leaf):
        path = trees.path_name(path)
        name = tensor_name(path, model.norm_position)
        if name not in tensors:
            raise CheckpointError(f'{folder}: no tensor {name}, which norm_position={config.norm_position} needs')
        tensor = tensors.pop(name)
        if tensor.dtype.kind in 'iub' or not np.isfinite(tensor := tensor.astype(np.float32)).all():
            raise CheckpointError(f'{folder}: tensor {name} is not finite numbers ({tensor.dtype})')
        tensor = tensor.T if path.endswith('kernel') else tensor
        axis = {'embed/embedding': 0, 'head/kernel': 1}.get(path)
        expected = tuple(config.vocab_size if at == axis else size for at, size in enumerate(leaf.shape))
        if tensor.shape != expected:
            raise CheckpointError(f'{folder}: tensor {name} has shape {tensor.shape}, config.json makes it {expected}')
        return np.pad(tensor, [(0, size - n) for size, n in zip(leaf.shape, expected, strict=True)])

    shapes = jax.eval_shape(lambda: _by_layer(model.init(jax.random.key(0))['params'], model.norm_position))
    params = jax.tree_util.tree_map_with_path(take, shapes)
    if tensors:
        raise CheckpointError(
            f'{folder}: tensor {min(tensors)} has no place in a network with norm_position={config.norm_position}'
        )
    params['layers'] = transformer.stack_layers(params['layers'], model.norm_position)
    return model, jax.tree.map(jnp.asarray, params)


def read_config(folder, norm_position=None):
    """config.Model of a Hugging Face folder; errors as in `load`."""
    path = folder / 'config.json'
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f'{path} does not exist') from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{path} is not readable JSON: {error}') from None
    if not isinstance(found, dict):
        raise CheckpointError(f'{path} is not a JSON object')
    for name in CONFIG_KEYS.values():
        if name not in found:
            raise CheckpointError(f'{path} has no key {name}')
    values = {ours: found[theirs] for ours, theirs in CONFIG_KEYS.items()}
    rope = found.get('rope_parameters') or {}  # transformers 5; before it rope_theta and rope_scaling
    for name, value in (found | {f'rope_parameters.{name}': value for name, value in rope.items()}).items():
        if name in FIXED and value not in (None, FIXED[name]):
            raise CheckpointError(f'{path}: {name}={value!r} is not modelled here, only {FIXED[name]!r}')
    kv_heads = found.get('num_key_value_heads') or values['num_heads']
    values['num_kv_heads'] = 0 if kv_heads == values['num_heads'] else kv_heads
    values['rope_theta'] = rope.get('rope_theta', found.get('rope_theta', 10000.0))
    values['norm_position'] = norm_position or found.get('norm_position', 'pre')
    if not isinstance(values['norm_position'], str):
        values['norm_position'] = ','.join(values['norm_position'])
    try:
        config = configs.build({'model': values}).model
    except UsageError as error:
        raise CheckpointError(f'{path}: {error}') from None
    if found.get('head_dim') not in (None, config.hidden_size // config.num_heads):
        raise CheckpointError(f'{path}: head_dim={found["head_dim"]} is not hidden_size / num_attention_heads')
    return config


def _by_layer(params, norm_position):
    return dict(params, layers=transformer.split_layers(params['layers'], norm_position))


def _read_tensors(path):
    try:
        return safetensors.numpy.load_file(path)
    except FileNotFoundError:
        raise UsageError(f'{path} does not exist') from None
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f'{path} is not a readable safetensors file: {error}') from None

"""Hugging Face folders (config.json, safetensors) of LLaMA's family, and the names of their tensors.

Stock LLaMA names, and the Mix-LN authors' layout for the placements that stock LLaMA cannot express.
"""

import json
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
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.models import rope
from mixln_jax.models.hf import config as hf_config
from mixln_jax.models.hf import tensors
from mixln_jax.models.llama import Llama
from mixln_jax.models.network import SCORE, Network
from mixln_jax.system.errors import CheckpointError, UsageError

MATRICES = {
    'attention/q': 'self_attn.q_proj',
    'attention/k': 'self_attn.k_proj',
    'attention/v': 'self_attn.v_proj',
    'attention/o': 'self_attn.o_proj',
    'mlp/gate': 'mlp.gate_proj',
    'mlp/up': 'mlp.up_proj',
    'mlp/down': 'mlp.down_proj',
}
QKV_NORMS = {f'attention/{name}_norm': f'self_attn.{name}_norm' for name in 'qkv'}
WHOLE = {
    'embed/embedding': 'model.embed_tokens.weight',
    'embed_norm/scale': 'model.embed_norm.weight',
    'norm/scale': 'model.norm.weight',
    'head/kernel': 'lm_head.weight',
    SCORE: 'score.weight',
}
ABOUT = {'max_position_embeddings': 2048, 'bos_token_id': None, 'eos_token_id': None}  # for other tools; not used here


def tensor_name(path: str, norm_position: Sequence[str]) -> str:
    """Returns the name of the tensor of a leaf; `path` is joined by slashes, in layer l (from 0) after `layers/<l>`.

    Raises UsageError if a folder has no tensor for the parameter.
    """
    if path in WHOLE:
        return WHOLE[path]
    group, number, inside = [*path.split('/', 2), '', ''][:3]
    if group == trees.STACKED:
        name, norm = norm_position[int(number)], inside.removesuffix('/scale')
        if inside in hf_config.LEARNED:
            return f'model.layers.{number}.{hf_config.LEARNED[inside]}'
        matrix, _, leaf = inside.rpartition('/')
        if matrix in MATRICES:
            return f'model.layers.{number}.{MATRICES[matrix]}.{"bias" if leaf == "bias" else "weight"}'
        if stored := QKV_NORMS.get(norm) or hf_config.norm_name(name, norm):
            return f'model.layers.{number}.{stored}.weight'
        path = f'{path} of norm_position {name}'
    raise UsageError(f'parameter {path} has no tensor name in a Hugging Face folder')


def load(
    folder: str | pathlib.Path, norm_position: str | Sequence[str] | None = None, compute_dtype: str = 'float32'
) -> tuple[Llama, Any]:
    """Returns the network and the parameters of a LLaMA folder.

    Args:
        folder: holds config.json and model.safetensors, or shards with model.safetensors.index.json. Names may have
            prefixes that torch puts before them. Buffers that old versions saved (rotary frequencies, masks, positions)
            are compared with what the network computes itself, and not used.
        norm_position: as in a config, or a sequence of L names. None: what config.json says, or Pre-LN for stock LLaMA.
        compute_dtype: of the network; weights are float32.

    Returns:
        (model, params): `logits, out = model.apply({'params': params}, input_ids, capture=True)`.

    Raises:
        UsageError: no such folder or file, a run of ours, or a `norm_position` that does not fit.
        CheckpointError: unreadable content, tensors missing or left over (so another placement), wrong shapes.
    """
    model, params = read(folder, norm_position, compute_dtype)
    return model, jax.tree.map(jnp.asarray, params)


def read(
    folder: str | pathlib.Path, norm_position: str | Sequence[str] | None = None, compute_dtype: str = 'float32'
) -> tuple[Llama, Any]:
    """Returns what `load` returns, in numpy arrays: no device needs to hold them all."""
    folder = pathlib.Path(folder)
    tensors.refuse_others(folder)
    model, stated = hf_config.read(folder / 'config.json', norm_position, compute_dtype)
    arrays = tensors.read(folder)
    tensors.drop_buffers(folder, arrays, _buffers(model.config))
    if not model.num_outputs:
        _check_head(folder, arrays, model.is_tied)
    if not stated:
        _check_pre(folder, arrays)
    params = tensors.fill(
        folder,
        arrays,
        jax.eval_shape(model.without_padding, model.shapes()['params']),
        model.norm_position,
        lambda path: tensor_name(path, model.norm_position),
        f'norm_position={model.config.norm_position}',
    )
    return model, model.with_padding(params)


def _buffers(config: configs.Model) -> dict[str, tuple[str, Callable[[np.ndarray], Any]]]:
    """Returns the buffers that old versions of transformers saved with the weights of a LLaMA; see
    `tensors.drop_buffers`."""
    frequency = np.asarray(rope.rope_frequencies(config), np.float64)
    kind = '' if config.rope_type == 'default' else f' and rope_type={config.rope_type}'
    rotary = f'the rotary frequencies of rope_theta={config.rope_theta:.10g}{kind} in config.json'

    def cached(function: Callable[[Any], Any]) -> Callable[[np.ndarray], Any]:
        def table(tensor: np.ndarray) -> np.ndarray:
            exact = function(np.outer(np.arange(tensor.shape[-2]), np.tile(frequency, 2)))
            rounding = 2**-8 + 1e-6 * len(exact)  # of bfloat16, and of angles in float32
            return np.where(np.abs(tensor.astype(np.float64) - exact) < rounding, tensor, exact)

        return table

    layer = r'model\.layers\.\d+\.self_attn\.'
    module = rf'({layer}|model\.)rotary_emb\.'
    return {
        rf'{module}(original_)?inv_freq': (rotary, lambda tensor: frequency),
        rf'{module}cos_cached': (f'cosines of {rotary}', cached(np.cos)),
        rf'{module}sin_cached': (f'sines of {rotary}', cached(np.sin)),
        rf'{layer}bias': ('a causal mask', lambda tensor: np.tri(*tensor.shape[-2:])),
        rf'{layer}masked_bias': ('a very negative number', lambda tensor: np.minimum(tensor, -1e4)),
        r'model\.causal_mask': ('a causal mask', lambda tensor: np.triu(np.ones(tensor.shape[-2:]), 1)),
    }


def _check_head(folder: pathlib.Path, arrays: dict[str, Any], tied: bool) -> None:
    """Raises CheckpointError if the head's tensor contradicts tie_word_embeddings; of a tied pair one is kept."""
    table, head = WHOLE['embed/embedding'], WHOLE['head/kernel']
    if tied and head in arrays:
        tensor = arrays.pop(head)
        if not np.array_equal(arrays.setdefault(table, tensor), tensor):
            raise CheckpointError(f'{folder}/config.json: tie_word_embeddings=true, but {head} is not {table}')
    elif not tied and head not in arrays:
        raise CheckpointError(f'{folder}: no tensor {head}, and config.json does not say tie_word_embeddings=true')


def _check_pre(folder: pathlib.Path, arrays: dict[str, Any]) -> None:
    """Raises CheckpointError if tensor names contradict Pre-LN, which a folder has that states no placement."""
    others = set(hf_config.OTHER_NORMS.values()) - set(hf_config.STOCK_NORMS.values())
    pattern = re.compile(rf'model\.layers\.(\d+)\.({"|".join(sorted(others))})\.weight')
    matches = [match for match in map(pattern.fullmatch, arrays) if match]
    if matches:
        number = min(int(match[1]) for match in matches)
        names = ' and '.join(sorted(match[2] for match in matches if int(match[1]) == number))
        raise CheckpointError(f'{folder}: layer {number} has {names}: not Pre-LN; pass norm_position')


def _padding(tokenizer: Tokenizer | None) -> int | None:
    """Returns the id after the last token of a text in a batch, by which transformers finds that token: one with which
    no text ends. None: there is no such id."""
    if tokenizer is None:
        return None
    return next((i for i in (tokenizer.pad_id, tokenizer.bos_id) if i != tokenizer.eos_id), None)


def save(
    folder: str | pathlib.Path,
    model: Network,
    params: Any,
    tokenizer: Tokenizer | None = None,
    dtype: str = 'float32',
    max_shard_gb: float = 5.0,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that `load` and transformers read.

    Pre-LN networks become stock LLaMA. All others have the authors' layout, and a modelling file that
    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` runs.

    Args:
        folder: an empty folder, or one that does not exist yet.
        model: the network; its compute_dtype does not matter.
        params: its parameters, whole in this process; rows that only pad the vocabulary are left out.
        tokenizer: to save in `tokenizer/` and, if possible, for transformers.
        dtype: float32 or bfloat16.
        max_shard_gb: largest size of a file in units of 10^9 bytes; larger weights become shards with an index.
        about: values for keys of ABOUT.

    Raises:
        UsageError: a folder with something in it, bad options, or a network that such a folder cannot describe.
    """
    folder = pathlib.Path(folder)
    tensors.check_options(dtype, max_shard_gb)
    special = {f'{role}_token_id': getattr(tokenizer, f'{role}_id', None) for role in ('bos', 'eos')}
    sizes = model.config
    if sizes.hidden_size % sizes.num_heads:
        raise UsageError(
            f'hidden_size={sizes.hidden_size} is not divisible by num_heads={sizes.num_heads}, as transformers needs it'
        )
    config = {**hf_config.content(model), **ABOUT, **special, **(about or {})}
    if model.num_outputs:
        config['pad_token_id'] = _padding(tokenizer)
    config |= {'dtype': dtype, 'torch_dtype': dtype}  # the latter for transformers 4
    named = {}
    params = model.without_padding(jax.device_get(params))
    for path, leaf in trees.named_leaves(tensors.by_layer(params, model.norm_position)):
        name = tensor_name(path, model.norm_position)
        if name in named:
            raise UsageError(f'two parameters of {hf_config.spell(model.norm_position)} have the tensor name {name}')
        if path == 'embed/embedding' and sizes.scale_embed:
            if model.is_tied:  # as a head it is not scaled, so the folder has two
                named[WHOLE['head/kernel']] = leaf
            leaf = leaf.astype(np.float32) * np.float32(sizes.hidden_size**0.5)
        named[name] = leaf.T if path.endswith('kernel') else leaf
    tensors.make_empty(folder)
    tensors.write(folder, named, jnp.dtype(dtype), int(max_shard_gb * 1e9))
    if tokenizer:
        tokenizer.save(folder / 'tokenizer')
        tokenizer.export(folder)
    if config['model_type'] == hf_config.OTHER_TYPE:
        shutil.copy(hf_config.MODELLING, folder)
    (folder / 'config.json').write_text(json.dumps(config, indent=1) + '\n', encoding='utf-8')

"""Adapters as peft has them: a folder with adapter_config.json and adapter_model.safetensors.

Only plain LoRA of a stock LLaMA's matrices: what else peft can say is refused by its key.
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models import transformer
from mixln_jax.models.hf import config as hf_config
from mixln_jax.models.hf import tensors
from mixln_jax.models.hf.llama import MATRICES
from mixln_jax.models.network import Network
from mixln_jax.system import files
from mixln_jax.system.errors import CheckpointError, UsageError, reading

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
BASE = 'base_model_name_or_path'
TENSOR = re.compile(r'base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight')
PLAIN = {'bias': 'none', 'task_type': 'CAUSAL_LM', 'peft_type': 'LORA'}  # the only values that are read
# Keys that change what an adapter computes; they have to be false or absent.
OTHERS = (
    'use_dora', 'fan_in_fan_out', 'modules_to_save', 'alpha_pattern', 'lora_bias', 'trainable_token_indices',
    'layer_replication', 'use_qalora', 'use_bdlora', 'target_parameters', 'alora_invocation_tokens', 'arrow_config',
    'megatron_config', 'monteclora_config', 'kasa_config',
)  # fmt: skip


def save(folder: pathlib.Path, model: Network, network: Any, tune: configs.Tune, base: str | None) -> None:
    """Writes the adapters of a network into an empty folder.

    Args:
        folder: empty, or made here.
        model: the network.
        network: its parameters, with adapters.
        tune: what they were trained with.
        base: folder of the weights that they adapt; None: not known as one.

    Raises UsageError for a network that is not stock LLaMA.
    """
    if hf_config.content(model)['model_type'] == hf_config.OTHER_TYPE:
        raise UsageError(
            f'--adapter: a network of norm_position={hf_config.spell(model.norm_position)} is not stock LLaMA, whose '
            'adapters alone peft can apply: export it merged, without --adapter'
        )
    named, targets = {}, set()
    for number, layer in enumerate(transformer.split_layers(network[trees.STACKED], model.norm_position)):
        for name, leaf in trees.named_leaves(layer):
            matrix, _, last = name.rpartition('/')
            if last in ('lora_a', 'lora_b'):
                targets.add(MATRICES[matrix].rpartition('.')[2])
                tensor = f'base_model.model.model.layers.{number}.{MATRICES[matrix]}.lora_{last[-1].upper()}.weight'
                named[tensor] = np.ascontiguousarray(np.asarray(leaf, np.float32).T)
    alpha = int(tune.alpha) if tune.alpha == int(tune.alpha) else tune.alpha
    config: dict[str, Any] = {
        **PLAIN,
        'r': tune.rank,
        'lora_alpha': alpha,
        'lora_dropout': tune.dropout,
        'inference_mode': True,
    }
    config |= {'target_modules': sorted(targets), BASE: base}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + '\n', encoding='utf-8')
    tensors.write_file(folder / WEIGHTS, named)


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the adapter_config.json of a folder. Raises UsageError where there is none; CheckpointError, naming the
    key, for what is not plain LoRA of a causal language model."""
    path = folder / CONFIG
    try:
        config = files.read_json(path, CheckpointError, 'not the configuration of an adapter')
    except FileNotFoundError:
        raise UsageError(f'{folder} is not the folder of an adapter: it has no {CONFIG}') from None
    for name, value in PLAIN.items():
        if config.get(name, value) not in (value, *([None] if name == 'task_type' else [])):
            raise CheckpointError(f'{path}: {name}={config[name]!r} is not {value}, all that is read here')
    for name in OTHERS:
        if config.get(name):
            raise CheckpointError(f'{path}: {name}={config[name]!r} is not read here, only plain LoRA')
    for name, kinds in (('r', int), ('lora_alpha', (int, float))):
        if isinstance(config.get(name), bool) or not isinstance(config.get(name), kinds) or not config[name] > 0:
            raise CheckpointError(f'{path}: {name}={config.get(name)!r} is not a number above 0')
    if not isinstance(config.get('rank_pattern') or {}, dict) or not isinstance(config.get(BASE), str | None):
        raise CheckpointError(f'{path}: rank_pattern or {BASE} is of another type')
    for pattern in config.get('rank_pattern') or {}:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(f'{path}: rank_pattern {pattern!r} is no pattern: {error}') from None
    return config


def merged(folder: pathlib.Path, config: Mapping[str, Any], model: Network, params: Any) -> Any:
    """Returns the parameters of a network with the adapters of a folder merged into its matrices.

    Args:
        folder: of the adapters.
        config: from `read_config`.
        model: the network.
        params: of the base, numpy arrays.

    Raises CheckpointError, naming the tensor, for one that has no place in the network, is missing, or has another
    shape or rank.
    """
    with reading(folder / WEIGHTS, CheckpointError, 'not a readable safetensors file'):
        files.regular(folder / WEIGHTS, CheckpointError)
        found = safetensors.numpy.load_file(folder / WEIGHTS)
    layers = transformer.split_layers(params[trees.STACKED], model.norm_position)
    ours = {theirs: name for name, theirs in MATRICES.items()}
    pairs: dict[tuple[int, str], dict[str, np.ndarray]] = {}
    for name, tensor in found.items():
        match = TENSOR.fullmatch(name)
        if not match or match[2] not in ours or int(match[1]) >= len(layers):
            raise CheckpointError(
                f'{folder / WEIGHTS}: tensor {name} has no place in a network of {len(layers)} layers'
            )
        if tensor.dtype.kind in 'iub' or not np.isfinite(tensor := tensor.astype(np.float32)).all():
            raise CheckpointError(f'{folder / WEIGHTS}: tensor {name} is not finite numbers')
        pairs.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    if not pairs:
        raise CheckpointError(f'{folder / WEIGHTS} holds no adapter')
    for (number, theirs), pair in pairs.items():
        group, matrix = ours[theirs].split('/')
        kernel = layers[number][group][matrix]['kernel']
        shapes = [pair[side].shape if side in pair else None for side in 'AB']
        A, B = shapes
        if A is None or B is None or len(A) != 2 or len(B) != 2 or A[0] != B[1] or (A[1], B[0]) != kernel.shape:
            raise CheckpointError(
                f'{folder / WEIGHTS}: {theirs} of layer {number} has A {A} and B {B}, its matrix is {kernel.shape}: an '
                'adapter of another base'
            )
        rank = A[0]
        if rank != (expected := _rank(config, f'model.layers.{number}.{theirs}')):
            raise CheckpointError(
                f'{folder / WEIGHTS}: {theirs} of layer {number} has rank {rank}, but by {CONFIG} it is {expected}'
            )
        scale = config['lora_alpha'] / (rank**0.5 if config.get('use_rslora') else rank)
        added = (pair['B'].astype(np.float64) @ pair['A']).T * scale
        layers[number][group][matrix] = {**layers[number][group][matrix], 'kernel': (kernel + added).astype(np.float32)}
    return dict(params, layers=transformer.stack_layers(layers, model.norm_position))


def _rank(config: Mapping[str, Any], module: str) -> int:
    """Returns the rank of a module's adapter by `r` and `rank_pattern`, whose keys end a name or are patterns of it."""
    for pattern, rank in (config.get('rank_pattern') or {}).items():
        if re.fullmatch(rf'(.*\.)?({pattern})', module):
            return rank
    return config['r']

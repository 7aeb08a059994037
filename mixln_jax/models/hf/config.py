"""config.json of a Hugging Face folder: its keys, and how it describes placements."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixln_jax import config as configs
from mixln_jax.models import families, llama, placements, transformer, vit
from mixln_jax.models.network import Network
from mixln_jax.system import files
from mixln_jax.system.errors import CheckpointError, UsageError, reading

CONFIG_KEYS = {
    'vocab_size': 'vocab_size',
    'hidden_size': 'hidden_size',
    'intermediate_size': 'intermediate_size',
    'num_layers': 'num_hidden_layers',
    'num_heads': 'num_attention_heads',
    'norm_eps': 'rms_norm_eps',
}
SWITCHES = ('attention_bias', 'mlp_bias', 'tie_word_embeddings')  # which a config.json may leave out
ROPE = {  # of rope_parameters, with rope_type llama3
    'rope_factor': 'factor',
    'rope_low_freq_factor': 'low_freq_factor',
    'rope_high_freq_factor': 'high_freq_factor',
    'rope_original_length': 'original_max_position_embeddings',
}
FIXED = {  # further keys that a config.json may have, and the only value with which `llama` computes
    'hidden_act': 'silu',
    'partial_rotary_factor': 1.0,
    'sliding_window': None,
    'quantization_config': None,
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
# Factors that are learned; the first two have the names of the authors' scale_res_pre_norm.
LEARNED = {
    'attention_branch_scale': 'raw_scaling_factor_attn',
    'mlp_branch_scale': 'raw_scaling_factor_mlp',
    'attention_residual_scale': 'attention_residual_scale',
    'mlp_residual_scale': 'mlp_residual_scale',
}
OTHER_TYPE = 'mixln'  # model_type of networks that are not stock LLaMA, so that no tool opens them as Pre-LN
CLASSIFIER = 'ForSequenceClassification'  # ends the name of a class with a head of its own
MODELLING = pathlib.Path(__file__).with_name('modeling_mixln.py')  # is copied into such a folder, for transformers
# The switches of a placement, and the norm that each uses.
NORMS = {'residual_normed': 'in', 'pre': 'in', 'out': 'out', 'post': 'post'}
FACTORS = ('in_scale', 'residual_scale', 'branch_scale', 'ramp')


def read(
    path: pathlib.Path, norm_position: str | Sequence[str] | None = None, compute_dtype: str = 'float32'
) -> tuple[llama.Llama, bool]:
    """Returns the network of a config.json, and whether `norm_position` or the file states its placement.

    Arguments and errors are those of `hf.load`.
    """
    stored = read_json(path)
    with reading(path, CheckpointError, 'not the config.json of a network'):
        return _read(path, stored, norm_position, compute_dtype)


def _read(
    path: pathlib.Path, stored: dict[str, Any], norm_position: str | Sequence[str] | None, compute_dtype: str
) -> tuple[llama.Llama, bool]:
    if stored.get('model_type') not in (None, 'llama', OTHER_TYPE):
        raise CheckpointError(f'{path}: model_type={stored["model_type"]!r} is not llama or {OTHER_TYPE}')
    model = llama.Llama(
        *layers(path, stored, _model_config(path, stored), norm_position, stored.get('model_type') == OTHER_TYPE),
        compute_dtype,
        trained_steps=ramp_step(path, stored),
        num_outputs=_num_outputs(path, stored),
    )
    check_described(path, stored, model, content(model))
    return model, bool(norm_position) or stored.get('norm_position') is not None


def layers(
    path: pathlib.Path,
    stored: Mapping[str, Any],
    config: configs.Model,
    norm_position: str | Sequence[str] | None,
    needed: bool,
) -> tuple[configs.Model, tuple[str, ...], tuple[int, ...], int]:
    """Returns (config, norm_position, layer_index, depth) of a network, as a config.json states its layers.

    Args:
        path: of config.json, for errors.
        stored: its content.
        config: the sizes.
        norm_position: what the caller says of the placement.
        needed: whether the file has to state it; if neither does, it is Pre-LN.

    Raises:
        CheckpointError: other things than placements and numbers of layers.
        UsageError: the caller says something else than the file.
    """
    L, stated = config.num_layers, stored.get('norm_position')
    if needed and stated is None:
        raise CheckpointError(f'{path} has no key norm_position, which model_type={stored["model_type"]} needs')
    index, depth = stored.get('layer_index', list(range(1, L + 1))), stored.get('depth', L)
    if not _whole([depth]) or not _whole(index) or len(index) != L or index != sorted({*index}) or index[-1] > depth:
        raise CheckpointError(
            f'{path}: layer_index={index}, depth={depth}: {L} rising layer numbers from 1 up to the depth are needed'
        )
    try:
        names = placements.resolve(_spelled('pre' if stated is None else stated), L)
    except (UsageError, TypeError) as error:
        raise CheckpointError(f'{path}: norm_position: {error}') from None
    if norm_position:
        wanted = placements.resolve(_spelled(norm_position), L)
        if stated is not None and wanted != names:
            raise UsageError(f'{path} says norm_position={spell(names)}, not {spell(wanted)}')
        names = wanted
    return dataclasses.replace(config, norm_position=spell(names)), names, tuple(index), depth


def ramp_step(path: pathlib.Path, stored: Mapping[str, Any]) -> int | None:
    """Returns where the ramps of a config.json stand; None: they are done."""
    steps = stored.get('ramp_step')
    if steps is not None and not (type(steps) is int and 0 <= steps < 2**31):
        raise CheckpointError(f'{path}: ramp_step={steps!r} is not a number of steps')
    return steps


def check_described(path: pathlib.Path, stored: Mapping[str, Any], model: Network, expected: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a config.json describes other layers than `expected`, that of the network."""
    for key in ('placements', 'embed_norm', 'norm_groups', 'ramp_step'):
        if 'placements' in stored and stored.get(key) != expected.get(key):
            raise CheckpointError(f'{path}: {key} is not that of norm_position, layer_index and depth here')
    grouped = any(placements.PLACEMENTS[name].mlp.grouped for name in model.norm_position)
    if grouped and model.config.hidden_size % model.config.norm_groups:
        raise CheckpointError(
            f'{path}: hidden_size={model.config.hidden_size} is not divisible by {model.config.norm_groups} groups'
        )


def labels(names: Sequence[str]) -> dict[str, Any]:
    """Returns the keys of config.json that name classes."""
    by_number = {str(number): name for number, name in enumerate(names)}
    return {'id2label': by_number, 'label2id': {name: int(number) for number, name in by_number.items()}}


def named_pixels(path: pathlib.Path, mean: Any, deviation: Any) -> str:
    """Returns the name of a mean and a deviation. Raises CheckpointError if they have none."""
    for name, (ours, theirs) in vit.PIXELS.items():
        if mean == list(ours) and deviation == list(theirs):
            return name
    raise CheckpointError(
        f'{path}: the mean {mean!r} and deviation {deviation!r} of pixels are not those of any config.model.pixels: '
        f'{", ".join(vit.PIXELS)}'
    )


def _num_outputs(path: pathlib.Path, stored: Mapping[str, Any]) -> int:
    """Returns the size of the head of a config.json that classifies texts, as many as it has labels; else 0."""
    kinds = stored.get('architectures') or []
    if not isinstance(kinds, list) or not any(str(kind).endswith(CLASSIFIER) for kind in kinds):
        return 0
    return len(label_names(path, stored))


def label_names(path: pathlib.Path, stored: Mapping[str, Any]) -> list[str]:
    """Returns the names of the classes in a config.json, in their order."""
    named = stored.get('id2label', {'0': 'LABEL_0', '1': 'LABEL_1'})  # transformers writes none if there are two
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f'{path}: id2label={named!r} does not say how many labels there are')
    if named.keys() != {str(number) for number in range(len(named))}:
        raise CheckpointError(f'{path}: id2label does not name the classes 0 to {len(named) - 1}')
    return [str(named[str(number)]) for number in range(len(named))]


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int and number > 0 for number in numbers)


def _spelled(names: str | Sequence[str]) -> str:
    return names if isinstance(names, str) else ','.join(names)


def spell(names: Sequence[str]) -> str:
    """Returns a list of placements as a text, such as `post*2,pre*6`."""
    return ','.join(f'{name}*{end - first}' for name, first, end in placements.layer_runs(names))


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises UsageError if there is no file, CheckpointError if it is unreadable."""
    try:
        return files.read_json(path, CheckpointError)
    except FileNotFoundError:
        raise UsageError(f'{path} does not exist') from None


def _model_config(path: pathlib.Path, stored: dict[str, Any]) -> configs.Model:
    """Returns config.Model of the content of a config.json, without its placement."""
    values = take(path, stored, CONFIG_KEYS, FIXED) | _rope(path, stored)
    kv_heads = stored.get('num_key_value_heads') or values['num_heads']
    values['num_kv_heads'] = 0 if kv_heads == values['num_heads'] else kv_heads
    for name in (*SWITCHES, 'head_dim', 'norm_groups', 'ramp_steps'):
        if stored.get(name) is not None:
            values[name] = stored[name]
    config = build(path, values)
    usual = config.head_dim * config.num_heads == config.hidden_size
    return dataclasses.replace(config, head_dim=0) if usual else config


def _rope(path: pathlib.Path, stored: dict[str, Any]) -> dict[str, Any]:
    """Returns the keys of config.Model that describe the rotary positions.

    transformers 5 writes rope_parameters. Earlier versions wrote rope_theta and rope_scaling, whose type may be under
    `type`.
    """
    stated: dict[str, Any] = {}
    for name in ('rope_parameters', 'rope_scaling'):
        given = stored.get(name) or {}
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise CheckpointError(f'{path}: {name}={given!r} is not modelled here, only one rotation for all layers')
        given = {key: value for key, value in given.items() if value is not None}
        kind = given.get('rope_type', given.get('type', 'default'))
        if kind not in ('default', 'llama3'):
            raise CheckpointError(f'{path}: {name}: rope_type={kind!r} is not modelled here, only default and llama3')
        take(f'{path}: {name}', given, {}, FIXED)
        for key, value in (given | {'rope_type': kind} if given else {}).items():
            if stated.setdefault(key, value) != value:
                raise CheckpointError(f'{path}: rope_scaling has {key}={value!r}, rope_parameters {stated[key]!r}')
    theta = next((group['rope_theta'] for group in (stated, stored) if group.get('rope_theta') is not None), 10000.0)
    values = {'rope_theta': theta, 'rope_type': stated.get('rope_type', 'default')}
    if values['rope_type'] == 'llama3':
        stated.setdefault('original_max_position_embeddings', stored.get('max_position_embeddings'))
        for ours, theirs in ROPE.items():
            if stated.get(theirs) is None:
                raise CheckpointError(f'{path}: rope_scaling or rope_parameters of type llama3 lacks {theirs}')
            values[ours] = stated[theirs]
    return values


def take(
    path: str | pathlib.Path, stored: Mapping[str, Any], keys: Mapping[str, str], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns {ours: value} of `keys` {ours: theirs}.

    Raises CheckpointError if a key is missing, or a value is not that of `fixed`.
    """
    for name in keys.values():
        if name not in stored:
            raise CheckpointError(f'{path} has no key {name}')
    for name, value in stored.items():
        if name in fixed and value not in (None, fixed[name]):
            raise CheckpointError(f'{path}: {name}={value!r} is not modelled here, only {fixed[name]!r}')
    return {ours: stored[theirs] for ours, theirs in keys.items()}


def build(path: pathlib.Path, values: Mapping[str, Any]) -> configs.Model:
    """Returns the config.Model with these values. Raises CheckpointError for values that its family cannot have."""
    try:
        model = configs.build({'model': values}).model
        families.FAMILIES[model.family].check(model)
        return model
    except UsageError as error:
        raise CheckpointError(f'{path}: {error}') from None


def content(model: Network) -> dict[str, Any]:
    """Returns the config.json of a network as a dict: of stock LLaMA if it is one. Raises UsageError as `described`."""
    config, layers = model.config, described(model)
    llama3 = {theirs: getattr(config, ours) for ours, theirs in ROPE.items()} if config.rope_type == 'llama3' else {}
    rope = {'rope_type': config.rope_type} | llama3
    pre_norm = {'attention': {'pre': 'input_layernorm'}, 'mlp': {'pre': 'post_attention_layernorm'}}
    stock = all(layer == pre_norm for layer in layers)
    module, kind = MODELLING.stem, CLASSIFIER if model.num_outputs else 'ForCausalLM'
    auto_map = {'AutoConfig': f'{module}.MixlnConfig', f'AutoModel{kind}': f'{module}.Mixln{kind}'}
    return {
        'architectures': [f'{"Llama" if stock else "Mixln"}{kind}'],
        'model_type': 'llama' if stock else OTHER_TYPE,
        **({} if stock else {'auto_map': auto_map}),
        **(labels([f'LABEL_{number}' for number in range(model.num_outputs)]) if model.num_outputs else {}),
        **{theirs: getattr(config, ours) for ours, theirs in CONFIG_KEYS.items()},
        'num_key_value_heads': config.kv_heads,
        'head_dim': config.head_size,
        'rope_theta': config.rope_theta,
        'rope_parameters': rope | {'rope_theta': config.rope_theta},
        **({'rope_scaling': rope} if llama3 else {}),  # for transformers 4
        'hidden_act': FIXED['hidden_act'],
        **{name: getattr(config, name) for name in SWITCHES},
        'tie_word_embeddings': config.tie_word_embeddings and not config.scale_embed,
        'initializer_range': config.init_std,
        'pad_token_id': None,  # torch would not train the row that it names
        **stated_layers(model, None if stock else layers),
    }


def stated_layers(model: Network, layers: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Returns the keys of config.json that state a network's layers; `layers`: what `described` returns, where stock
    classes cannot compute them."""
    grouped = any(placements.PLACEMENTS[name].mlp.grouped for name in model.norm_position)
    return {
        'norm_position': list(model.norm_position),
        'layer_index': list(model.layer_index),
        'depth': model.depth,
        **({} if layers is None else {'placements': layers}),
        **({'embed_norm': True} if placements.PLACEMENTS[model.norm_position[0]].embed_norm else {}),
        **({'norm_groups': model.config.norm_groups} if grouped else {}),
        **_ramp(model),
    }


def _ramp(model: Network) -> dict[str, Any]:
    """Returns the keys of config.json that state the step of a network's ramps, with which training can go on;
    `placements` has the factors that follow from them."""
    if not placements.has_ramp(model.norm_position):
        return {}
    steps = transformer.total_step(model.config, model.trained_steps)
    return {'ramp_steps': model.config.ramp_steps} | ({} if steps is None else {'ramp_step': steps})


def described(model: Network) -> list[dict[str, Any]]:
    """Returns what each layer does to the residual stream, as config.json and modeling_mixln.py describe it.

    Returns:
        L dicts {'attention': {...}, 'mlp': {...}}: the switches that are on, each with the name of its norm, the
        constants of the layer, and for learned factors the parameter's name and shape.

    Raises:
        UsageError: a placement that this cannot describe, naming it.
    """
    described_layers: list[dict[str, Any]] = []
    for name, index in zip(model.norm_position, model.layer_index, strict=True):
        layer = placements.PLACEMENTS[name]
        _check_describable(name, layer, ('attention', 'mlp', 'init', 'qkv_norm', 'embed_norm'))
        described_layers.append({'qkv_norm': True} if layer.qkv_norm else {})
        for sublayer in ('attention', 'mlp'):
            placement = getattr(layer, sublayer)
            _check_describable(name, placement, (*NORMS, *FACTORS, 'grouped'))
            on = {switch: f'{sublayer}_norm_{norm}' for switch, norm in NORMS.items() if getattr(placement, switch)}
            entry: dict[str, Any] = {switch: norm_name(name, norm) for switch, norm in on.items()}
            steps = transformer.total_step(model.config, model.trained_steps)
            ramp = placement.ramp_factors([index], model.config.ramp_steps, steps)
            unfinished = {factor: value for factor, value in ramp.items() if value[0] != 1}
            constants = placement.constants([index], model.depth) | unfinished
            entry |= {factor: float(np.float32(value)) for factor, [value] in constants.items()}
            for factor, kind in placement.factors().items():
                if isinstance(kind, placements.Learned):
                    shape = [model.config.hidden_size] if kind.per_feature else []
                    entry[factor] = {'parameter': LEARNED[f'{sublayer}_{factor}'], 'shape': shape}
            described_layers[-1][sublayer] = entry | ({'grouped': True} if placement.grouped else {})
    return described_layers


def _check_describable(name: str, placement: Any, known: Sequence[str]) -> None:
    for field in dataclasses.fields(placement):
        if field.name not in known and getattr(placement, field.name) != field.default:
            raise UsageError(f'norm_position {name}: {field.name} cannot be said in a Hugging Face folder')


def norm_name(placement: str, norm: str) -> str | None:
    """Returns the name of a layer's norm, such as `mlp_norm_in`, under a placement; None: it has none."""
    layer = placements.PLACEMENTS[placement]
    stock = not any(sublayer.out or sublayer.post for sublayer in (layer.attention, layer.mlp))
    return (STOCK_NORMS if stock else OTHER_NORMS).get(norm)

"""Folders of adapters as peft has them: written, read back on top of their base, and refused when they are wrong."""

import jax
import numpy as np
import pytest
from hf_folders import change, edit, network

from mixln_jax import config as configs
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.models.hf import peft
from mixln_jax.program import lora
from mixln_jax.runs import start_weights, weights
from mixln_jax.system import outputs
from mixln_jax.system.errors import CheckpointError, UsageError

TUNE = configs.Tune(method='lora', rank=2, alpha=3.0, matrices='q,down')
Q = 'base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight'


def adapted(norm_position):
    model, params = network(norm_position)
    rng, made = np.random.default_rng(1), lora.with_adapters(params, TUNE, jax.random.key(0))
    draw = lambda path, leaf: rng.normal(size=leaf.shape) if 'lora_b' in str(path) else leaf  # noqa: E731
    return model, params, jax.tree_util.tree_map_with_path(draw, made)


@pytest.fixture
def folder(tmp_path):
    model, params, whole = adapted('pre')
    hf_llama.save(tmp_path / 'base', model, params)
    peft.save(tmp_path / 'adapter', model, whole, TUNE, str(tmp_path / 'base'))
    return tmp_path / 'adapter'


def test_written_and_read(folder):
    model, _, whole = adapted('pre')
    found = start_weights.initial(f'adapter:{folder}', model)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, lora.merged(whole))
    edit(folder, peft.CONFIG, base_model_name_or_path='../base')  # beside the adapter
    edit(folder, peft.CONFIG, r=7, rank_pattern={'q_proj': 2, r'mlp\.d.*': 2})
    jax.tree.map(np.testing.assert_array_equal, found, start_weights.initial(f'adapter:{folder}', model))
    assert (folder / peft.WEIGHTS).stat().st_mode == (folder / peft.CONFIG).stat().st_mode  # others may read it


def test_on_another_base(folder):
    model, params, _ = adapted('pre')
    fingerprint = start_weights.base_fingerprint(params, 'float32')
    outputs.write_json(folder / weights.EXPORT, {'base': fingerprint, 'base_dtype': 'float32', 'files': []})
    start_weights.initial(f'adapter:{folder}', model)
    change(folder.parent / 'base', 'model.norm.weight', lambda tensor: tensor + 1e-3)
    with pytest.raises(CheckpointError, match='was trained on another base than'):
        start_weights.initial(f'adapter:{folder}', model)


@pytest.mark.parametrize(
    'changes, error, words',
    [
        ({'base_model_name_or_path': None}, UsageError, "base_model_name_or_path='' is not a folder here"),
        ({'base_model_name_or_path': '/none'}, UsageError, "base_model_name_or_path='/none' is not a folder here"),
        ({'base_model_name_or_path': 3}, CheckpointError, 'base_model_name_or_path is of another type'),
        ({'peft_type': 'IA3'}, CheckpointError, "peft_type='IA3' is not LORA"),
        ({'task_type': 'SEQ_CLS'}, CheckpointError, "task_type='SEQ_CLS' is not CAUSAL_LM"),
        ({'bias': 'all'}, CheckpointError, "bias='all' is not none"),
        ({'use_dora': True}, CheckpointError, 'use_dora=True is not read here'),
        ({'modules_to_save': ['lm_head']}, CheckpointError, 'modules_to_save=.* is not read here'),
        ({'r': 1}, CheckpointError, '_proj of layer 0 has rank 2, but by adapter_config.json it is 1'),
        ({'rank_pattern': {'layers.2.self_attn.q_proj': 4}}, CheckpointError, 'q_proj of layer 2 has rank 2, but .* 4'),
        ({'rank_pattern': {'(': 2}}, CheckpointError, "rank_pattern '\\(' is no pattern"),
        ({'r': 0}, CheckpointError, 'r=0 is not a number above 0'),
        ({'lora_alpha': 'x'}, CheckpointError, "lora_alpha='x' is not a number above 0"),
        ({'lora_alpha': None}, CheckpointError, 'lora_alpha=None is not a number above 0'),
    ],
)
def test_wrong_configurations(folder, changes, error, words):
    edit(folder, peft.CONFIG, **changes)
    with pytest.raises(error, match=words):
        start_weights.initial(f'adapter:{folder}', network('pre')[0])


@pytest.mark.parametrize(
    'name, how, words',
    [
        (Q.format('A'), lambda _: None, 'has A None and B'),
        (Q.format('B'), lambda tensor: tensor[:, :1], 'an adapter of another base'),
        (Q.format('A'), lambda tensor: tensor[:, :4], 'an adapter of another base'),
        (Q.format('A'), lambda tensor: tensor * np.nan, 'is not finite numbers'),
        (Q.format('A').replace('.0.', '.3.'), lambda _: np.ones((2, 8)), 'has no place in a network of 3 layers'),
        ('lm_head.weight', lambda _: np.ones((2, 8)), 'lm_head.weight has no place'),
    ],
)
def test_wrong_tensors(folder, name, how, words):
    change(folder, name, how, peft.WEIGHTS)
    with pytest.raises(CheckpointError, match=words):
        start_weights.initial(f'adapter:{folder}', network('pre')[0])


def test_files_that_are_not_there_or_damaged(folder):
    model = network('pre')[0]
    (folder / peft.WEIGHTS).write_bytes(b'{')
    with pytest.raises(CheckpointError, match='not a readable safetensors file'):
        start_weights.initial(f'adapter:{folder}', model)
    (folder / peft.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=peft.WEIGHTS):
        start_weights.initial(f'adapter:{folder}', model)
    (folder / peft.CONFIG).write_text('[')
    with pytest.raises(CheckpointError, match='not the configuration of an adapter'):
        start_weights.initial(f'adapter:{folder}', model)
    (folder / peft.CONFIG).unlink()
    with pytest.raises(UsageError, match='is not the folder of an adapter'):
        start_weights.initial(f'adapter:{folder}', model)


def test_other_placements_have_no_adapter_for_peft(tmp_path):
    model, _, whole = adapted('mix')
    with pytest.raises(UsageError, match='is not stock LLaMA'):
        peft.save(tmp_path / 'adapter', model, whole, TUNE, None)
    assert not (tmp_path / 'adapter').exists()

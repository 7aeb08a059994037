"""What torch, transformers and peft compute of fine-tuning and adapters; see requirements-parity.txt."""

import copy
import functools
import re

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from builders import batch_of
from corpora import write
from hf_folders import logits, network
from short_runs import SIZES, WORDS, recipe

from mixln_jax import config as configs
from mixln_jax import export, main, trees
from mixln_jax.data import batches
from mixln_jax.models import families, transformer
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.program import lora, optim, step
from mixln_jax.runs import start_weights, weights
from mixln_jax.tasks.language import Language

RATE, DECAY, CLIP, EPSILON = 0.01, 0.3, 0.5, 1e-8
MODULES = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
BATCHES = [batch_of(np.random.default_rng(seed)) | batches.marks(np.arange(8), np.ones(8, bool)) for seed in range(3)]


def their_name(path):
    """Returns the name in torch of a leaf of ours, of a single layer or outside the layers."""
    found = re.fullmatch(r'(.*)/lora_([ab])', path)
    if not found:
        return hf_llama.tensor_name(path, ['pre'] * 3)
    return hf_llama.tensor_name(f'{found[1]}/kernel', ['pre'] * 3).replace(
        'weight', f'lora_{found[2].upper()}.default.weight'
    )


def by_their_name(model, params):
    """Returns {name in torch: array} of trained weights."""
    layers = transformer.split_layers(params['layers'], model.norm_position)
    leaves = trees.named_leaves(dict(params, layers=dict(enumerate(layers))))
    turned = ('kernel', 'lora_a', 'lora_b')
    return {their_name(path): np.asarray(leaf.T if path.endswith(turned) else leaf) for path, leaf in leaves}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A Pre-LN network in transformers, in float64."""
    folder = tmp_path_factory.mktemp('base')
    hf_llama.save(folder, *network('pre'))
    return transformers.AutoModelForCausalLM.from_pretrained(folder).double()


@pytest.fixture
def double(monkeypatch):
    """Both sides compute in float64, also where they say float32. At EPSILON an element whose gradient is almost 0
    moves by the sign of its rounding, which in float32 is not the same on both sides."""
    monkeypatch.setattr(jax.numpy, 'float32', jax.numpy.float64)
    monkeypatch.setattr(torch, 'float32', torch.float64)
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures('double')
@pytest.mark.parametrize('tune', [configs.Tune(), configs.Tune(method='lora', rank=2, alpha=6.0)], ids=['full', 'lora'])
def test_three_updates(base, tune):
    model, params = network('pre')
    model, params = model.clone(compute_dtype='float64'), jax.tree.map(np.float64, params)
    theirs = copy.deepcopy(base)
    if tune.method == 'lora':
        theirs = peft.get_peft_model(
            theirs, peft.LoraConfig(r=2, lora_alpha=6, target_modules=MODULES, task_type='CAUSAL_LM')
        ).double()
    rule = optim.optimizer(configs.Optim(name='adamw', weight_decay=DECAY, eps=EPSILON))
    state = step.init_state(Language(model), rule, jax.random.key(3), 'float64', tune=tune)
    adapters, _ = trees.split(state.network, lora.is_adapter)
    state = state.with_network(trees.join(params, adapters))
    before = by_their_name(model, model.without_padding(state.params))
    trained = {name.removeprefix('base_model.model.'): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert {*trained} == {*before}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(torch.asarray(before[name].copy()))
    groups = [[p for p in trained.values() if (p.ndim == 2) == matrix] for matrix in (True, False)]
    rule_of_torch = torch.optim.AdamW(
        [{'params': groups[0], 'weight_decay': DECAY}, {'params': groups[1], 'weight_decay': 0.0}], lr=RATE, eps=EPSILON
    )
    update = jax.jit(
        functools.partial(
            step.train_step, task=Language(model), optimizer=rule, schedule=lambda _: RATE, clip_norm=CLIP, tune=tune
        )
    )
    for batch in BATCHES:
        state, _ = update(state, batch)
        found = theirs(torch.asarray(batch['inputs']).long()).logits
        losses = torch.nn.functional.cross_entropy(
            found.transpose(1, 2), torch.asarray(batch['targets']).long(), reduction='none'
        )
        mask = torch.asarray(batch['loss_mask'])
        rule_of_torch.zero_grad()
        ((losses * mask).sum() / mask.sum()).backward()
        norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in trained.values()]))
        assert norm > CLIP
        for parameter in trained.values():
            parameter.grad *= CLIP / norm  # clip_grad_norm_ would add 1e-6 to the norm
        rule_of_torch.step()
    after = by_their_name(model, model.without_padding(state.params))
    for name, parameter in trained.items():
        expected = parameter.detach().numpy()
        moved = np.abs(expected - before[name]).max()
        assert moved > 0
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=1e-9 * moved, err_msg=name)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run that trains adapters of an exported Pre-LN network, and that network's folder."""
    folder, rng = tmp_path_factory.mktemp('run'), np.random.default_rng(0)
    corpus = write(folder / 'train.json.gz', [' '.join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(120)])
    model = families.from_config(configs.Model(norm_position='pre', **SIZES))
    hf_llama.save(folder / 'base', model, jax.jit(model.init)(jax.random.key(77))['params'])
    changes = {'tune.method': 'lora', 'tune.rank': 3, 'tune.alpha': 7.0, 'tune.matrices': 'q,o,up', 'optim.ema': 0.5}
    changes |= {'model.norm_position': 'pre', 'init_from': f'hf:{folder / "base"}', 'optim.learning_rate': 0.5}
    main.run(recipe(corpus, **changes), folder / 'run')
    return folder


IDS = np.random.default_rng(5).integers(0, SIZES['vocab_size'], (2, 12))


@torch.no_grad()
def test_a_written_adapter_opens_in_peft(run, tmp_path):
    export.export_adapter(run / 'run', str(tmp_path / 'adapter'))
    base = transformers.AutoModelForCausalLM.from_pretrained(run / 'base').eval()
    plain = base(torch.asarray(IDS)).logits.numpy()
    found = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()(torch.asarray(IDS)).logits.numpy()
    ours = weights.load(run / 'run')
    expected = np.asarray(ours.model.apply({'params': ours.params}, IDS)[0])
    assert np.abs(plain - expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    again = start_weights.initial(f'adapter:{tmp_path / "adapter"}', ours.model)
    np.testing.assert_allclose(ours.model.apply({'params': again}, IDS)[0], expected, rtol=0, atol=1e-5)


def test_an_adapter_of_peft_on_top_of_its_base(tmp_path):
    model, params = network('pre')
    hf_llama.save(tmp_path / 'base', model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=['q_proj', 'down_proj'], rank_pattern={'down_proj': 2},
        layers_to_transform=[0, 2], init_lora_weights=False, use_rslora=True, task_type='CAUSAL_LM',
    )  # fmt: skip
    theirs = peft.get_peft_model(theirs, config).eval()
    theirs.save_pretrained(tmp_path / 'adapter')
    with torch.no_grad():
        expected = theirs(torch.arange(10).reshape(2, 5)).logits.numpy()
    found = np.asarray(logits(model, start_weights.initial(f'adapter:{tmp_path / "adapter"}', model)))
    assert np.abs(expected - np.asarray(logits(model, params))).max() > 1e-2
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)

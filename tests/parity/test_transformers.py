"""What transformers computes from our folders, and we from its: needs torch, see requirements-parity.txt."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers
import vocabularies
from hf_folders import KINDS, PLACEMENTS, edit, logits, network
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from mixln_jax.data import tokenizers
from mixln_jax.models import placements
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.models.sampler import Sampler
from mixln_jax.models.sampling import Sampling
from mixln_jax.tasks.language import Language

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
IDS = np.arange(10).reshape(2, 5)  # as `logits` takes them


def pretrained(folder, **options):
    stock = json.loads((folder / 'config.json').read_text())['model_type'] == 'llama'
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not stock, **options).eval()


@torch.no_grad()
def theirs(model, ids=IDS):
    return model(torch.asarray(ids), use_cache=False).logits.float().numpy()


@pytest.mark.parametrize(
    'norm_position, max_shard_gb, kind',
    [
        *((name, size, '') for name in PLACEMENTS for size in (5.0, 3e-6)),
        *((name, 5.0, kind) for name in ('pre', 'mix') for kind in KINDS),
        ('hybridnorm_star', 5.0, 'all'),  # norms of a head's size
        ('peri', 5.0, 'all'),  # a norm after the embedding, not before the head
    ],
)
def test_exports_compute_the_same(tmp_path, norm_position, max_shard_gb, kind):
    model, params = network(norm_position, **KINDS.get(kind, {}))
    hf_llama.save(tmp_path / 'out', model, params, max_shard_gb=max_shard_gb)
    found, expected = pretrained(tmp_path / 'out'), np.asarray(logits(model, params))
    assert (type(found) is transformers.LlamaForCausalLM) == (norm_position == 'pre')
    np.testing.assert_allclose(theirs(found), expected, rtol=0, atol=1e-4)
    # The comparison must be able to fail: a gain of the last layer, moved a little.
    with torch.no_grad():
        next(weight for name, weight in found.model.layers[-1].named_parameters() if 'norm' in name)[1] *= 1.01
    assert np.abs(theirs(found) - expected).max() > 1e-4


@pytest.mark.parametrize('norm_position', [f'{name}+prores' for name in placements.PLACEMENTS])
def test_ramps_that_have_not_ended(tmp_path, norm_position):
    """Of three layers the first is ramped up, the others are not; without the factors the numbers are others."""
    model, params = network(norm_position, ramp_steps=10)
    model = model.clone(trained_steps=17)
    hf_llama.save(tmp_path / 'out', model, params)
    expected = np.asarray(logits(model, params))
    np.testing.assert_allclose(theirs(pretrained(tmp_path / 'out')), expected, rtol=0, atol=1e-4)
    config = json.loads((tmp_path / 'out/config.json').read_text())
    for layer in config['placements']:
        layer['mlp'].pop('ramp', None)
    edit(tmp_path / 'out', placements=config['placements'])
    assert np.abs(theirs(pretrained(tmp_path / 'out')) - expected).max() > 1e-4


def test_ramped_up_pre_ln_is_their_class(tmp_path):
    model, params = network('pre+prores', ramp_steps=10)
    hf_llama.save(tmp_path / 'out', model.clone(trained_steps=30), params)
    found = pretrained(tmp_path / 'out')
    assert type(found) is transformers.LlamaForCausalLM
    np.testing.assert_allclose(theirs(found), logits(model, params), rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ['pre', 'post', 'mix', 'sandwich', 'lns'])
def test_golden_folders_through_us(tmp_path, name):
    """The authors' weights, read and written here, give the authors' numbers there."""
    hf_llama.save(tmp_path / 'out', *hf_llama.load(GOLDEN / name, name))
    expected = np.load(GOLDEN / name / 'expected.npz')
    real = expected['attention_mask'].astype(bool)
    found = theirs(pretrained(tmp_path / 'out'), expected['input_ids'])
    np.testing.assert_allclose(found[real], expected['logits'][real], rtol=0, atol=1e-4)


@pytest.mark.parametrize('norm_position', ['pre', 'mix', 'hybridnorm_star', 'peri'])
@pytest.mark.parametrize('kind', ['', 'tied'])
def test_reward_networks_compute_the_same(tmp_path, norm_position, kind):
    """A number for each text, at its last token: `pad_token_id` tells where the text ends."""
    model, params = network(norm_position, num_outputs=1, vocab_size=259, **KINDS.get(kind, {}))
    hf_llama.save(tmp_path / 'out', model, params, tokenizers.Bytes())
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    found = load(tmp_path / 'out', trust_remote_code=norm_position != 'pre').eval()
    assert (type(found) is transformers.LlamaForSequenceClassification) == (norm_position == 'pre')
    ids = np.array([[65, 66, 67, 258, 256, 256], [67, 66, 65, 70, 71, 258], [66, 258, 256, 256, 256, 256]])
    mask = ids != 256
    with torch.no_grad():
        rewards = found(torch.asarray(ids), attention_mask=torch.asarray(mask), use_cache=False).logits.numpy()
    outputs, _ = model.apply({'params': params}, ids)
    expected = np.asarray(outputs)[np.arange(3), mask.sum(1) - 1]
    assert rewards.shape == (3, 1)
    np.testing.assert_allclose(rewards, expected, rtol=0, atol=1e-5)
    again, read = hf_llama.load(tmp_path / 'out')
    assert again.num_outputs == 1
    np.testing.assert_array_equal(read['score']['kernel'], params['score']['kernel'])


@pytest.mark.parametrize('norm_position', ['pre', 'mix'])
def test_a_tied_head_is_trained_with_the_embedding(tmp_path, norm_position):
    """There as here: one tensor, whose gradient is that of both."""
    model, params = network(norm_position, **KINDS['tied'])
    hf_llama.save(tmp_path / 'out', model, params)
    found = pretrained(tmp_path / 'out')
    assert found.lm_head.weight is found.model.embed_tokens.weight
    found(torch.asarray(IDS), labels=torch.asarray(IDS), use_cache=False).loss.backward()
    batch = {'inputs': IDS[:, :-1], 'targets': IDS[:, 1:], 'loss_mask': np.ones((2, 4))}
    grads = jax.grad(lambda params: Language(model).losses(params, batch).sum / 8)(params)
    expected = found.model.embed_tokens.weight.grad.numpy()
    np.testing.assert_allclose(grads['embed']['embedding'][:11], expected, rtol=0, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def test_removed_layers_keep_their_constants(tmp_path):
    model, params = network('lns,deepnorm', num_layers=2)
    model = model.clone(layer_index=(2, 5), depth=6)
    hf_llama.save(tmp_path / 'out', model, params)
    np.testing.assert_allclose(theirs(pretrained(tmp_path / 'out')), logits(model, params), rtol=0, atol=1e-4)


@pytest.mark.parametrize('norm_position', ['pre', 'mix'])
def test_generation_with_a_cache_and_without(tmp_path, norm_position):
    hf_llama.save(tmp_path / 'out', *network(norm_position))
    model = pretrained(tmp_path / 'out')
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    cached, whole = (model.generate(torch.asarray(IDS), use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(whole.logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize('norm_position', ['pre', 'mix', 'hybridnorm_star'])
def test_greedy_tokens_are_those_of_generate(tmp_path, norm_position):
    """Their padding is on the left, ours on the right: prompts of unequal length go on in the same way."""
    model, params = network(norm_position)
    hf_llama.save(tmp_path / 'out', model, params)
    found, prompts = pretrained(tmp_path / 'out'), [[1, 2, 3, 4, 5], [7], [10, 9, 8]]
    end = 6
    ours = Sampler(model, 64).generate(params, prompts, max_new=20, sampling=Sampling(temperature=0), end_ids=[end])
    stops = dict(max_new_tokens=20, do_sample=False, eos_token_id=end, pad_token_id=0)
    for prompt, row in zip(prompts, ours, strict=True):  # one by one: other placements have no padding there
        [ids] = found.generate(torch.asarray([prompt]), **stops).tolist()
        assert row.ids == ids[len(prompt) :]
    if norm_position == 'pre':
        padded = torch.asarray([[0] * (5 - len(prompt)) + prompt for prompt in prompts])
        mask = torch.asarray([[0] * (5 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        for row, ids in zip(ours, found.generate(padded, attention_mask=mask, **stops).tolist(), strict=True):
            assert row.ids == ids[5 : 5 + len(row.ids)]
    assert len({tuple(row.ids) for row in ours}) > 1


def test_bfloat16(tmp_path):
    model, params = network('mix')
    hf_llama.save(tmp_path / 'out', model, params, dtype='bfloat16')
    assert pretrained(tmp_path / 'out', dtype='auto').dtype == torch.bfloat16
    rounded = hf_llama.load(tmp_path / 'out')
    np.testing.assert_allclose(
        theirs(pretrained(tmp_path / 'out', dtype='float32')), logits(*rounded), rtol=0, atol=1e-4
    )


def test_no_stock_class_opens_another_placement(tmp_path):
    hf_llama.save(tmp_path / 'out', *network('mix'))
    with pytest.raises(ValueError, match='trust_remote_code'):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out', trust_remote_code=False)


SCALING = {
    'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
    'original_max_position_embeddings': 24,
}  # fmt: skip
THEIRS = {
    'plain': {},
    'tied': {'tie_word_embeddings': True},
    'biases': {'attention_bias': True, 'mlp_bias': True},
    'head_dim': {'head_dim': 12},
    'llama3': {'rope_parameters': {**SCALING, 'rope_theta': 100.0}},
    'llama3 of transformers 4': {'rope_scaling': SCALING, 'rope_theta': 100.0},
}
THEIRS['all'] = {name: value for kind in list(THEIRS.values())[:-1] for name, value in kind.items()}


@pytest.mark.parametrize(
    'dtype, max_shard_size, kind',
    [
        *((dtype, size, 'plain') for dtype in (torch.bfloat16, torch.float16) for size in ('5GB', '20KB')),
        (torch.float32, '20KB', 'plain'),
        *((torch.float32, '5GB', kind) for kind in THEIRS),
    ],
)
def test_their_folders_here(tmp_path, dtype, max_shard_size, kind):
    torch.manual_seed(0)
    options = dict(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, rms_norm_eps=1e-5, rope_theta=5e5,
    )  # fmt: skip
    config = transformers.LlamaConfig(**options | THEIRS[kind])
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / 'model.safetensors.index.json').exists() == (max_shard_size == '20KB')
    if kind == 'llama3 of transformers 4':
        edit(tmp_path, rope_parameters=None, **THEIRS[kind])
    ours, params = hf_llama.load(tmp_path)
    assert ours.config.rope_theta == config.rope_parameters['rope_theta']
    ids = np.random.default_rng(0).integers(0, 200, (2, 40))
    found, _ = ours.apply({'params': params}, ids)
    expected = theirs(pretrained(tmp_path, dtype='float32'), ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    if 'llama3' in kind:  # the comparison must be able to fail
        plain = ours.clone(config=dataclasses.replace(ours.config, rope_type='default'))
        assert np.abs(plain.apply({'params': params}, ids)[0] - expected).max() > 1e-2


@pytest.mark.parametrize('name', ['bytes', 't5', 'byte_level', 'unigram', 'wordpiece'])
@pytest.mark.parametrize('norm_position', ['pre', 'mix'])
def test_tokenizers_give_the_same_ids(tmp_path, opened, name, norm_position):  # the fixture opens vocabularies
    tokenizer = opened(name)
    hf_llama.save(tmp_path / 'out', *network(norm_position), tokenizer)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out', trust_remote_code=norm_position == 'mix')
    for text in (*vocabularies.prose(50, seed=2), ' two  spaces\n\tand Größe '):
        assert found(text, add_special_tokens=False)['input_ids'] == tokenizer.encode(text).tolist()
    assert (found.eos_token_id, found.bos_token_id) == (tokenizer.eos_id, tokenizer.bos_id)


@pytest.mark.parametrize('norm_position', ['pre', 'mix'])
def test_lm_eval(tmp_path, norm_position):
    """The likelihoods that the evaluation harness finds are those of our logits."""
    tokenizer = tokenizers.Bytes()
    model, params = network(norm_position, vocab_size=tokenizer.vocab_size)
    hf_llama.save(tmp_path / 'out', model, params, tokenizer)
    harness = HFLM(str(tmp_path / 'out'), device='cpu', dtype='float32', trust_remote_code=True, batch_size=2)
    texts = [('The quick brown', ' fox'), ('Zwölf', ' Boxkämpfer jagen')]
    asked = [Instance('loglikelihood', {}, text, number) for number, text in enumerate(texts)]
    for (context, text), (found, _) in zip(texts, harness.loglikelihood(asked), strict=True):
        ids = np.concatenate([tokenizer.encode(context), tokenizer.encode(text)])
        scores = torch.asarray(np.array(model.apply({'params': params}, ids[None, :-1])[0][0])).log_softmax(-1)
        first = len(tokenizer.encode(context)) - 1
        expected = sum(scores[at, ids[at + 1]].item() for at in range(first, len(ids) - 1))
        assert found == pytest.approx(expected, abs=1e-3)

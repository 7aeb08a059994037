"""What transformers computes from BERT folders, and we: needs torch, see requirements-parity.txt.

transformers 5 has no SQuAD processors and no scorer any more; what transformers 4's gave is in golden/squad.
"""

import jax
import numpy as np
import pytest
import torch
import transformers
from questions import CONTEXT, GOLDEN, golden_features, write_vocabulary

from mixln_jax.data import squad
from mixln_jax.models.hf import bert as hf_bert
from mixln_jax.tasks import question_answering

SIZES = dict(vocab_size=200, hidden_size=48, intermediate_size=192, num_hidden_layers=4, num_attention_heads=12)
WEIGHTS = (np.arange(40) < np.array([[40], [23], [9]])).astype(int)
IDS = np.random.default_rng(0).integers(0, 200, WEIGHTS.shape)
TYPES = (np.arange(40) >= np.array([[12], [5], [7]])).astype(int) * WEIGHTS


@pytest.fixture(params=['BertModel', 'BertForQuestionAnswering'])
def theirs(request):
    """A network of BERT-base's shape, narrow, with biases and gains that are not those it starts with."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, max_position_embeddings=64, initializer_range=0.2)
    model = getattr(transformers, request.param)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    return model


@torch.no_grad()
def theirs_computes(model, ids=IDS, types=TYPES, weights=WEIGHTS):
    ids, types, weights = map(torch.asarray, (ids, types, weights))
    found = model(ids, token_type_ids=types, attention_mask=weights, output_hidden_states=True)
    spans = [getattr(found, f'{at}_logits').numpy() for at in ('start', 'end') if hasattr(found, f'{at}_logits')]
    return np.stack([hidden.numpy() for hidden in found.hidden_states]), spans


def ours_computes(model, params):
    batch = {'inputs': IDS, 'types': TYPES, 'token_mask': WEIGHTS}
    find = jax.jit(lambda p, **how: model.apply({'params': p}, batch, **how), static_argnames=('capture', 'method'))
    _, out = find(params, capture=True, method='backbone')
    return out['hidden'], find(params) if model.head else []


@pytest.mark.parametrize('max_shard_size', ['5GB', '200KB'])
def test_hidden_states_and_logits(tmp_path, theirs, max_shard_size):
    theirs.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / 'model.safetensors.index.json').exists() == (max_shard_size == '200KB')
    ours, real = hf_bert.load(tmp_path), WEIGHTS.astype(bool)
    hidden, spans = ours_computes(*ours)
    expected, logits = theirs_computes(theirs)
    assert hidden.shape == expected.shape == (5, 3, 40, 48)
    np.testing.assert_allclose(hidden[:, real], expected[:, real], rtol=0, atol=1e-4)
    assert len(spans) == len(logits)
    for found, logit in zip(spans, logits, strict=True):
        np.testing.assert_allclose(found[real], logit[real], rtol=0, atol=1e-4)
    # The comparison must be able to fail: a bias of the last layer, moved a little.
    with torch.no_grad():
        next(weight for name, weight in theirs.named_parameters() if '3.intermediate.dense.bias' in name)[1] += 0.1
    moved, logits = theirs_computes(theirs)
    assert np.abs(hidden - moved)[:, real].max() > 1e-3
    assert all(np.abs(found - logit)[real].max() > 1e-3 for found, logit in zip(spans, logits, strict=True))


def test_rows_are_those_of_their_tokenizer(tmp_path):
    """With windows that overlap by what our stride leaves."""
    ours = squad.open_tokenizer(write_vocabulary(tmp_path))
    features = squad.make_features([squad.Question('', 'Who sat?', CONTEXT, ('cat',), False)], ours, 13, 3, 5)
    tokenizer = transformers.BertTokenizer(str(tmp_path / 'vocab.txt'), do_lower_case=True)
    found = tokenizer(
        'Who sat?', CONTEXT, truncation='only_second', max_length=13, stride=7 - 3, padding='max_length',
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    np.testing.assert_array_equal(features.inputs, found['input_ids'])
    np.testing.assert_array_equal(features.types, found['token_type_ids'])
    np.testing.assert_array_equal(features.token_mask, found['attention_mask'])
    offsets = np.array(found['offset_mapping']) * features.context[..., None]
    np.testing.assert_array_equal(features.offsets, offsets)


@pytest.mark.parametrize('version', ['v1', 'v2'])
def test_answers_and_scores(version):
    """By this transformers' logits of golden/squad, and by ours, they are those that transformers 4 found."""
    examples, features, expected = golden_features(version)
    model = transformers.BertForQuestionAnswering.from_pretrained(GOLDEN).eval()
    arrays = features.inputs, features.types, features.token_mask
    _, logits = theirs_computes(model, *arrays)
    texts = question_answering.best_answers(*logits, features, examples)
    assert texts == list(expected['predictions'].values())
    found, again = (
        question_answering.scores(texts, examples),
        question_answering.evaluate(*hf_bert.load(GOLDEN), features, examples, 8),
    )
    for name in ('exact_match', 'f1'):
        np.testing.assert_array_equal(found[name], again[name])
        assert 100 * found[name].mean() == pytest.approx(expected[name], abs=1e-9)
    with torch.no_grad():
        model.qa_outputs.weight[0, ::2] *= -1
    _, logits = theirs_computes(model, *arrays)
    assert question_answering.best_answers(*logits, features, examples) != texts

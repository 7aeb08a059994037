"""BERT against an independent float64 reference over Hugging Face tensors, and what is refused of its folders."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hf_folders import change, edit

from mixln_jax import config as configs
from mixln_jax.models import bert, families, layers, placements
from mixln_jax.models.hf import bert as hf_bert
from mixln_jax.system.errors import CheckpointError, UsageError
from mixln_jax.tasks.question_answering import QuestionAnswering

L, D, H, F, V, POSITIONS = 3, 8, 2, 12, 11, 9
SIZES = dict(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=H, layer_norm_eps=1e-12,
    max_position_embeddings=POSITIONS, type_vocab_size=2, model_type='bert', hidden_act='gelu', is_decoder=False,
)  # fmt: skip
IDS = np.random.default_rng(1).integers(0, V, (2, 6))
TYPES = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 0, 0]])
WEIGHTS = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
REAL = WEIGHTS.astype(bool)
BATCH = {'inputs': IDS, 'types': TYPES, 'token_mask': WEIGHTS}


def random_tensors():
    """Those of a BertForQuestionAnswering, without `bert.`; norm gains about 1, no two numbers alike."""
    linear = lambda name, out, into: {f'{name}.weight': (out, into), f'{name}.bias': (out,)}  # noqa: E731
    shapes = {f'embeddings.{name}_embeddings.weight': (rows, D)
              for name, rows in (('word', V), ('position', POSITIONS), ('token_type', 2))}  # fmt: skip
    for norm in ('embeddings', *(f'encoder.layer.{l}.{at}output' for l in range(L) for at in ('attention.', ''))):
        shapes |= {f'{norm}.LayerNorm.weight': (D,), f'{norm}.LayerNorm.bias': (D,)}
    for l in range(L):
        at = f'encoder.layer.{l}.'
        for name in ('self.query', 'self.key', 'self.value', 'output.dense'):
            shapes |= linear(f'{at}attention.{name}', D, D)
        shapes |= linear(f'{at}intermediate.dense', F, D) | linear(f'{at}output.dense', D, F)
    rng = np.random.default_rng(0)
    shapes |= linear('qa_outputs', 2, D)
    return {
        name: rng.normal('LayerNorm.weight' in name, 0.4, shape).astype(np.float32) for name, shape in shapes.items()
    }


TENSORS = random_tensors()


def write(folder, tensors=TENSORS, **config):
    """A folder of BERT; returns it."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(SIZES | config))
    return folder


# --- The reference, straight from the paper (arXiv 1810.04805) and Vaswani et al. (arXiv 1706.03762)


def layer_norm(x, tensors, name, eps=1e-12):
    """x [..., D]: Ba et al., arXiv 1607.06450."""
    centred = x - x.mean(axis=-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return x * tensors[f'{name}.LayerNorm.weight'] + tensors[f'{name}.LayerNorm.bias']


def reference(tensors, ids, types, weights, keep=(True,) * L, heads=H):
    """([L+1,B,T,D], start [B,T], end [B,T]) in float64; `weights` 0: a key that is not seen."""
    tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    linear = lambda x, name: x @ tensors[f'{name}.weight'].T + tensors[f'{name}.bias']  # noqa: E731
    x = tensors['embeddings.word_embeddings.weight'][ids] + tensors['embeddings.token_type_embeddings.weight'][types]
    x = layer_norm(x + tensors['embeddings.position_embeddings.weight'][: ids.shape[1]], tensors, 'embeddings')
    hidden = [x]
    for l in range(L):
        if keep[l]:
            at = f'encoder.layer.{l}'
            outputs = []
            for head in range(heads):
                part = slice(head * D // heads, (head + 1) * D // heads)
                q, k, v = (linear(x, f'{at}.attention.self.{name}')[..., part] for name in ('query', 'key', 'value'))
                p = np.exp(q @ np.swapaxes(k, 1, 2) / np.sqrt(D // heads)) * weights[:, None, :]
                outputs.append(p / p.sum(axis=-1, keepdims=True) @ v)
            h = linear(np.concatenate(outputs, axis=-1), f'{at}.attention.output.dense')
            x = layer_norm(x + h, tensors, f'{at}.attention.output')
            h = linear(x, f'{at}.intermediate.dense')
            h = h * 0.5 * (1 + np.vectorize(math.erf)(h / np.sqrt(2)))
            x = layer_norm(x + linear(h, f'{at}.output.dense'), tensors, f'{at}.output')
        hidden.append(x)
    span = linear(x, 'qa_outputs')
    return np.stack(hidden), span[..., 0], span[..., 1]


# --- The network


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    return hf_bert.load(write(tmp_path_factory.mktemp('bert')))


@functools.partial(jax.jit, static_argnums=0)
def spans(model, params, keep=None):
    return jnp.stack(model.apply({'params': params}, BATCH, keep))


@functools.partial(jax.jit, static_argnums=0)
def backbone(model, params, keep=None):
    return model.apply({'params': params}, BATCH, keep, capture=True, method='backbone')


def random_network(*norm_position, **changes):
    sizes = dict(vocab_size=V, hidden_size=D, intermediate_size=F, num_heads=H, norm_eps=1e-12, num_layers=L)
    model = bert.Bert(configs.Model(**(sizes | changes)), norm_position, (1, 2, 3), L, 'float32', head=bert.SPANS)
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape), model.shapes()['params'])


@pytest.mark.parametrize('keep', [None, (True, False, True), (False, True, True), (False, False, False)])
def test_the_reference(network, keep):
    hidden, *expected = reference(TENSORS, IDS, TYPES, WEIGHTS, keep or (True,) * L)
    x, out = backbone(*network, None if keep is None else np.array(keep))
    np.testing.assert_allclose(out['hidden'][:, REAL], hidden[:, REAL], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(x, out['hidden'][-1])  # no final norm
    found = spans(*network, None if keep is None else np.array(keep))
    np.testing.assert_allclose(found[:, REAL], np.stack(expected)[:, REAL], rtol=0, atol=1e-5)


def test_heads_of_an_odd_size(tmp_path):
    """Rotary positions turn pairs of features; BERT has none."""
    model, params = hf_bert.load(write(tmp_path / 'bert', num_attention_heads=8))
    assert model.config.head_size == 1
    _, *expected = reference(TENSORS, IDS, TYPES, WEIGHTS, heads=8)
    np.testing.assert_allclose(spans(model, params)[:, REAL], np.stack(expected)[:, REAL], rtol=0, atol=1e-5)
    assert families.from_config(configs.Model(family='bert', hidden_size=9, num_heads=3)).config.head_size == 3


def test_every_tensor_matters(network, tmp_path):
    before = spans(*network)
    for name, tensor in TENSORS.items():
        rng = np.random.default_rng(0)
        moved = TENSORS | {name: tensor + rng.normal(0, 0.1, tensor.shape).astype(np.float32)}
        differ = np.abs(spans(*hf_bert.load(write(tmp_path / 'moved', moved))) - before).max()
        # What a bias adds to all keys alike, the softmax takes away.
        assert (differ < 1e-5) if name.endswith('key.bias') else (differ > 1e-3), name


def test_branches(network):
    """What is captured of sub-layers: the stream before attention is what the layer sees."""
    _, out = backbone(*network)
    assert {name: leaf.shape for name, leaf in out['branches'].items()} == dict.fromkeys(
        ('stream_norm', 'norm', 'mean'), (L, 2, *IDS.shape)
    )
    hidden, *_ = reference(TENSORS, IDS, TYPES, WEIGHTS)
    lengths = np.linalg.norm(hidden[:-1], axis=-1)
    np.testing.assert_allclose(out['branches']['stream_norm'][:, 0][:, REAL], lengths[:, REAL], rtol=1e-5)


def test_padding_does_not_matter(network):
    model, params = network
    find = jax.jit(lambda **batch: jnp.stack(model.apply({'params': params}, batch)))
    alone, ids = find(inputs=IDS[1:, :4], types=TYPES[1:, :4]), np.where(REAL, IDS, 7)
    padded = find(inputs=ids, types=TYPES, token_mask=WEIGHTS)
    np.testing.assert_allclose(padded[:, 1:, :4], alone, rtol=0, atol=1e-5)
    assert np.abs(find(inputs=ids, types=TYPES)[:, 1:, :4] - alone).max() > 1e-3


def test_one_program_for_every_layer_that_is_removed(network):
    before = spans._cache_size()
    for layer in range(L):
        spans(*network, np.arange(L) != layer)
    assert spans._cache_size() <= before + 1


@pytest.mark.parametrize('name', placements.PLACEMENTS)
def test_placements(name):
    """All of them make a network: after three layers the stream is one of numbers."""
    model, params = random_network(*[name] * L, norm_groups=2, scan_unroll='1')
    _, out = backbone(model, params)
    assert out['hidden'].shape == (L + 1, *IDS.shape, D)
    assert np.isfinite(out['hidden']).all()


def test_segments_loops_and_recomputation():
    names = 'post', 'pre', 'post'
    model, params = random_network(*names)
    assert list(params['layers']) == ['segment_0', 'segment_1', 'segment_2']
    x, _ = backbone(model, params)
    looped, _ = backbone(random_network(*names, scan_unroll='1', remat='full')[0], params)
    np.testing.assert_allclose(looped, x, rtol=1e-5, atol=1e-5)


def test_layer_norm_over_groups_and_times_a_constant():
    x = np.random.default_rng(0).normal(3, 2, (2, 5, D)).astype(np.float32)
    gain, bias = np.arange(D) / D, np.arange(D) - 1.0
    for groups in (1, 2):
        parts = x.reshape(2, 5, groups, -1).astype(np.float64)
        parts = (parts - parts.mean(-1, keepdims=True)) / parts.std(-1, keepdims=True)
        norm = layers.LayerNorm(1e-12, jnp.float32, groups)
        found = norm.apply({'params': {'scale': gain, 'bias': bias}}, x, 0.5)
        np.testing.assert_allclose(found, (parts.reshape(x.shape) * gain + bias) / 2, rtol=0, atol=1e-5)


def test_bfloat16(network):
    exact = np.asarray(spans(*network))
    rounded = spans(network[0].clone(compute_dtype='bfloat16'), network[1])
    assert rounded.dtype == np.float32
    assert 1e-4 < np.abs(rounded - exact)[:, REAL].max() < 0.1 * np.abs(exact).max()


def test_rows_longer_than_the_table_of_positions(network):
    model, params = network
    with pytest.raises(UsageError, match='rows of 10 tokens, but BERT has 9 positions'):
        model.apply({'params': params}, np.zeros((1, 10), int))


# --- Folders


def other(tensors, prefix='bert.', old=True):
    """The tensors as older versions name them, with what is of no use here."""
    named = {name if name.startswith('qa') else f'{prefix}{name}': tensor for name, tensor in tensors.items()}
    if old:
        renamed = lambda name: name.replace('Norm.weight', 'Norm.gamma').replace('Norm.bias', 'Norm.beta')  # noqa: E731
        named = {renamed(name): tensor for name, tensor in named.items()}
    return named | {
        f'{prefix}pooler.dense.weight': np.ones((D, D), np.float32),
        f'{prefix}pooler.dense.bias': np.ones(D, np.float32),
        f'{prefix}embeddings.position_ids': np.arange(POSITIONS)[None],
        'cls.predictions.bias': np.ones(V, np.float32),
        'cls.seq_relationship.weight': np.ones((2, D), np.float32),
    }


@pytest.mark.parametrize(
    'name, tensor', [('position_ids', np.arange(1, 10)[None]), ('token_type_ids', np.ones((1, 9)))]
)
def test_buffers_that_say_something_else(tmp_path, name, tensor):
    name = f'embeddings.{name}'
    folder = write(tmp_path / 'folder', TENSORS | {name: np.zeros_like(tensor) if 'type' in name else tensor - 1})
    hf_bert.load(folder)
    with pytest.raises(CheckpointError, match=f'tensor {name} does not hold'):
        hf_bert.load(write(folder, TENSORS | {name: tensor}))


@pytest.mark.parametrize('old', [False, True])
@pytest.mark.parametrize('prefix', ['', 'bert.'])
def test_names_of_tensors(network, tmp_path, prefix, old):
    found = hf_bert.load(write(tmp_path / 'other', other(TENSORS, prefix, old)))
    jax.tree.map(np.testing.assert_array_equal, found[1], network[1])
    assert found[0] == network[0]


def test_shards(network, tmp_path):
    folder = write(tmp_path / 'shards')
    (folder / 'model.safetensors').unlink()
    names = sorted(TENSORS)
    files = {f'model-0000{n + 1}-of-00002.safetensors': names[n::2] for n in range(2)}
    for file, inside in files.items():
        safetensors.numpy.save_file({name: TENSORS[name] for name in inside}, folder / file)
    index = {'weight_map': {name: file for file, inside in files.items() for name in inside}}
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, hf_bert.load(folder)[1], network[1])


def test_a_trunk_alone(network, tmp_path):
    """BertModel has no head; a folder that says it has one and lacks it is refused."""
    tensors = {name: tensor for name, tensor in TENSORS.items() if not name.startswith('qa')}
    folder = write(tmp_path / 'backbone', tensors, architectures=['BertModel'])
    model, params = hf_bert.load(folder)
    np.testing.assert_array_equal(backbone(model, params)[0], backbone(*network)[0])
    with pytest.raises(UsageError, match=r'no head: neither one that finds spans \(qa_outputs\)'):
        model.apply({'params': params}, IDS)
    edit(folder, architectures=['BertForQuestionAnswering'])
    with pytest.raises(CheckpointError, match='no tensor qa_outputs.bias, which BertForQuestionAnswering needs'):
        hf_bert.load(folder)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'model_type': 'llama'}, "model_type='llama' is not bert"),
        ({'hidden_act': 'gelu_new'}, "hidden_act='gelu_new' is not modelled here, only 'gelu'"),
        ({'position_embedding_type': 'relative_key'}, "position_embedding_type='relative_key' is not modelled"),
        ({'is_decoder': True}, 'is_decoder=True is not modelled here'),
        ({'layer_norm_eps': None}, 'has no key layer_norm_eps'),
        ({'type_vocab_size': 0}, 'type_vocab_size=0 is not a number of rows'),
        ({'hidden_size': 'wide'}, "config.model.hidden_size must be of type int, not 'wide'"),
        ({'num_attention_heads': 3}, 'is not divisible by config.model.num_heads=3'),
    ],
)
def test_configs_that_are_refused(tmp_path, changes, message):
    folder = write(tmp_path / 'bert')
    edit(folder, **changes)
    with pytest.raises(CheckpointError, match=f'config.json.*{message}'):
        hf_bert.load(folder)


@pytest.mark.parametrize(
    'name, how, message',
    [
        ('encoder.layer.1.output.dense.bias', lambda tensor: None, 'no tensor bert.encoder.layer.1.output.dense.bias'),
        ('classifier.weight', lambda _: np.ones((2, D), np.float32), 'tensor bert.classifier.weight has no place'),
        ('embeddings.word_embeddings.weight', lambda tensor: tensor[:-1], r'has shape \(10, 8\), .* makes it \(11, 8'),
        ('encoder.layer.0.intermediate.dense.weight', lambda tensor: tensor.T, r'shape \(12, 8\), .* it \(8, 12\)'),
        ('embeddings.LayerNorm.gamma', lambda tensor: tensor * np.nan, 'LayerNorm.gamma is not finite numbers'),
    ],
)
def test_tensors_that_are_refused(tmp_path, name, how, message):
    folder = write(tmp_path / 'bert', other(TENSORS))
    hf_bert.load(folder)
    change(folder, f'bert.{name}', how)
    with pytest.raises(CheckpointError, match=message):
        hf_bert.load(folder)


def test_files_that_are_not_there(tmp_path):
    folder = write(tmp_path / 'bert')
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(CheckpointError, match='pytorch_model.bin, a pickle, which is never opened'):
        hf_bert.load(folder)
    (folder / 'pytorch_model.bin').unlink()
    with pytest.raises(UsageError, match='model.safetensors does not exist'):
        hf_bert.load(folder)


def test_the_loss_of_answers_and_its_gradient(network):
    """The mean of both cross-entropies, and the slope of the float64 reference's loss along one direction."""
    model, params = network
    task = QuestionAnswering(model)
    answer, known = np.array([[2, 4], [0, 0]], np.int32), np.array([1.0, 1.0], np.float32)

    def reference_loss(tensors):
        _, *logits = reference(tensors, IDS, TYPES, WEIGHTS)
        of = lambda logits, at: np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, at[:, None], -1)[:, 0]  # noqa: E731
        return np.mean([of(one, answer[:, number]) for number, one in enumerate(logits)], axis=0)

    batch = BATCH | {'answer': answer, 'answer_mask': known}
    losses = task.losses(params, batch)
    # Padding is not seen as a key, but its own logits take part in the softmax over positions, as in run_squad.py.
    np.testing.assert_allclose(losses.per_example, reference_loss(TENSORS), rtol=1e-5)
    assert float(losses.sum) == pytest.approx(float(losses.per_example.sum())) and losses.weight == 2
    masked = task.losses(params, batch | {'answer_mask': np.array([0.0, 1.0], np.float32)})
    assert masked.per_example[0] == 0 and masked.weight == 1
    name, leaf = 'encoder.layer.1.intermediate.dense.weight', ('mlp', 'up', 'kernel')
    direction = np.random.default_rng(0).normal(size=TENSORS[name].shape)
    moved = [reference_loss(TENSORS | {name: TENSORS[name] + h * direction}).sum() for h in (-1e-5, 1e-5)]
    gradient = jax.grad(lambda params: task.losses(params, batch).sum)(params)['layers']['segment_0']
    for part in leaf:
        gradient = gradient[part]
    assert float((gradient[1] * direction.T).sum()) == pytest.approx((moved[1] - moved[0]) / 2e-5, rel=1e-3)

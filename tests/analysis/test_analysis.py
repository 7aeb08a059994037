"""The analyses: cases by hand, float64 references, the authors' hidden states, batching, meshes, during training."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
import reference
from builders import SIZES, make, text, to_jax

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.analysis import angular, drop, during, gradients, samples, variance
from mixln_jax.distributed import mesh as meshes
from mixln_jax.models import families
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.models.network import flops_per_position
from mixln_jax.tasks.language import Language

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / 'tests/golden'
EACH = {
    job.NAME: lambda model, *arguments, job=job: job.measure(Language(model), *arguments)
    for job in (angular, variance, drop, gradients)
}


def on(model, **sizes):
    """The model on a mesh, of one device unless told otherwise."""
    mesh = meshes.make_mesh(configs.Mesh(**({'data': 1} | sizes)), jax.devices())
    return model.clone(stream_sharding=meshes.batch_sharding(mesh))


@functools.cache
def network(norm_position, seed=0):
    """(model on one device, its parameters, the reference's weights)."""
    rng, model = np.random.default_rng(seed), on(make(norm_position))
    weights = reference.init(rng, model.norm_position, **SIZES)
    return model, to_jax(model, weights), weights


def batched(batch, size):
    """A batch cut into batches of `size` rows, the last filled up with rows of weight 0."""
    rows = len(batch['inputs'])
    padded = {
        key: np.concatenate([values, np.zeros_like(values[:1]).repeat(-rows % size, 0)])
        for key, values in batch.items()
    }
    return [{key: values[at : at + size] for key, values in padded.items()} for at in range(0, rows, size)]


def numbers(tree):
    """All numbers of a result by name, errors left out."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: leaf is None)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return {name: np.asarray(leaf) for name, leaf in named.items() if 'error' not in name and leaf is not None}


def assert_equal(found, expected, tolerance=1e-6):
    """Every array within `tolerance` of its own largest number; a drop is a difference, which rounds as its metric."""
    found, expected = numbers(found), numbers(expected)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        metric, _, drop = name.partition("['drop']")
        scale = np.nanmax(np.abs(expected[f"{metric}['value']"] if drop else values), initial=0)
        np.testing.assert_allclose(found[name], values, rtol=0, atol=tolerance * scale, err_msg=name)


class TestByHand:
    def test_identity_layers_turn_nothing_and_are_not_missed(self):
        model, params, _ = network('pre')
        params = jax.tree.map(np.array, params)
        for sublayer, name in (('attention', 'o'), ('mlp', 'down')):
            params['layers']['segment_0'][sublayer][name]['kernel'][1] = 0
        batches = [text(np.random.default_rng(1))]
        matrix = angular.measure(Language(model), params, batches)['distance']['mean']
        assert matrix[1, 2] == matrix[2, 1] == 0 and (matrix.diagonal() == 0).all()
        assert matrix[0, 1] > 0.01 and matrix[2, 3] > 0.01
        for metric in drop.measure(Language(model), params, batches).values():
            assert metric['drop']['1']['mean'][1] == metric['drop']['1']['standard_error'][1] == 0
            assert abs(metric['drop']['1']['mean'][[0, 2]]).min() > 0.01
        found = variance.measure(Language(model), params, batches)
        assert found['contribution']['mlp']['mean'][1] == found['contribution']['attention']['mean'][1] == 0
        assert found['variance']['mean'][1] == found['variance']['mean'][2]

    def test_a_stream_that_is_turned_round(self):
        """Pre-LN on x = e, a constant: with W such that F = -2 x the stream is turned by pi, with |F| = 2 |x|."""
        model = on(make('pre', num_layers=1))
        params = jax.tree.map(np.zeros_like, jax.device_get(model.init(jax.random.key(0))['params']))
        params['embed']['embedding'][:] = 1
        layer = params['layers']['segment_0']
        for name in ('attention_norm_in', 'mlp_norm_in'):
            layer[name]['scale'][:] = 1
        layer['attention']['v']['kernel'][0, 0] = 1  # what head 0 reads of a position is 1
        layer['attention']['o']['kernel'][0, 0] = -2
        batch = text(np.random.default_rng(0))
        matrix = angular.measure(Language(model), params, [batch])['distance']['mean']
        assert matrix[0, 1] == 1
        shares = variance.measure(Language(model), params, [batch])['contribution']
        assert shares['attention']['mean'] == [pytest.approx(2, abs=1e-5)] and shares['mlp']['mean'] == [0]


@pytest.mark.parametrize('norm_position', ['mix', 'lns', 'deepnorm'])
def test_numbers_are_those_of_the_reference(norm_position):
    model, params, weights = network(norm_position)
    batch = text(np.random.default_rng(2))
    rows, heads = [batch[key] for key in ('inputs', 'targets', 'loss_mask')], {'heads': 4, 'kv_heads': 2}
    hidden, _ = reference.forward(weights, rows[0], model.norm_position, **heads)
    real = rows[2].astype(bool)
    matrix = [[reference.angular_distance(a, b)[real].mean() for b in hidden] for a in hidden]
    np.testing.assert_allclose(
        angular.measure(Language(model), params, [batch])['distance']['mean'], matrix, rtol=0, atol=2e-6
    )
    found = variance.measure(Language(model), params, [batch])['variance']['mean']
    np.testing.assert_allclose(found, [x.var(-1)[real].mean() for x in hidden], rtol=2e-5)

    loss = functools.partial(reference.loss, weights, *rows, model.norm_position, **heads)
    found = drop.measure(Language(model), params, [batch], blocks=(1, 2))
    whole = loss()
    assert found['perplexity']['value'] == pytest.approx(np.exp(whole), rel=1e-5)
    for block, keeps in (('1', [[0, 1, 1], [1, 0, 1], [1, 1, 0]]), ('2', [[0, 0, 1], [1, 0, 0]])):
        losses = np.array([loss(keep=keep) for keep in keeps])
        np.testing.assert_allclose(found['loss']['drop'][block]['mean'], losses - whole, rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            found['perplexity']['drop'][block]['mean'], np.exp(losses) - np.exp(whole), rtol=2e-5, atol=2e-5
        )

    grads = reference.gradients(weights, *rows, model.norm_position, **heads)
    found = gradients.measure(Language(model), params, [batch])
    norms = [np.sqrt(sum(np.square(leaf).sum() for leaf in layer.values())) for layer in grads['layers']]
    np.testing.assert_allclose(found['layers']['mean'], norms, rtol=2e-5)
    for name in ('attention/q', 'attention/o', 'mlp/up', 'mlp/down'):
        expected = [np.linalg.norm(layer[name.split('/')[1]]) for layer in grads['layers']]
        np.testing.assert_allclose(found['matrices'][name]['mean'], expected, rtol=5e-5)
    np.testing.assert_allclose(found['outside']['head']['mean'], np.linalg.norm(grads['head']), rtol=2e-5)


@pytest.mark.parametrize('name', ['pre', 'post', 'mix', 'sandwich', 'lns'])
def test_the_authors_hidden_states(name):
    """The matrix that follows from what their code computed; their last state comes after the final norm, so not it."""
    expected = np.load(GOLDEN / name / 'expected.npz')
    real = expected['attention_mask'].astype(bool)
    states = expected['hidden_states'][:-1].astype(np.float64)
    states /= np.linalg.norm(states, axis=-1, keepdims=True)
    cosines = np.einsum('abtd,cbtd->acbt', states, states)
    matrix = (np.arccos(np.clip(cosines, -1, 1)) / np.pi)[:, :, real].mean(-1)
    model, params = hf_llama.load(GOLDEN / name, name)
    batch = {'inputs': expected['input_ids'], 'targets': expected['input_ids'], 'loss_mask': real.astype(np.float32)}
    found = angular.measure(Language(on(model)), params, [batch])['distance']['mean'][:-1, :-1]
    np.testing.assert_allclose(found, matrix, rtol=0, atol=1e-5)
    assert np.abs(found - np.roll(matrix, 1, 0)).max() > 1e-2  # it could fail


class TestIndependence:
    """Of how rows are batched, in which order they come, and what follows their real tokens."""

    @pytest.fixture
    def batch(self):
        rng = np.random.default_rng(5)
        batch = text(rng, B=6, T=7)
        batch['loss_mask'][2, 3:] = 0
        return batch

    @pytest.mark.parametrize('name', EACH)
    def test_batch_size(self, batch, name):
        model, params, _ = network('mix')
        whole = EACH[name](model, params, [batch])
        for size in (1, 4):
            found = EACH[name](model, params, batched(batch, size))
            assert_equal(found, whole)

    @pytest.mark.parametrize('name', EACH)
    def test_order(self, batch, name):
        model, params, _ = network('mix')
        turned = {key: values[[3, 0, 5, 1, 4, 2]] for key, values in batch.items()}
        assert_equal(EACH[name](model, params, [turned]), EACH[name](model, params, [batch]))

    @pytest.mark.parametrize('name', EACH)
    def test_padding(self, batch, name):
        model, params, _ = network('mix')
        longer = {key: np.pad(values, [(0, 0), (0, 5)], constant_values=3) for key, values in batch.items()}
        longer['loss_mask'][:, 7:] = 0
        longer['inputs'][2, 3:] = 9  # no real token sees it
        assert_equal(EACH[name](model, params, [longer]), EACH[name](model, params, [batch]))

    def test_it_could_fail(self, batch):
        model, params, _ = network('mix')
        counted = batch | {'loss_mask': np.ones_like(batch['loss_mask'])}
        for name in EACH:
            with pytest.raises(AssertionError):
                assert_equal(EACH[name](model, params, [counted]), EACH[name](model, params, [batch]))


def test_gradients_of_several_batches():
    """Mean and standard error over gradients of so many rows; rows that are too few for one more are left, also where
    rows of weight 0 fill up their batch."""
    model, params, _ = network('pre')
    batch = text(np.random.default_rng(6), B=8)
    first, second = (gradients.measure(Language(model), params, batched(batch, 3)[at : at + 1]) for at in (0, 1))
    tokens = batch['loss_mask'][:6].sum()
    for size in (1, 3):
        found = gradients.measure(Language(model), params, batched(batch, size), rows=3)
        about = [found[name] for name in ('gradients', 'rows_per_gradient', 'rows', 'tokens')]
        assert about == [2, 3, 6, tokens]
    one, other = first['layers']['mean'], second['layers']['mean']
    np.testing.assert_allclose(found['layers']['mean'], (one + other) / 2, rtol=1e-5)
    np.testing.assert_allclose(found['layers']['standard_error'], abs(one - other) / 2, rtol=1e-4)
    assert first['layers']['standard_error'] is None


def test_every_layer_takes_one_compilation():
    model, params, _ = network('post,deepnorm,lns')
    before = drop._losses._cache_size()
    batch = text(np.random.default_rng(7), B=5)
    drop.measure(Language(model), params, batched(batch, 2))
    assert drop._losses._cache_size() == before + 1
    assert drop.masks(4, 3).tolist() == [[False] * 3 + [True], [True] + [False] * 3]


@pytest.mark.parametrize('name', EACH)
def test_meshes(name):
    rng = np.random.default_rng(8)
    model = make('mix', hidden_size=16, intermediate_size=32)
    params = model.init(jax.random.key(0))['params']
    batch = text(rng, B=8)
    single, many = on(model), on(model, data=2, fsdp=2, tensor=2)
    mesh = many.stream_sharding.mesh
    spread = jax.device_put(params, meshes.state_shardings(mesh, params))
    assert_equal(EACH[name](many, spread, [batch]), EACH[name](single, params, [batch]), 1e-5)


def test_a_sample_of_rows(corpus_rows):
    """Rows at random, the same whatever the batch size, real tokens counted, weight 0 after the last."""
    one, three = (samples.sample(Language(None), corpus_rows, 100, size) for size in (1, 3))
    rows = np.concatenate([batch['inputs'] for batch in one])
    np.testing.assert_array_equal(np.concatenate([batch['inputs'] for batch in three])[: len(rows)], rows)
    counts = np.concatenate([batch['loss_mask'].sum(-1) for batch in three])
    assert counts[: len(rows)].sum() >= 100 > counts[: len(rows) - 1].sum() and not counts[len(rows) :].any()
    in_order = corpus_rows.read(range(len(rows))).ids[:, :-1]
    assert not np.array_equal(in_order, rows)
    last = np.concatenate(
        [batch['position_mask'] for batch in samples.sample(Language(None), corpus_rows, 100, 1, last=True)]
    )
    real = np.concatenate([batch['loss_mask'] for batch in one])
    assert (last.sum(-1) == 1).all()
    assert [np.flatnonzero(row)[-1] for row in real] == last.argmax(-1).tolist()
    everything = samples.sample(Language(None), corpus_rows, 10**9, 4)
    assert sum((batch['loss_mask'].sum(-1) > 0).sum() for batch in everything) == len(corpus_rows)


@pytest.fixture(scope='module')
def corpus_rows(tmp_path_factory):
    import corpora

    from mixln_jax.data import rows, tokenizers

    path = tmp_path_factory.mktemp('text') / 'text.jsonl'
    rng = np.random.default_rng(0)
    corpora.write(path, [' '.join(rng.choice(['one', 'two', 'three'], rng.integers(2, 9))) for _ in range(50)])
    data = configs.Data(source='jsonl', path=str(path), tokenizer='bytes')
    return rows.open_rows(data, 'all', tokenizers.open_tokenizer(data), 24, 259)


class TestDuringTraining:
    def test_the_values_are_those_of_the_jobs(self, corpus_rows):
        config = configs.Config(
            seq_length=24,
            analysis=configs.Analysis(tokens=100),
            model=configs.Model(
                vocab_size=259, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, norm_position='lns'
            ),
        )
        model = on(families.from_config(config.model), data=4)  # which trains in bfloat16
        params = model.init(jax.random.key(3))['params']
        looks = []

        def watched(batches):
            looks.append(len(batches))
            return iter(batches)

        found = during.Analyses(config, Language(model), corpus_rows, watched)(params, np.int32(0))
        assert len(looks) == 4
        precise = model.clone(compute_dtype='float32')
        batches = samples.sample(Language(None), corpus_rows, 100, 8)
        expected = {name: measure(precise, params, batches) for name, measure in EACH.items()}
        matrix = expected['angular']['distance']['mean']
        np.testing.assert_allclose(found['analysis/angular_matrix'], matrix, rtol=0, atol=1e-6)
        assert found['analysis/angular_distance'] == [found['analysis/angular_matrix'][l][l + 1] for l in range(3)]
        for name, values in (
            ('perplexity_drop', expected['drop']['perplexity']['drop']['1']['mean']),
            ('grad_norm', expected['gradients']['layers']['mean']),
            ('variance', expected['variance']['variance']['mean'][1:]),
            ('contribution_attention', expected['variance']['contribution']['attention']['mean']),
            ('contribution_mlp', expected['variance']['contribution']['mlp']['mean']),
        ):
            np.testing.assert_allclose(found[f'analysis/{name}'], values, rtol=1e-5, atol=1e-6, err_msg=name)

    @pytest.mark.parametrize('recipe', sorted(ROOT.glob('configs/llama_*.py')), ids=lambda path: path.stem)
    def test_they_cost_little_by_default(self, recipe):
        config = configs.build(recipes.load(str(recipe)))
        shapes = families.from_config(config.model).shapes()['params']
        sizes = config.model
        number = families.from_config(config.model).num_params(shapes)
        flops = flops_per_position(
            number, sizes.vocab_size * sizes.hidden_size, sizes.num_layers, sizes.hidden_size,
            config.seq_length,
        )  # fmt: skip
        assert 0 < during.share(config, flops, config.seq_length) < 0.02

    def test_their_cost_by_hand(self):
        """4 layers of width 8: 1000 tokens every 50 steps of 2000, 10 forward passes, 8 * 25 * 8 for the angles."""
        config = configs.Config(
            batch_size=20, seq_length=100, num_steps=300, analysis=configs.Analysis(every=50, tokens=1000),
            model=configs.Model(num_layers=4, hidden_size=8),
        )  # fmt: skip
        call = 1000 * (10 * 1000 + 1600)
        assert during.share(config, 3000, config.seq_length) == pytest.approx(6 * call / (3000 * 2000 * 300))
        some = dataclasses.replace(config, num_steps=120)
        assert during.share(some, 3000, config.seq_length) == pytest.approx(
            3 * call / (3000 * 2000 * 120)
        )  # also after the last step
        once = dataclasses.replace(config, analysis=configs.Analysis(every=0, tokens=1000))
        assert during.share(once, 3000, config.seq_length) == pytest.approx(call / (3000 * 2000 * 300))

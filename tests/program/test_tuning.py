"""What is trained: LISA by a reference in numpy, adapters merged and unmerged, meshes, accumulation, wrong keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import MODEL, batch_of, make, text

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.data import batches
from mixln_jax.distributed import mesh as meshes
from mixln_jax.models import families, layers, placements
from mixln_jax.program import lora, optim, step, tuning
from mixln_jax.program.program import Program
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks.language import Language

LORA = configs.Tune(method='lora', rank=2, alpha=3.0)
BATCHES = [batch_of(np.random.default_rng(seed)) | batches.marks(np.arange(8), np.ones(8, bool)) for seed in range(4)]


def random_like(tree, seed=0):
    """Returns a network whose adapters are not zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype) if 'lora' in str(path) else leaf

    return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.mark.parametrize('norm_position', placements.PLACEMENTS)
def test_merged_and_unmerged_give_the_same_logits(norm_position):
    model = make(norm_position, init_std=0.1)
    network = lora.with_adapters(model.init(jax.random.key(0))['params'], LORA, jax.random.key(1))
    ids = text(np.random.default_rng(1))['inputs']
    logits = jax.jit(lambda params: model.apply({'params': params}, ids)[0])
    unmerged = logits(random_like(network))
    np.testing.assert_allclose(unmerged, logits(lora.merged(random_like(network))), rtol=0, atol=1e-5)
    assert np.abs(unmerged - logits(lora.base(network))).max() > 1e-3  # they do something
    np.testing.assert_array_equal(logits(network), logits(lora.base(network)))  # new ones do nothing


def test_what_a_matrix_with_an_adapter_computes():
    """x W + (x A) B alpha / r in float64, in each of the layers of a run."""
    model = make('pre', init_std=0.3)
    network = random_like(lora.with_adapters(model.init(jax.random.key(0))['params'], LORA, jax.random.key(1)))
    scales = dict(trees.named_leaves(lora.with_adapters(lora.base(network), LORA, jax.random.key(1))))
    assert {float(x) for name, leaf in scales.items() if name.endswith('scale') and 'lora' in name for x in leaf} == {
        1.5
    }
    up = network['layers']['segment_0']['mlp']['up']
    A, B, s, W = (np.asarray(up[name], np.float64) for name in ('lora_a', 'lora_b', 'lora_scale', 'kernel'))
    merged = lora.merged(network)['layers']['segment_0']['mlp']['up']
    assert {*merged} == {'kernel'}
    np.testing.assert_allclose(merged['kernel'], W + s[:, None, None] * (A @ B), rtol=1e-6, atol=1e-6)


def test_new_adapters():
    """A uniform up to 1/sqrt(in), different in every layer and matrix, of the seed alone; B zero."""
    model = families.from_config(dataclasses.replace(MODEL, hidden_size=64, intermediate_size=256), 'float32')
    base = model.init(jax.random.key(0))['params']
    made = lambda seed: dict(trees.named_leaves(lora.with_adapters(base, LORA, jax.random.key(seed))))  # noqa: E731
    found, other = made(1), made(2)
    drawn = {name: np.asarray(leaf) for name, leaf in found.items() if name.endswith('lora_a')}
    assert len(drawn) == 14
    for name, leaf in drawn.items():
        bound = leaf.shape[1] ** -0.5
        assert np.abs(leaf).max() <= bound and abs(leaf.std() / (bound / 3**0.5) - 1) < 0.15, name
        assert not np.array_equal(leaf, other[name])
    rows = [layer.ravel()[:8] for leaf in drawn.values() for layer in leaf]
    assert len({row.tobytes() for row in rows}) == len(rows)
    assert all(not leaf.any() for name, leaf in found.items() if name.endswith('lora_b'))


def test_chosen_matrices():
    base = make('post,pre*2').init(jax.random.key(0))['params']

    def adapted(matrices):
        tune = dataclasses.replace(LORA, matrices=matrices)
        names = [name for name, _ in trees.named_leaves(lora.with_adapters(base, tune, jax.random.key(0)))]
        return {name.split('/', 2)[2].removesuffix('/lora_a') for name in names if name.endswith('lora_a')}

    assert adapted('q, mlp/down') == {'attention/q', 'mlp/down'}
    assert len(adapted('all')) == 7


def lisa_reference(params, grads_of, tune, L, steps, rate, decay, clip, names):
    """AdamW by torch.optim's formulas: a layer that is not drawn is as if its gradient were None (Pan et al. 2024).

    `params`: {name: array}, layers stacked; `grads_of(params)` as well.
    """
    b1, b2, eps = 0.9, 0.999, 1e-3
    params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    m, v = ({name: np.zeros_like(leaf) for name, leaf in params.items()} for _ in range(2))
    counts, rest = np.zeros(L), 0
    for number in range(steps):
        drawn = np.asarray(tuning.drawn_layers(tune, 0, number, L))
        grads = {name: np.array(leaf, np.float64) for name, leaf in grads_of(params, number).items()}
        counts, rest = counts + drawn, rest + 1
        for name, grad in grads.items():
            if name in names:
                first, end = names[name]
                grad[~drawn[first:end]] = 0
        norm = np.sqrt(sum(np.square(grad).sum() for grad in grads.values()))
        for name, grad in grads.items():
            first, end = names.get(name, (None, None))
            here = np.ones(1, bool) if first is None else drawn[first:end]
            count = np.full(1, rest) if first is None else np.maximum(counts[first:end], 1)
            shape = (-1, *[1] * (grad.ndim - 1)) if name in names else ()
            here, count = here.reshape(shape), count.reshape(shape)
            grad = grad * min(1, clip / norm)
            m[name] = np.where(here, b1 * m[name] + (1 - b1) * grad, m[name])
            v[name] = np.where(here, b2 * v[name] + (1 - b2) * grad**2, v[name])
            update = (m[name] / (1 - b1**count)) / (np.sqrt(v[name] / (1 - b2**count)) + eps)
            update = update + decay * params[name] * name.endswith(('kernel', 'embedding'))
            params[name] = params[name] - rate * np.where(here, update, 0)
    return params


def test_lisa_is_the_reference():
    tune = configs.Tune(method='lisa', layers=2, interval=2)
    model = families.from_config(MODEL, 'float32')
    task, rule = Language(model), optim.optimizer(configs.Optim(name='adamw', weight_decay=0.3, eps=1e-3))
    state = step.init_state(task, rule, jax.random.key(0), tune=tune)
    first = dict(trees.named_leaves(state.params))
    update = jax.jit(
        functools.partial(
            step.train_step, task=task, optimizer=rule, schedule=lambda _: 0.01, clip_norm=0.05, tune=tune
        )
    )

    @jax.jit
    def gradient(params, batch):
        def mean(params):
            found = task.losses(params, batch)
            return found.sum / found.weight

        return jax.grad(mean)(params)

    def grads_of(params, number):
        tree = trees.nested((name, jnp.asarray(leaf, jnp.float32)) for name, leaf in params.items())
        return dict(trees.named_leaves(gradient(tree, BATCHES[number])))

    runs = placements.layer_runs(model.norm_position)
    names = {name: runs[int(name.split('/')[1][-1])][1:] for name in first if name.startswith('layers/')}
    expected = lisa_reference(first, grads_of, tune, 4, 4, 0.01, 0.3, 0.05, names)
    for batch in BATCHES:
        state, metrics = update(state, batch)
        norms = np.asarray(metrics['layer_grad_norm'])
        assert (norms > 0).sum() == 2 and np.isnan(norms).sum() == len(norms) - 2, 'who is not drawn has none'
    for name, leaf in trees.named_leaves(state.params):
        np.testing.assert_allclose(leaf, expected[name], rtol=0, atol=1e-6, err_msg=name)


def test_lisa_draws_uniformly_without_replacement():
    tune = configs.Tune(method='lisa', layers=2, interval=3)
    draw = jax.jit(jax.vmap(lambda number: tuning.drawn_layers(tune, 5, number, 6)))
    found = np.asarray(draw(jnp.arange(9000)))
    assert (found.sum(1) == 2).all()
    groups = found.reshape(3000, 3, 6)
    assert (groups == groups[:, :1]).all()  # the same for three steps
    assert (groups[1:, 0] != groups[:-1, 0]).any()
    pairs = np.zeros((6, 6))
    for row in groups[:, 0]:
        pairs[tuple(np.flatnonzero(row))] += 1
    assert ((pairs[np.triu_indices(6, 1)] - 200) ** 2 / 200).sum() < 36.1  # chi-square, 14 degrees, p = 0.001
    assert not np.array_equal(
        found, np.asarray(jax.vmap(lambda n: tuning.drawn_layers(tune, 6, n, 6))(jnp.arange(9000)))
    )


SMALL = {
    'batch_size': 8, 'seq_length': 6, 'compute_dtype': 'float32', 'device': 'cpu', 'mesh.data': 1, 'num_steps': 4,
    'model.vocab_size': 11, 'model.hidden_size': 8, 'model.intermediate_size': 16, 'model.num_layers': 4,
    'model.num_heads': 2, 'model.norm_position': 'post,pre*3', 'model.scan_unroll': '1', 'model.init_std': 0.3,
    'optim.name': 'adamw', 'optim.weight_decay': 0.1, 'optim.learning_rate': 0.01, 'optim.warmup_ratio': 0.0,
    'optim.eps': 1e-3,
}  # fmt: skip
METHODS = {
    'lora': {'tune.method': 'lora', 'init_from': 'x', 'tune.rank': 2, 'tune.dropout': 0.3},
    'muon': {'tune.method': 'lora', 'init_from': 'x', 'tune.rank': 2, 'optim.name': 'muon', 'tune.train': 'head/*'},
    'lisa': {'tune.method': 'lisa'},
    'probe': {'tune.train': 'head/*'},
}


def program(mesh=(1, 1, 1), **changes):
    values = configs.default()
    values.update_from_flattened_dict(SMALL | changes)
    devices = jax.devices('cpu')[: int(np.prod(mesh))]
    return Program(configs.build(values), meshes.make_mesh(configs.Mesh(*mesh), devices))


@functools.cache
def trained(name, mesh=(1, 1, 1), accumulate=1, **changes):
    ours = program(mesh, accumulate=accumulate, **METHODS[name], **changes)
    state, sharding = ours.init(jax.random.key(0)), meshes.batch_sharding(ours.mesh)
    for batch in BATCHES[:3]:
        state, _ = ours.train_step(state, meshes.to_devices(batch, sharding))
    return jax.device_get(state)


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('mesh, accumulate', [((2, 2, 2), 2)])
def test_neither_mesh_nor_accumulation_changes_an_update(name, mesh, accumulate):
    one, other = trained(name), trained(name, mesh, accumulate)
    for (leaf, a), b in zip(trees.named_leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=leaf)


def test_dropout_changes_the_updates():
    one, other = trained('lora'), trained('lora', seed=1)
    apart = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (one.params, other.params)), strict=True)]
    assert max(apart) > 1e-3


def test_dropout_by_example():
    """The share that is dropped, scaled, and independent of the neighbours in the batch."""
    network = lora.with_adapters(make('pre').init(jax.random.key(0))['params'], LORA, jax.random.key(0))
    keys = jax.vmap(lambda place: jax.random.fold_in(jax.random.key(0), place))(jnp.arange(4))
    whole, part = lora.dropout(network, 0.25, keys), lora.dropout(network, 0.25, keys[2:])
    np.testing.assert_array_equal(
        whole['layers']['segment_0']['mlp']['up']['keys'][:, 2:], part['layers']['segment_0']['mlp']['up']['keys']
    )
    all_keys = np.concatenate(
        [leaf.reshape(-1, 2) for name, leaf in trees.named_leaves(whole) if name.endswith('keys')]
    )
    assert len(np.unique(all_keys, axis=0)) == 4 * 3 * 7  # example, layer, matrix
    keys = whole['layers']['segment_0']['mlp']['up']['keys'][0]
    x = np.asarray(layers._dropped(jnp.ones((4, 500, 8)), keys, jnp.float32(0.75)))
    assert {*np.unique(x)} == {0, np.float32(1 / 0.75)} and abs((x == 0).mean() - 0.25) < 0.02


def test_the_base_in_bfloat16():
    state = program(**METHODS['lora'], **{'tune.base_dtype': 'bfloat16'}).state
    for name, leaf in trees.named_leaves(state.frozen):
        assert leaf.dtype == ('bfloat16' if name.endswith(('kernel', 'embedding')) else 'float32'), name
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} == {'float32'}


def test_decay_is_for_adapters_too():
    one, other = (trained('lora', **{'optim.weight_decay': decay}).params for decay in (0.1, 0.5))
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_flops_of_frozen_weights():
    """Four for each instead of six: they have no gradient."""
    full, probe = program(), program(**METHODS['probe'])
    matrices = probe.num_frozen(multiplied=True)
    assert full.flops_per_position() - probe.flops_per_position() == 2 * matrices
    assert matrices == full.model.num_params(full.state.params) - 2 * 11 * 8  # without embedding and head


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'tune.method': 'lora'}, 'config.tune.method=lora needs config.init_from'),
        ({'tune.rank': 4}, 'config.tune.rank has no meaning under config.tune.method=full: it is for lora'),
        ({'tune.method': 'lisa', 'tune.train': 'head/*'}, 'config.tune.train has no meaning under .*lisa'),
        ({'tune.base_dtype': 'bfloat16'}, 'has no meaning where nothing is frozen'),
        ({'tune.method': 'lisa', 'tune.layers': 5}, 'config.tune.layers=5 is more than config.model.num_layers=4'),
        (METHODS['lora'] | {'tune.rank': 9}, r'config.tune.rank=9 is larger than the matrix attention/k \[8, 8\]'),
        (METHODS['lora'] | {'tune.matrices': 'q,atention/k'}, "has a matrix 'atention/k', did you mean attention/k"),
        (METHODS['lora'] | {'tune.matrices': ''}, "no layer has a matrix ''"),
        (METHODS['lora'] | {'tune.matrices': 'q,,k'}, "no layer has a matrix ''"),
        (METHODS['lora'] | {'tune.matrices': 'head'}, "no layer has a matrix 'head'"),
        (METHODS['lora'] | {'optim.name': 'galore', 'optim.weight_decay': 0.0}, 'galore has no meaning under'),
        ({'tune.train': 'heads/*'}, "'heads/\\*' matches no weight"),
        ({'tune.train': 'head/*,'}, "'' matches no weight"),
        ({'tune.train': '*'}, 'matches every weight'),
        (METHODS['lora'] | {'tune.train': '*'}, 'matches every weight'),
        (METHODS['lora'] | {'tune.dropout': 1.0}, 'config.tune.dropout must be below 1'),
        ({'tune.method': 'dora'}, "config.tune.method='dora' is not one of full, lora, lisa, did you mean"),
    ],
)  # fmt: skip
def test_wrong_keys_are_named(changes, words):
    with pytest.raises(UsageError, match=words):
        program(**changes)

"""Loss, accumulation, clipping, bad steps, and the optimisers layer by layer."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from builders import MODEL, batch_of, equations, make_step

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.kernels import cross_entropy
from mixln_jax.models import families
from mixln_jax.program import optim, step
from mixln_jax.tasks.language import Language

WIDE = dataclasses.replace(MODEL, hidden_size=128, intermediate_size=160)  # from 128 on adafactor factors


class TestLosses:
    def full(self, x, kernel, labels, weights, V):
        """Cross-entropy with all logits at once, float64."""
        logits = (np.asarray(x, np.float64) @ np.asarray(kernel, np.float64))[..., :V]
        top = logits.max(-1, keepdims=True)
        nll = (
            np.log(np.exp(logits - top).sum(-1))
            + top[..., 0]
            - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
        )
        return nll * weights

    def arrays(self, T=7):
        rng = np.random.default_rng(0)
        x, kernel = rng.normal(size=(3, T, 5)).astype(np.float32), rng.normal(size=(5, 16)).astype(np.float32)
        weights = (rng.random((3, T)) < 0.7).astype(np.float32)
        return x, kernel, rng.integers(0, 13, (3, T)), weights

    @pytest.mark.parametrize('chunk', [1, 3, 6, 12, 21, 1000])
    def test_chunks_change_nothing(self, chunk):
        x, kernel, labels, weights = self.arrays()
        total, count, aux = cross_entropy.token_losses(x, kernel, labels, weights, 13, chunk)
        expected = self.full(x, kernel, labels, weights, 13)
        np.testing.assert_allclose(total, expected.sum(), rtol=1e-6)
        np.testing.assert_allclose(aux['token_loss'], expected, rtol=1e-5, atol=1e-6)
        assert count == weights.sum()

    @pytest.mark.parametrize('chunk', [3, 12, 1000])
    def test_gradient(self, chunk):
        x, kernel, labels, weights = self.arrays()
        grad = jax.grad(
            lambda x, k: 3 * cross_entropy.token_losses(x, k, labels, weights, 13, chunk)[0], argnums=(0, 1)
        )
        plain = jax.grad(
            lambda x, k: (
                3 * (optax.softmax_cross_entropy_with_integer_labels((x @ k)[..., :13], labels) * weights).sum()
            ),
            argnums=(0, 1),
        )
        for ours, theirs in zip(grad(x, kernel), plain(x, kernel), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(theirs).max())

    def test_no_array_of_all_logits(self):
        x, kernel, labels, weights = (
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((4, 64, 8), 'float32'),
                ((8, 512), 'float32'),
                ((4, 64), 'int32'),
                ((4, 64), 'float32'),
            )
        )
        loss = lambda x, k, l, w: cross_entropy.token_losses(x, k, l, w, 500, chunk=16)[0]  # noqa: E731
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, kernel, labels, weights)
        largest = max(np.prod(v.aval.shape) for e in jax.tree.leaves(list(equations(jaxpr.jaxpr))) for v in e.outvars)
        assert largest < 4 * 64 * 512


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize('accumulate', [2, 8])
def test_accumulation_is_the_whole_batch(accumulate):
    batch = batch_of(np.random.default_rng(0))  # rows of unequal length: means of means would differ
    state, whole = make_step()
    _, parts = make_step(accumulate=accumulate)
    one, metrics = whole(state, batch)
    other, others = parts(state, batch)
    np.testing.assert_allclose(others['loss'], metrics['loss'], rtol=1e-6)
    np.testing.assert_allclose(others['layer_grad_norm'], metrics['layer_grad_norm'], rtol=1e-5)
    assert metrics['tokens'] == others['tokens'] == batch['loss_mask'].sum()
    first = [(name, leaf) for name, leaf in trees.named_leaves(one.opt_state) if '/mu/' in name]
    assert len(first) == len(jax.tree.leaves(one.params))
    for name, leaf in first:
        same = dict(trees.named_leaves(other.opt_state))[name]
        np.testing.assert_allclose(same, leaf, rtol=0, atol=2e-6 * np.abs(leaf).max())


def test_accumulation_measures_the_same_factors():
    """Admin's omega, and with it the first step, of rows of unequal length."""
    model = families.from_config(dataclasses.replace(MODEL, norm_position='admin'), 'float32')
    optimizer, batch = optim.optimizer(configs.Optim()), batch_of(np.random.default_rng(4))
    begun, found = step.init_state(Language(model), optimizer, jax.random.key(0)), []
    for accumulate in (1, 4):
        measure = functools.partial(step.measure_factors, task=Language(model), accumulate=accumulate)
        state = jax.jit(measure)(begun, batch)
        how = {'task': Language(model), 'optimizer': optimizer, 'schedule': lambda s: 1e-2}
        update = functools.partial(step.train_step, accumulate=accumulate, **how)
        _, metrics = jax.jit(update)(state, batch)
        omega = {path: leaf for path, leaf in trees.named_leaves(state.params) if path.endswith('_residual_scale')}
        assert len(omega) == 2 and all(np.all(leaf > 0) and not np.all(leaf == 1) for leaf in omega.values())
        found.append(omega | {name: metrics[name] for name in ('loss', 'grad_norm', 'layer_grad_norm')})
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=2e-6, err_msg=name)


def test_clipping_and_reported_norms():
    batch = batch_of(np.random.default_rng(1))
    state, plain = make_step()
    _, clipped = make_step(clip_norm=0.01)
    one, metrics = plain(state, batch)
    other, others = clipped(state, batch)
    assert metrics['grad_norm'] == others['grad_norm'] > 0.01  # the norm before clipping
    first_moment = lambda s: [leaf for name, leaf in trees.named_leaves(s.opt_state) if '/mu/' in name]  # noqa: E731
    for a, b in zip(first_moment(one), first_moment(other), strict=True):
        np.testing.assert_allclose(b, a * 0.01 / metrics['grad_norm'], rtol=1e-5, atol=1e-12)
    rest = [leaf for name, leaf in trees.named_leaves(one.opt_state) if '/mu/' in name and name.startswith('rest')]
    squares = (
        sum(np.square(np.asarray(leaf) / 0.1).sum() for leaf in rest) + np.square(metrics['layer_grad_norm']).sum()
    )
    np.testing.assert_allclose(np.sqrt(squares), metrics['grad_norm'], rtol=1e-5)


def test_a_bad_step_changes_nothing_and_stays():
    rng = np.random.default_rng(2)
    state, update = make_step()
    state, metrics = update(state, batch_of(rng))
    assert metrics['bad_step'] == 0 and state.step == 1
    poisoned = batch_of(rng)
    poisoned['loss_mask'][3, 0] = np.nan
    after, metrics = update(state, poisoned)
    assert metrics['bad_step'] == 2 and not np.isfinite(metrics['loss'])
    assert_equal(after.replace(bad_step=state.bad_step), state)
    later, metrics = update(after, batch_of(rng))
    assert metrics['bad_step'] == 2
    assert_equal(later, after)


def test_a_bad_gradient_alone_is_seen(monkeypatch):
    whole = Language.losses

    def with_a_bad_gradient(self, params, *others):
        found = whole(self, params, *others)
        return found._replace(sum=found.sum + jnp.sqrt(0 * params['norm']['scale'][3]))  # adds 0; derivative 0 / 0

    monkeypatch.setattr(Language, 'losses', with_a_bad_gradient)
    state, update = make_step.__wrapped__()  # compiled anew
    after, metrics = update(state, batch_of(np.random.default_rng(3)))
    assert np.isfinite(metrics['loss']) and metrics['bad_step'] == 1
    assert_equal(after.params, state.params)


def moved(optimizer, params, rates, seed=0):
    """(parameters after an update at each rate, the random gradients, the optimiser's state after each)."""
    rng, new, states = np.random.default_rng(seed), params, [optimizer.init(params)]
    gradients = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in rates]
    update = jax.jit(optimizer.update)
    for rate, grads in zip(rates, gradients, strict=True):
        updates, state = update(grads, states[-1], new)
        new = optax.apply_updates(new, jax.tree.map(lambda u, rate=rate: -rate * u, updates))
        states.append(state)
    return new, gradients, states[1:]


class TestOptimisers:
    """Updates of a stack against updates of each layer's matrices alone, in float64."""

    changes = {
        'adam': {},
        'adamw': {'weight_decay': 0.1},
        'sgd': {'b1': 0.8, 'weight_decay': 0.1},
        'lion': {'weight_decay': 0.1},
        'adafactor': {'weight_decay': 0.1},
        'muon': {'weight_decay': 0.1},
        'galore': {'weight_decay': 0.1, 'galore_rank': 3, 'galore_gap': 2, 'galore_scale': 0.5},
    }

    @pytest.mark.parametrize('name', changes)
    def test_stack_equals_layers(self, name):
        config = configs.Optim(name=name, **self.changes[name])
        # From 128 on adafactor factors; galore meets square, wide and tall kernels.
        model = families.from_config(WIDE if name == 'adafactor' else MODEL, 'float32')
        params, rates = jax.jit(model.init)(jax.random.key(0))['params'], [0.01, 0.005, 0.02, 0.001, 0.01]
        new, gradients, states = moved(optim.optimizer(config), params, rates)

        def projectors(path, layer):
            keys = [part.key for part in path]
            at = [state[trees.STACKED][keys[1]][0].inner_states['matrix'].inner_state.projector for state in states]
            return [np.asarray(functools.reduce(dict.get, keys[2:], of)[layer], np.float64) for of in at]

        def alone(path, leaf, *grads, layer=None):
            decay = config.weight_decay * (path[-1].key != 'scale')
            if name == 'sgd':
                return reference.sgd(leaf, grads, rates, config.b1, decay)
            if name == 'lion':
                return reference.lion(leaf, grads, rates, 0.9, 0.99, decay)
            if name == 'adafactor':
                return reference.adafactor(leaf, grads, rates, decay)
            if name == 'muon' and layer is not None and path[-1].key == 'kernel':
                return reference.muon(leaf, grads, rates, 0.95, decay)
            if name == 'galore' and layer is not None and path[-1].key == 'kernel':
                return reference.galore(leaf, grads, rates, 3, 2, 0.5, 0.9, 0.999, 1e-6, decay, projectors(path, layer))
            return reference.adamw(leaf, grads, rates, config.b1, config.b2, config.eps, decay)

        def by_layer(path, leaf, *grads):
            if path[0].key != trees.STACKED:
                return alone(path, leaf, *grads)
            return np.stack([alone(path, leaf[i], *(g[i] for g in grads), layer=i) for i in range(len(leaf))])

        expected = jax.tree_util.tree_map_with_path(by_layer, params, *gradients)
        for (path, one), other in zip(trees.named_leaves(new), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6, err_msg=path)

    @pytest.mark.parametrize('name', ['adafactor', 'galore'])
    def test_what_is_kept_of_a_matrix(self, name):
        """Vectors, or the moments of the shorter side's projection: (8, 256) of 160 x 256, not (160, 8)."""
        sizes = dataclasses.replace(MODEL, hidden_size=160, intermediate_size=256, num_kv_heads=1)
        params = families.from_config(sizes, 'float32').shapes()['params']
        state = jax.eval_shape(optim.optimizer(configs.Optim(name=name, galore_rank=8)).init, params)
        shapes = {
            kernel: {
                leaf.shape[1:]
                for path, leaf in trees.named_leaves(state)
                if 'segment_1/' in path and path.endswith(f'/{kernel}/kernel') and leaf.size > leaf.shape[0]
            }
            for kernel in ('up', 'down', 'q', 'k')
        }
        assert (
            shapes
            == {
                'adafactor': {'up': {(160,), (256,)}, 'down': {(160,), (256,)}, 'q': {(160,)}, 'k': {(160, 80)}},
                'galore': {
                    'up': {(160, 8), (8, 256)},  # projector, moments
                    'down': {(160, 8), (256, 8)},
                    'q': {(160, 8), (8, 160)},
                    'k': {(80, 8), (160, 8)},
                },
            }[name]
        )

    @pytest.mark.parametrize('decay', [0.0, 0.1])
    def test_adafactors_state_fits_checkpoints_of_the_first_release(self, decay):
        """orbax compares states without arrays too."""
        rules = [optax.chain(optax.adafactor(), optax.scale(-1.0))]
        rules += [optax.add_decayed_weights(decay, mask={'norm': {'scale': True}})] if decay else []
        params = {'norm': {'scale': jnp.ones(8)}, 'layers': {}}
        state = optim.optimizer(configs.Optim(name='adafactor', weight_decay=decay)).init(params)['rest']
        first = optax.chain(*rules).init({'norm': params['norm']})
        assert jax.tree.structure(state) == jax.tree.structure(first)

    @pytest.mark.parametrize('name', ['adamw', 'sgd', 'lion', 'adafactor', 'muon', 'galore'])
    def test_learned_factors_and_gains_do_not_decay(self, name):
        """Without gradients matrices and the embedding shrink by the decay, everything else stays."""
        model = families.from_config(dataclasses.replace(MODEL, norm_position='admin,scale_res_pre*2,hybridnorm'))
        shapes = model.shapes()['params']
        params = jax.tree.map(lambda leaf: jnp.linspace(0.5, 1.5, leaf.size).reshape(leaf.shape), shapes)
        names = {path.split('/')[-1] for path, _ in trees.named_leaves(params)}
        assert {'attention_branch_scale', 'mlp_branch_scale', 'mlp_residual_scale'} <= names
        optimizer = optim.optimizer(configs.Optim(name=name, weight_decay=0.1))
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
        for (path, update), leaf in zip(trees.named_leaves(updates), jax.tree.leaves(params), strict=True):
            decay = 0.1 * path.endswith(('/kernel', '/embedding'))
            if name == 'adafactor':
                decay *= np.sqrt(np.square(leaf).mean((-2, -1), keepdims=True)) if decay else 1
            np.testing.assert_allclose(update, decay * leaf, rtol=1e-5, err_msg=path)

    @pytest.mark.parametrize('name', ['adamw', 'sgd', 'lion', 'muon', 'galore', 'adafactor'])
    def test_biases_are_vectors(self, name):
        """They neither decay nor are projected or made orthogonal; an embedding that is the head decays once."""
        kind = dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        sizes = dataclasses.replace(MODEL, num_layers=2, norm_position='pre', **kind)
        params = jax.jit(families.from_config(sizes, 'float32').init)(jax.random.key(0))['params']
        params = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + (path[-1].key == 'bias'), params)
        optimizer = optim.optimizer(configs.Optim(name=name, weight_decay=0.1, galore_rank=2))
        updates, _ = jax.jit(optimizer.update)(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        decays = {path: not np.any(update) for path, update in trees.named_leaves(updates)}
        assert {path.rsplit('/')[-1] for path, nothing in decays.items() if nothing} == {'bias', 'scale'}
        assert sum(path.endswith('bias') for path in decays) == 7 and 'head/kernel' not in decays
        for path, update in trees.named_leaves(updates):
            if path.endswith(('kernel', 'embedding')) and name != 'adafactor':  # whose decay has its own size
                leaf = dict(trees.named_leaves(params))[path]
                np.testing.assert_allclose(update, 0.1 * leaf, rtol=1e-5, err_msg=path)

    def test_galore_has_the_rank_that_is_asked(self):
        params = jax.jit(families.from_config(MODEL, 'float32').init)(jax.random.key(0))['params']
        optimizer = optim.optimizer(configs.Optim(name='galore', galore_rank=3, galore_scale=0.5))
        grads = jax.tree.map(lambda p: np.random.default_rng(1).normal(size=p.shape).astype(np.float32), params)
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        for matrix in updates['layers']['segment_1']['mlp']['up']['kernel']:
            assert np.linalg.matrix_rank(matrix, tol=1e-4) == 3
        adam = optim.optimizer(configs.Optim(eps=1e-6))
        same, _ = jax.jit(adam.update)(grads, adam.init(params), params)
        for name in ('embed', 'head', 'norm'):
            for one, other in zip(jax.tree.leaves(updates[name]), jax.tree.leaves(same[name]), strict=True):
                np.testing.assert_array_equal(one, other)

    @pytest.mark.parametrize('name', ['adam', 'sgd'])
    def test_first_moment_in_bfloat16(self, name):
        """Half its bytes, everything else as it was, and updates that differ by no more than its rounding."""
        params = jax.jit(families.from_config(MODEL, 'float32').init)(jax.random.key(0))['params']
        rng = np.random.default_rng(0)
        gradients = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(3)]
        found = []
        for mu_dtype in ('auto', 'bfloat16'):
            optimizer = optim.optimizer(configs.Optim(name=name, mu_dtype=mu_dtype))
            state = optimizer.init(params)
            for grads in gradients:
                updates, state = jax.jit(optimizer.update)(grads, state, params)
            found.append(jax.tree.leaves(updates))
            held = [(leaf.dtype, leaf.size) for leaf in jax.tree.leaves(state) if leaf.dtype != jnp.int32]
            weights = sum(leaf.size for leaf in jax.tree.leaves(params))
            first = jnp.float32 if mu_dtype == 'auto' else jnp.bfloat16
            moments = [first] if name == 'sgd' else [first, jnp.float32]
            for dtype in {*moments}:
                assert sum(size for kind, size in held if kind == dtype) == weights * moments.count(dtype)
        for one, other in zip(*found, strict=True):
            assert not np.array_equal(one, other)
            # Two roundings by up to 2^-8: of g, then g + 0.9 g, each damped by 0.9 since; Adam divides by 0.271 rms(g).
            largest = max(np.abs(leaf).max() for grads in gradients for leaf in jax.tree.leaves(grads))
            atol = 1.7 * 2**-8 if name == 'adam' else (0.81 + 0.9 * 1.9) * 2**-8 * largest
            np.testing.assert_allclose(one, other, rtol=0, atol=atol)

    def test_a_transformation_sees_one_layer(self):
        """What looks at a whole matrix must not mix layers: each layer's gradient is divided by its own norm."""

        def update(updates, state, params=None):
            del params
            return jax.tree.map(lambda u: u / jnp.linalg.norm(u), updates), state

        by_norm = optim.per_layer(*[optax.GradientTransformation(lambda params: optax.EmptyState(), update)] * 2)
        params = jax.jit(families.from_config(MODEL, 'float32').init)(jax.random.key(0))['params']
        shown, _ = by_norm.update(params, by_norm.init(params), params)
        for segment in trees.layer_runs(shown):
            for leaf in jax.tree.leaves(segment):
                norms = np.sqrt(np.square(leaf).reshape(len(leaf), -1).sum(-1))
                np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_pure_bfloat16_weights():
    model = families.from_config(MODEL)
    optimizer = optim.optimizer(configs.Optim())
    state = step.init_state(Language(model), optimizer, jax.random.key(0), 'bfloat16')
    update = functools.partial(step.train_step, task=Language(model), optimizer=optimizer, schedule=lambda s: 1e-2)
    after, _ = jax.jit(update)(state, batch_of(np.random.default_rng(0)))
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert dtypes(after) == dtypes(state)
    assert jnp.bfloat16 in dtypes(after.params) and jnp.float32 not in dtypes(after.params)

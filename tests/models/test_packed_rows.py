"""Packed rows: the numbers of each document are those of the document in a row of its own."""

import itertools

import jax
import numpy as np
import pytest
import reference
from builders import SIZES, assert_gradients, equations, make, make_step, to_jax

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.analysis import statistics
from mixln_jax.distributed import mesh as meshes
from mixln_jax.tasks.language import Language

ROWS, T = [(4, 3, 5), (6, 1, 7), (), (14,)], 14  # lengths of the documents of each row; what is left is padding


def packed_and_alone(rng, V=11):
    """The same documents packed and each in a row of its own, and where they lie in the latter.

    Padding is drawn at random like text.
    """
    segments, positions = np.zeros((2, len(ROWS), T), np.int32)
    for row, lengths in enumerate(ROWS):
        for number, (start, end) in enumerate(itertools.pairwise(np.cumsum((0, *lengths))), 1):
            segments[row, start:end], positions[row, start:end] = number, np.arange(end - start)

    lengths = np.concatenate(ROWS).astype(int)
    packed, alone = (
        {key: rng.integers(0, V, (B, T)) for key in ('inputs', 'targets')} for B in (len(ROWS), len(lengths))
    )
    packed['loss_mask'] = ((segments > 0) & (rng.random(segments.shape) < 0.8)).astype(np.float32)
    alone['loss_mask'] = np.zeros((len(lengths), T), np.float32)
    there = np.arange(T) < lengths[:, None]
    for key in alone:
        alone[key][there] = packed[key][segments > 0]
    return packed | {'positions': positions, 'segment_ids': segments}, alone, there


def forward_and_gradient(model):
    @jax.jit
    def of(params, batch):
        logits, out = model.apply({'params': params}, batch, capture=True)
        loss, grads = jax.value_and_grad(lambda p: Language(model).losses(p, batch).sum)(params)
        distances = statistics.distance_matrix(out['hidden'], batch['loss_mask']).sum(0)
        return out['hidden'], logits, loss, grads, distances

    return of


@pytest.mark.parametrize(
    'norm_position, remat',
    [
        ('mix', 'none'),
        ('sandwich*2,res_post', 'none'),
        pytest.param('mix', 'full', marks=pytest.mark.slow),
        pytest.param('post,deepnorm,lns', 'none', marks=pytest.mark.slow),
    ],
)
def test_packed_documents_are_as_alone(norm_position, remat):
    rng = np.random.default_rng(0)
    packed, alone, there = packed_and_alone(rng)
    real = packed['segment_ids'] > 0
    model = make(norm_position, remat=remat)
    params = to_jax(model, reference.init(rng, model.norm_position, **SIZES))
    of = forward_and_gradient(model)
    hidden, logits, loss, grads, distances = of(params, alone)

    def check_forward(got):
        assert np.isfinite(got[0]).all() and np.isfinite(got[1]).all()  # padding as well
        np.testing.assert_allclose(got[0][:, real], hidden[:, there], rtol=0, atol=2e-5)
        np.testing.assert_allclose(got[1][real], logits[there], rtol=0, atol=2e-5)
        np.testing.assert_allclose(got[2], loss, rtol=1e-6)
        np.testing.assert_allclose(got[4], distances, rtol=1e-6, atol=2e-6)

    def check_gradient(got):
        assert_gradients(got[3], grads, 2e-5)

    got = of(params, packed)
    joined = of(params, packed | {'segment_ids': np.ones_like(packed['segment_ids'])})
    for check in (check_forward, check_gradient):
        check(got)
        with pytest.raises(AssertionError):  # the comparison must be able to fail
            check(joined)


def test_positions_and_segments_equal_the_float64_reference():
    """Positions are any numbers here: attention sees differences alone, so a constant in each document cancels."""
    rng = np.random.default_rng(1)
    batch = packed_and_alone(rng)[0]
    batch['positions'] = rng.integers(0, 40, batch['inputs'].shape, np.int32)
    model = make('mix')
    weights = reference.init(rng, model.norm_position, **SIZES)
    of, params = forward_and_gradient(model), to_jax(model, weights)
    places = dict(heads=4, kv_heads=2, positions=batch['positions'], segments=batch['segment_ids'])
    hidden, logits = reference.forward(weights, batch['inputs'], model.norm_position, **places)
    arguments = batch['inputs'], batch['targets'], batch['loss_mask'], model.norm_position
    loss = reference.loss(weights, *arguments, **places) * batch['loss_mask'].sum()
    grads = to_jax(model, reference.gradients(weights, *arguments, **places))
    grads = jax.tree.map(lambda leaf: leaf * batch['loss_mask'].sum(), grads)

    def check(batch):
        got = of(params, batch)
        np.testing.assert_allclose(got[0], hidden, rtol=0, atol=2e-5)
        np.testing.assert_allclose(got[1], logits, rtol=0, atol=2e-5)
        np.testing.assert_allclose(got[2], loss, rtol=1e-6)
        assert_gradients(got[3], grads, 2e-5)

    check(batch)
    for left_out in ('positions', 'segment_ids'):
        with pytest.raises(AssertionError):
            check({key: leaf for key, leaf in batch.items() if key != left_out})


def test_positions_from_zero_round_as_alone():
    """Left out, they cancel up to rounding, which in bfloat16 is much."""
    rng = np.random.default_rng(5)
    packed, alone, there = packed_and_alone(rng)
    model = make('mix').clone(compute_dtype='bfloat16')
    params = to_jax(model, reference.init(rng, model.norm_position, **SIZES))
    logits = jax.jit(lambda batch: model.apply({'params': params}, batch)[0])
    real, expected = packed['segment_ids'] > 0, logits(alone)[there]
    error = np.abs(logits(packed)[real] - expected).max()
    del packed['positions']
    assert 10 * error < np.abs(logits(packed)[real] - expected).max()


def test_nothing_passes_between_documents():
    """Bit for bit, padding (segment 0) among them."""
    rng = np.random.default_rng(2)
    batch = packed_and_alone(rng)[0]
    model = make('mix')
    params = to_jax(model, reference.init(rng, model.norm_position, **SIZES))
    logits = jax.jit(lambda batch: model.apply({'params': params}, batch)[0])
    before = logits(batch)
    for number in range(4):
        inside = batch['segment_ids'] == number
        after = logits(batch | {'inputs': np.where(inside, 10 - batch['inputs'], batch['inputs'])})
        np.testing.assert_array_equal(after[~inside], before[~inside])
        assert not np.array_equal(after[inside], before[inside])


def test_accumulation_and_devices_on_packed_rows():
    packed, _, _ = packed_and_alone(np.random.default_rng(3))
    state, whole = make_step()
    _, parts = make_step(accumulate=2)
    two = meshes.make_mesh(configs.Mesh(2), meshes.devices('cpu'))
    one, metrics = whole(state, packed)
    other, others = parts(
        jax.device_put(state, meshes.replicated(two)), jax.device_put(packed, meshes.batch_sharding(two))
    )
    assert metrics['tokens'] == others['tokens'] == packed['loss_mask'].sum()
    np.testing.assert_allclose(others['loss'], metrics['loss'], rtol=1e-6)
    np.testing.assert_allclose(others['layer_grad_norm'], metrics['layer_grad_norm'], rtol=1e-5)
    first, moments = ({name: leaf for name, leaf in trees.named_leaves(state.opt_state) if '/mu/' in name}
                      for state in (one, other))  # fmt: skip
    assert len(first) == len(jax.tree.leaves(one.params))
    for name, leaf in first.items():
        np.testing.assert_allclose(moments[name], leaf, rtol=0, atol=2e-6 * np.abs(leaf).max(), err_msg=name)
    # The step looks at the segments.
    _, joined = whole(state, packed | {'segment_ids': np.ones_like(packed['segment_ids'])})
    assert abs(joined['loss'] / metrics['loss'] - 1) > 1e-3


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_the_mask_is_made_once_and_only_for_packed_rows(remat):
    packed, alone, _ = packed_and_alone(np.random.default_rng(4))
    model = make('mix', 6, remat=remat, scan_unroll='1')  # two loops over layers
    params = jax.eval_shape(model.init, jax.random.key(0))['params']

    def masks(batch):
        gradient = jax.grad(lambda params, batch: Language(model).losses(params, batch).sum)
        found = equations(jax.make_jaxpr(gradient)(params, batch).jaxpr)
        shape = (len(batch['inputs']), 1, T, T)
        return [e.primitive.name for e in found if any(v.aval.shape == shape for v in e.outvars)]

    assert masks(packed) == ['eq']
    assert masks(alone) == []

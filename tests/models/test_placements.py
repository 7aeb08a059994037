"""What the placements' factors start at, what is captured of every sub-layer, the authors' schemes, meshes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import reference
from builders import SIZES, branches, make, text, to_jax

from mixln_jax import config as configs
from mixln_jax.distributed import mesh as meshes
from mixln_jax.models import placements, transformer
from mixln_jax.program import step
from mixln_jax.program.program import Program
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks.language import Language

CONFIG = configs.Config(
    batch_size=16,
    seq_length=12,
    num_steps=8,
    accumulate=2,
    compute_dtype='float32',
    device='cpu',
    model=configs.Model(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=8, scan_unroll='1'
    ),
)


@pytest.mark.parametrize('names', [('pre',) * 3, ('scale_res_pre',) * 3, ('post', 'admin', 'hybridnorm')])
def test_what_every_sublayer_adds(monkeypatch, names):
    rng = np.random.default_rng(4)
    weights, batch = reference.init(rng, names, **SIZES), text(rng)
    model = make(','.join(names))
    _, out = model.apply({'params': to_jax(model, weights)}, batch['inputs'], capture=True)
    hidden, found = branches(monkeypatch, weights, batch['inputs'], names)
    got = out['branches']
    assert got['norm'].shape == (3, 2, *batch['inputs'].shape)
    for at, added in enumerate(found):
        np.testing.assert_allclose(got['norm'][at // 2, at % 2], np.linalg.norm(added, axis=-1), rtol=2e-5)
        np.testing.assert_allclose(got['mean'][at // 2, at % 2], added.mean(-1), rtol=0, atol=2e-5)
    for l in range(3):
        np.testing.assert_allclose(got['stream_norm'][l, 0], np.linalg.norm(hidden[l], axis=-1), rtol=2e-5)
    real = batch['loss_mask'].astype(bool)
    variances = transformer.branch_variances(got, batch['loss_mask'], 8)
    np.testing.assert_allclose(variances, [added[real].var() for added in found], rtol=1e-4)


@pytest.mark.parametrize('accumulate', [1, 4])
def test_omega_is_what_admin_measures(monkeypatch, accumulate):
    """sqrt of the sum of the variances before, 1 at first, in every admin layer; nothing else changes."""
    rng, names = np.random.default_rng(5), ('pre', 'admin', 'admin')
    weights, batch = reference.init(rng, names, **SIZES), text(rng, B=4)
    for layer in weights['layers'][1:]:
        layer.update(attention_residual=np.ones(8), mlp_residual=np.ones(8))
    model = make(','.join(names))
    state = step.State(np.int32(0), to_jax(model, weights), {}, np.int32(0))
    after = jax.jit(functools.partial(step.measure_factors, task=Language(model), accumulate=accumulate))(state, batch)
    _, found = branches(monkeypatch, weights, batch['inputs'], names)
    sums = np.cumsum([added[batch['loss_mask'].astype(bool)].var() for added in found])
    omega = np.sqrt([1, *sums[:-1]])
    for layer in (1, 2):
        weights['layers'][layer]['attention_residual'] = np.full(8, omega[2 * layer])
        weights['layers'][layer]['mlp_residual'] = np.full(8, omega[2 * layer + 1])
    expected = to_jax(model, weights)
    for one, other in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert model.measured() and not make('admin_constant').measured()


def test_closed_form_of_admin():
    """PyPI's admin-torch 0.1.0: calculate_init(24) by hand: sqrt(25 / 3.218876 - 1)."""
    rule = placements.PLACEMENTS['admin_constant'].attention.residual_scale
    assert rule(3, 12) == pytest.approx(2.60129, abs=1e-5)


def test_factors_start_where_the_papers_say():
    params = make('admin,scale_res_pre,pre').init(jax.random.key(0))['params']['layers']
    assert np.all(params['segment_0']['mlp_residual_scale'] == 1)
    assert params['segment_0']['mlp_residual_scale'].shape == (1, 8)
    assert params['segment_1']['attention_branch_scale'] == pytest.approx(0.001)
    assert params['segment_1']['attention_branch_scale'].shape == (1,)


@pytest.mark.parametrize(
    'scheme, layers, names',
    [
        ('pre_post', 9, 'pre*7,post*2'),
        ('pre_post', 4, 'pre*4'),
        ('pre_sandwich', 12, 'pre*7,sandwich*5'),
        ('pre_post_pre_post', 6, 'pre*3,post,pre*2'),
        ('post_pre_post_pre', 8, 'post*3,pre,post*3,pre'),
        ('hybridnorm_star', 5, 'hybridnorm_first,hybridnorm*4'),
    ],
)
def test_schemes_are_lists(scheme, layers, names):
    assert placements.resolve(scheme, layers) == placements.resolve(names, layers)


def test_groups_that_do_not_divide_are_named():
    with pytest.raises(UsageError, match='hidden_size=8 is not divisible by config.model.norm_groups=3'):
        make('group_pre', norm_groups=3)
    make('pre', norm_groups=3)


def test_scaled_embeddings():
    rng = np.random.default_rng(6)
    weights, batch = reference.init(rng, ('pre',) * 3, **SIZES), text(rng)
    model = make('pre', scale_embed=True)
    logits, out = model.apply({'params': to_jax(model, weights)}, batch['inputs'], capture=True)
    weights['embed'] = weights['embed'] * np.sqrt(8)
    hidden, expected = reference.forward(weights, batch['inputs'], ('pre',) * 3, heads=4, kv_heads=2)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(out['hidden'], hidden, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    'placement',
    ['admin', *(pytest.param(name, marks=pytest.mark.slow) for name in ('hybridnorm_star', 'peri,scale_res_pre'))],
)
def test_a_mesh_changes_no_number(placement):
    rng, found = np.random.default_rng(0), []
    tokens = (rng.integers(0, 100, (16, 1)) + 2 * np.arange(13)) % 101
    weights = (np.arange(12) < rng.integers(1, 13, (16, 1))).astype(np.float32)
    batch = {'inputs': tokens[:, :-1].astype(np.int32), 'targets': tokens[:, 1:].astype(np.int32), 'loss_mask': weights}
    for shape in ((1, 1, 1), (2, 2, 2)):
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, norm_position=placement))
        program = Program(config, meshes.make_mesh(configs.Mesh(*shape), jax.devices('cpu')))
        placed = jax.device_put(batch, meshes.batch_sharding(program.mesh))
        state = program.init(jax.random.key(0))
        if program.model.measured():
            state = program.measure_factors(state, placed)
        losses = []
        for _ in range(4):
            state, metrics = program.train_step(state, placed)
            losses.append(float(metrics['loss']))
        found.append(losses)
    assert found[0][-1] < found[0][0]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize(
    'name', [*(pytest.param(name, marks=pytest.mark.slow) for name in ('lion', 'adafactor', 'galore')), 'muon']
)
def test_optimisers_on_a_mesh(name):
    """One loss curve on one device and on eight, whatever the optimiser keeps of a matrix."""
    rng, found = np.random.default_rng(0), []
    tokens = (rng.integers(0, 100, (16, 1)) + 2 * np.arange(13)) % 101
    batch = {'inputs': tokens[:, :-1].astype(np.int32), 'targets': tokens[:, 1:].astype(np.int32)}
    batch['loss_mask'] = np.ones((16, 12), np.float32)
    for shape in ((1, 1, 1), (2, 2, 2)):
        optimiser = configs.Optim(name=name, learning_rate=1e-3, galore_rank=4, warmup_ratio=0.0)
        program = Program(
            dataclasses.replace(CONFIG, optim=optimiser), meshes.make_mesh(configs.Mesh(*shape), jax.devices('cpu'))
        )
        placed = jax.device_put(batch, meshes.batch_sharding(program.mesh))
        state, losses = program.init(jax.random.key(0)), []
        for _ in range(4):
            state, values = program.train_step(state, placed)
            losses.append(float(values['loss']))
        found.append(losses)
    assert found[0][-1] < found[0][0]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)

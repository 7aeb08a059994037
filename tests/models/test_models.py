"""Every placement against an independent float64 reference and the authors' own numbers."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import safetensors.numpy
from builders import SIZES, assert_gradients, equations, make, text, to_jax

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models import families, placements, transformer
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.plan import memory
from mixln_jax.program import optim, step
from mixln_jax.program.program import Program
from mixln_jax.system.errors import CheckpointError, UsageError
from mixln_jax.tasks.language import Language

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
LISTS = {name: (name,) * 3 for name in placements.PLACEMENTS} | {
    'mix': ('post', 'pre', 'pre'),
    'post,deepnorm,lns': ('post', 'deepnorm', 'lns'),
    'sandwich*2,res_post': ('sandwich', 'sandwich', 'res_post'),
    'hybridnorm_star': ('hybridnorm_first', 'hybridnorm', 'hybridnorm'),
    'admin,scale_res_pre,peri': ('admin', 'scale_res_pre', 'peri'),
    'peri,group_pre*2': ('peri', 'group_pre', 'group_pre'),
}
# Of Hugging Face's LLaMA: keys of config.model, the same for reference.init and reference.forward.
KINDS = {
    'tied': ({'tie_word_embeddings': True}, {'tied': True}, {}),
    'attention_bias': ({'attention_bias': True}, {'biases': 'q k v o'}, {}),
    'mlp_bias': ({'mlp_bias': True}, {'biases': 'gate up down'}, {}),
    'head_dim': ({'head_dim': 6}, {'hd': 6}, {}),
    # Of six features one pair stays, one is slowed by a half, one wholly.
    'llama3': (
        {'head_dim': 6, 'rope_theta': 50.0, 'rope_type': 'llama3', 'rope_factor': 3.0, 'rope_low_freq_factor': 1.0,
         'rope_high_freq_factor': 4.0, 'rope_original_length': 50},
        {'hd': 6},
        {'theta': 50.0, 'scaling': (3.0, 1.0, 4.0, 50)},
    ),
}  # fmt: skip
KINDS['all'] = tuple({name: value for kind in KINDS.values() for name, value in kind[at].items()} for at in range(3))
KINDS['all'][1]['biases'] = 'q k v o gate up down'


def mean_loss(model, params, batch):
    losses = Language(model).losses(params, batch)
    return losses.sum / losses.weight


@pytest.mark.parametrize(
    'norm_position, kind',
    [*((name, 'plain') for name in LISTS), *(('mix', kind) for kind in KINDS), ('hybridnorm_star', 'all')],
)
def test_forward_and_gradient_equal_the_float64_reference(norm_position, kind):
    rng = np.random.default_rng(7)  # no draw here has a vector near zero, whose norm would enlarge the rounding
    changes, sizes, scaling = KINDS.get(kind, ({}, {}, {}))
    weights = reference.init(rng, LISTS[norm_position], **SIZES, **sizes)
    model, batch = make(norm_position, **changes), text(rng)
    assert model.norm_position == LISTS[norm_position]
    arguments = batch['inputs'], batch['targets'], batch['loss_mask'], LISTS[norm_position]
    heads = dict(heads=4, kv_heads=2) | scaling

    @jax.jit
    def ours(params):
        logits, out = model.apply({'params': params}, batch['inputs'], capture=True)
        loss, grads = jax.value_and_grad(lambda p: mean_loss(model, p, batch))(params)
        return out['hidden'], logits, loss, grads

    def check(weights):
        hidden, logits, loss, grads = ours(to_jax(model, weights))
        np.testing.assert_allclose(hidden, expected[0], rtol=0, atol=2e-5)
        np.testing.assert_allclose(logits, expected[1], rtol=0, atol=2e-5)
        np.testing.assert_allclose(loss, reference.loss(*expected_weights, *arguments, **heads), rtol=0, atol=2e-6)
        assert_gradients(grads, to_jax(model, reference.gradients(*expected_weights, *arguments, **heads)), 1e-5)

    expected_weights = [weights]
    expected = reference.forward(weights, batch['inputs'], LISTS[norm_position], **heads)
    check(weights)
    # The comparison must be able to fail: one weight of the last layer, moved a little.
    moved = dict(weights, layers=[dict(layer) for layer in weights['layers']])
    moved['layers'][-1]['up'] = weights['layers'][-1]['up'] + 1e-3 * (np.arange(12) == 5)
    with pytest.raises(AssertionError):
        check(moved)


@pytest.mark.parametrize('norm_position', LISTS)
def test_removed_layers_are_the_identity_and_keep_their_constants(norm_position):
    rng = np.random.default_rng(2)
    weights = reference.init(rng, LISTS[norm_position], **SIZES)
    model, batch = make(norm_position), text(rng)
    keep = np.array([True, False, True])
    expected, logits = reference.forward(weights, batch['inputs'], LISTS[norm_position], heads=4, kv_heads=2, keep=keep)
    masked, out = jax.jit(lambda p, k: model.apply({'params': p}, batch['inputs'], keep=k, capture=True))(
        params := to_jax(model, weights), keep
    )
    np.testing.assert_allclose(masked, logits, rtol=0, atol=2e-5)
    np.testing.assert_allclose(out['hidden'], expected, rtol=0, atol=2e-5)
    # The same network, cut: constants follow layer_index and depth, not the position in the shorter stack.
    names = (model.norm_position[0], model.norm_position[2])
    cut = model.clone(norm_position=names, layer_index=(1, 3))
    layers = transformer.split_layers(params['layers'], model.norm_position)
    cut_params = dict(params, layers=transformer.stack_layers([layers[0], layers[2]], names))
    np.testing.assert_allclose(cut.apply({'params': cut_params}, batch['inputs'])[0], masked, rtol=0, atol=1e-6)


@pytest.mark.parametrize('changes', [{'remat': 'dots'}, {'remat': 'full'}, {'scan_unroll': 'auto'}])
def test_remat_and_unrolling_change_no_number(changes):
    rng = np.random.default_rng(3)
    plain, changed, batch = make('mix', 6), make('mix', 6, **changes), text(rng)
    assert changed.config != plain.config
    params = to_jax(plain, reference.init(rng, plain.norm_position, **SIZES))
    loss, grads = jax.jit(jax.value_and_grad(lambda p: mean_loss(plain, p, batch)))(params)
    other, others = jax.jit(jax.value_and_grad(lambda p: mean_loss(changed, p, batch)))(params)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    assert_gradients(others, grads, 2e-6)


@pytest.mark.parametrize('dtype, expected', [('float32', jax.lax.Precision.HIGHEST), ('bfloat16', None)])
def test_matrix_products_in_float32_are_exact_in_the_backward_pass_too(dtype, expected):
    """GPUs and TPUs would round their factors."""
    model = families.from_config(make('mix').config, dtype)
    params = jax.eval_shape(model.init, jax.random.key(0))['params']
    gradient = jax.make_jaxpr(jax.grad(lambda params: mean_loss(model, params, text(np.random.default_rng(0)))))(params)
    products = [e.params['precision'] for e in equations(gradient.jaxpr) if e.primitive.name == 'dot_general']
    assert len(products) > 30
    assert set(products) == {expected and (expected, expected)}


def test_what_the_backward_pass_keeps():
    """Of every layer the stream, twice, what norms give, queries, keys, values, what attention gives (twice, which XLA
    merges), gate, up, their product; nothing of size T x T."""
    B, T, L, D, F, H = 2, 96, 3, 32, 88, 4
    model = make('pre', L, hidden_size=D, intermediate_size=F, num_heads=H, num_kv_heads=H)
    ids = np.zeros((B, T), np.int32)
    params = model.init(jax.random.key(0))['params']
    _, pull = jax.vjp(lambda params: model.apply({'params': params}, ids, method='backbone')[0], params)
    kept = [leaf.size for leaf in jax.tree.leaves(pull) if leaf.shape[:2] == (L, B)]
    assert sum(kept) == L * B * T * (9 * D + 3 * F + H)  # H: the logarithms of the sums


def test_remat_of_dots_keeps_no_turned_heads(monkeypatch):
    """Which on TPUs come from a product."""

    def kept():
        model = make('pre', 3, remat='dots')
        params = model.init(jax.random.key(0))['params']
        ids = np.zeros((2, 16), np.int32)
        _, pull = jax.vjp(lambda params: model.apply({'params': params}, ids, method='backbone')[0], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pull) if leaf.shape[:2] == (3, 2))

    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda x, tpu, default: default(x))
    elsewhere = kept()
    monkeypatch.setattr(jax.lax, 'platform_dependent', lambda x, tpu, default: tpu(x))
    assert elsewhere and kept() == elsewhere


@pytest.mark.parametrize('remat, of', [('dots', 0.8), ('full', 0.5)])
def test_remat_saves_memory(remat, of):
    """In the compiled program, at a depth where `scan_unroll=auto` would unroll without remat."""

    def temporary_bytes(remat):
        model = make('pre', 6, remat=remat, intermediate_size=256)
        params = jax.eval_shape(model.init, jax.random.key(0))['params']
        batch = text(np.random.default_rng(0), B=8, T=64)
        compiled = jax.jit(jax.grad(lambda p: mean_loss(model, p, batch))).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(remat) < of * temporary_bytes('none')


@pytest.mark.parametrize('name', ['pre', 'post', 'mix', 'sandwich', 'lns', 'deepnorm_official'])
def test_golden(name):
    """What the authors' PyTorch code computes from the same weights (tests/golden/README.md)."""
    model, params = hf_llama.load(GOLDEN / name, norm_position=name)
    inverse_gain = name == 'deepnorm_official'  # amplifies rounding
    atol, of_largest = (5e-4, 5e-4) if inverse_gain else (2e-5, 1e-4)
    expected = np.load(GOLDEN / name / 'expected.npz')
    real = expected['attention_mask'].astype(bool)
    ids = expected['input_ids']
    batch = {'inputs': ids, 'targets': np.roll(ids, -1, axis=1), 'loss_mask': np.pad(real[:, 1:], ((0, 0), (0, 1)))}

    @jax.jit
    def ours(params):
        logits, out = model.apply({'params': params}, ids, capture=True)
        x, _ = model.apply({'params': params}, ids, method='backbone')
        return logits, [*out['hidden'][:-1], x], jax.value_and_grad(lambda p: mean_loss(model, p, batch))(params)

    def check_forward(logits, hidden, loss):  # their last hidden state is after the final norm
        np.testing.assert_allclose(logits[real], expected['logits'][real], rtol=0, atol=atol)
        np.testing.assert_allclose(np.array(hidden)[:, real], expected['hidden_states'][:, real], rtol=0, atol=atol)
        np.testing.assert_allclose(loss, expected['loss'], rtol=0, atol=atol)

    def check_gradients(grads):
        grads = dict(grads, layers=transformer.split_layers(jax.device_get(grads['layers']), model.norm_position))
        theirs = {key: value for key, value in expected.items() if key.startswith('grad/')}
        for name, leaf in trees.named_leaves(grads):
            tensor = theirs.pop(f'grad/{hf_llama.tensor_name(name, model.norm_position)}')
            leaf = np.asarray(leaf).T if name.endswith('kernel') else leaf
            np.testing.assert_allclose(leaf, tensor, rtol=0, atol=of_largest * np.abs(tensor).max(), err_msg=name)
        assert not theirs

    logits, hidden, (loss, grads) = ours(params)
    check_forward(logits, hidden, loss)
    check_gradients(grads)
    # Both must be able to fail: one gain moved by a thousandth (a hundredth).
    params['norm']['scale'] = params['norm']['scale'].at[3].multiply(1.01 if inverse_gain else 1.001)
    logits, hidden, (loss, grads) = ours(params)
    with pytest.raises(AssertionError):
        check_forward(logits, hidden, loss)
    with pytest.raises(AssertionError):
        check_gradients(grads)


@pytest.mark.parametrize('name, clip_norm', [('pre', 0.0), ('mix', 1.0)])
def test_thirty_updates_follow_the_authors(name, clip_norm):
    stored = np.load(GOLDEN / name / 'trajectory.npz')
    model, params = hf_llama.load(GOLDEN / name, norm_position=name)
    optimizer = optim.optimizer(configs.Optim(name='adam'))
    rates = jnp.asarray(stored['learning_rate'])

    @jax.jit
    def update(state, batch, rates):
        rate = lambda i: rates[i]  # noqa: E731
        how = {'task': Language(model), 'optimizer': optimizer, 'schedule': rate, 'clip_norm': clip_norm}
        return step.train_step(state, batch, **how)

    def losses(rates):
        state = step.State(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
        found = []
        for ids in stored['batches']:
            weights = np.ones(ids.shape, np.float32)
            weights[:, -1] = 0
            batch = {'inputs': ids, 'targets': np.roll(ids, -1, axis=1), 'loss_mask': weights}
            state, metrics = update(state, batch, rates)
            found.append((metrics['loss'], metrics['grad_norm']))
        return np.array(found).T

    loss, grad_norm = losses(rates)
    np.testing.assert_allclose(loss, stored['loss'], rtol=1e-5)
    np.testing.assert_allclose(grad_norm, stored['grad_norm_before_clip'], rtol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(losses(rates * 1.001)[0], stored['loss'], rtol=1e-5)


class TestFolders:
    """What hf.load refuses."""

    def copy(self, tmp_path, name='mix'):
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    @pytest.mark.parametrize('claimed', ['pre', 'post', 'sandwich', 'lns'])
    def test_a_folder_is_not_opened_as_another_placement(self, claimed):
        with pytest.raises(CheckpointError, match=r'tensor model\.layers\.'):
            hf_llama.load(GOLDEN / 'mix', norm_position=claimed)

    def test_missing_folder(self, tmp_path):
        with pytest.raises(UsageError, match='config.json does not exist'):
            hf_llama.load(tmp_path)

    def test_damaged_content(self, tmp_path):
        folder = self.copy(tmp_path)
        (folder / 'model.safetensors').write_bytes(b'nonsense')
        with pytest.raises(CheckpointError, match='safetensors'):
            hf_llama.load(folder, 'mix')
        (folder / 'config.json').write_text('{')
        with pytest.raises(CheckpointError, match='JSON'):
            hf_llama.load(folder, 'mix')

    @pytest.mark.parametrize(
        'key, value',
        [
            ('hidden_act', 'gelu'),
            ('model_type', 'gpt2'),
            ('rope_scaling', {'rope_type': 'llama3', 'factor': 8.0}),
            ('rope_parameters', {'rope_type': 'yarn'}),
            ('tie_word_embeddings', True),
            ('hidden_size', '32'),
            ('rope_theta', 'abc'),
        ],
    )
    def test_what_is_not_modelled_is_named(self, tmp_path, key, value):
        folder = self.copy(tmp_path)
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=rf'config\.json: .*{key}'):
            hf_llama.load(folder, 'mix')

    def test_rope_parameters_of_newer_files(self, tmp_path):
        folder = self.copy(tmp_path)
        config = json.loads((folder / 'config.json').read_text())
        config['rope_parameters'] = {'rope_type': 'default', 'rope_theta': 5e5}
        (folder / 'config.json').write_text(json.dumps(config))
        assert hf_llama.load(folder, ['post'] * 2 + ['pre'] * 6)[0].config.rope_theta == 5e5

    def test_weights_that_are_not_numbers(self, tmp_path):
        folder = self.copy(tmp_path)
        tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
        tensors['model.norm.weight'][3] = np.nan
        safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
        with pytest.raises(CheckpointError, match='model.norm.weight is not finite'):
            hf_llama.load(folder, 'mix')

    def test_wrong_shape_names_the_tensor(self, tmp_path):
        folder = self.copy(tmp_path)
        tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
        tensors['model.layers.3.mlp.up_proj.weight'] = tensors['model.layers.3.mlp.up_proj.weight'][:-1]
        safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
        with pytest.raises(CheckpointError, match=r'layers\.3\.mlp\.up_proj'):
            hf_llama.load(folder, 'mix')


class TestPlacements:
    """Names, schemes and constants."""

    @pytest.mark.parametrize(
        'layers, ratio, post',
        [(12, 0.25, 3), (24, 0.33, 8), (24, 0.167, 4), (24, 0.417, 10), (32, 0.0625, 2), (6, 0.25, 2)],
    )
    def test_mix(self, layers, ratio, post):
        assert placements.resolve('mix', layers, ratio) == ('post',) * post + ('pre',) * (layers - post)

    def test_lists(self):
        assert placements.resolve(' post * 2, pre,lns', 4) == ('post', 'post', 'pre', 'lns')
        assert placements.layer_runs(('post', 'post', 'pre', 'lns', 'lns')) == [
            ('post', 0, 2),
            ('pre', 2, 3),
            ('lns', 3, 5),
        ]

    @pytest.mark.parametrize(
        'value, words',
        [
            ('pree', "'pree' is not one of .*did you mean pre"),
            ('post*3,pre', 'lists 4 layers, config.model.num_layers is 3'),
            ('post*0,pre*3', r"'post\*0' is not a name"),
            ('', "'' is not a name"),
            ('pre,,pre', "'' is not a name"),
            ('mix*3', "'mix' is a scheme"),
            ('post*999999999,pre', 'is not a name'),
        ],
    )
    def test_bad_values_are_named(self, value, words):
        with pytest.raises(UsageError, match=words):
            placements.resolve(value, 3)

    @pytest.mark.parametrize(
        'sizes, source',
        [
            ({'num_heads': 96, 'hidden_size': 96}, r'1 \(config.model.hidden_size / num_heads\)'),
            ({'head_dim': 7}, r'7 \(config.model.head_dim\)'),
        ],
    )
    def test_rotary_positions_turn_pairs(self, sizes, source):
        with pytest.raises(UsageError, match=f'^the head size {source} must be even for rotary positions$'):
            families.from_config(configs.Model(**sizes))

    def test_constants_follow_depth_and_index(self):
        lns, deepnorm = placements.PLACEMENTS['lns'].mlp, placements.PLACEMENTS['deepnorm'].attention
        assert lns.constants([1, 4], 6) == {'in_scale': [1.0, 0.5]}
        assert lns.constants([6], 6) != lns.constants([32], 32)
        assert deepnorm.constants([1], 6)['residual_scale'] == [pytest.approx(12**0.25)]
        assert deepnorm.constants([1], 32)['residual_scale'] == [pytest.approx(64**0.25)]

    def test_warnings(self):
        assert 'warm-up' in next(placements.warnings(('post', 'pre'), 'auto', 0.05))
        assert 'scaled' in next(placements.warnings(('lns',), 'scaled', 0.1))
        assert not list(placements.warnings(('post', 'pre'), 'auto', 0.1))
        assert not list(placements.warnings(('pre',), 'scaled', 0.0))


class TestInitialisation:
    sizes = dict(vocab_size=200, hidden_size=64, intermediate_size=96, num_kv_heads=0)

    def draw(self, norm_position, num_layers=6, **changes):
        model = make(norm_position, num_layers, **(self.sizes | changes))
        params = jax.jit(model.init)(jax.random.key(0))['params']
        return params, transformer.split_layers(params['layers'], model.norm_position)

    def test_equal_weights_under_every_placement(self):
        _, pre = self.draw('pre')
        _, mix = self.draw('mix', init='normal')
        for one, other in zip(pre, mix, strict=True):
            jax.tree.map(
                np.testing.assert_array_equal, (one['attention'], one['mlp']), (other['attention'], other['mlp'])
            )
        assert not np.array_equal(pre[0]['mlp']['up']['kernel'], pre[1]['mlp']['up']['kernel'])

    def test_standard_deviations(self):
        params, layers = self.draw('pre', init_std=0.05, embed_std=0.3)
        assert params['embed']['embedding'][:200].std() == pytest.approx(0.3, rel=0.05)
        assert layers[2]['mlp']['down']['kernel'].std() == pytest.approx(0.05, rel=0.05)
        assert params['head']['kernel'][:, :200].std() == pytest.approx(0.05, rel=0.05)
        assert not params['embed']['embedding'][200:].any()
        assert not params['head']['kernel'][:, 200:].any()

    def test_biases_are_zero(self):
        _, layers = self.draw('pre', attention_bias=True, mlp_bias=True)
        for matrix in (*layers[1]['attention'].values(), *layers[1]['mlp'].values()):
            assert matrix['bias'].shape == matrix['kernel'].shape[1:] and not matrix['bias'].any()

    def test_scaled(self):
        _, layers = self.draw('pre', init='scaled')
        for sublayer, output, other in (('attention', 'o', 'q'), ('mlp', 'down', 'up')):
            assert layers[0][sublayer][output]['kernel'].std() == pytest.approx(0.02 / 12**0.5, rel=0.06)
            assert layers[0][sublayer][other]['kernel'].std() == pytest.approx(0.02, rel=0.06)

    @pytest.mark.parametrize('depth', [6, 32])
    def test_deepnorm_is_its_own_by_default(self, depth):
        _, layers = self.draw(f'deepnorm*{depth}', depth)
        gain = (8 * depth) ** -0.25
        assert layers[0]['attention']['q']['kernel'].std() == pytest.approx((1 / 64) ** 0.5, rel=0.06)
        assert layers[0]['attention']['v']['kernel'].std() == pytest.approx(gain * (1 / 64) ** 0.5, rel=0.06)
        assert layers[0]['mlp']['down']['kernel'].std() == pytest.approx(gain * (2 / 160) ** 0.5, rel=0.06)
        _, mixed = self.draw('deepnorm,pre')[:2] if depth == 2 else self.draw('deepnorm,pre*5')
        assert mixed[1]['mlp']['down']['kernel'].std() == pytest.approx(0.02, rel=0.06)


def test_vocabulary_padding_is_not_counted_and_learns_nothing():
    model = make('pre')
    params = jax.jit(model.init)(jax.random.key(0))['params']
    assert params['embed']['embedding'].shape == (128, 8)
    expected = reference.init(np.random.default_rng(0), ('pre',) * 3, **SIZES)
    assert model.num_params(params) == sum(np.size(leaf) for leaf in jax.tree.leaves(expected))
    grads = jax.jit(jax.grad(lambda p: mean_loss(model, p, text(np.random.default_rng(0)))))(params)
    assert not np.any(grads['head']['kernel'][:, 11:]) and not np.any(grads['embed']['embedding'][11:])
    assert model.apply({'params': params}, np.zeros((1, 3), int))[0].shape == (1, 3, 11)


def test_parameters_and_flops_by_hand():
    """V=11, D=8, F=12, L=3; 4 heads of 6, 2 of keys; a tied embedding works as the head, so it counts."""
    sizes = configs.Model(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True, norm_position='pre',
    )  # fmt: skip
    of_layer = 8 * 24 + 24 + 2 * (8 * 12 + 12) + 24 * 8 + 8 + 2 * (8 * 12 + 12) + 12 * 8 + 8 + 2 * 8
    config = configs.Config(model=sizes, batch_size=4, seq_length=10, device='cpu')
    for tied, matrices in ((True, 1), (False, 2)):
        model = dataclasses.replace(sizes, tie_word_embeddings=tied)
        built = Program(dataclasses.replace(config, model=model), memory.abstract_mesh(configs.Mesh(1, 1, 1), 1))
        assert built.model.num_params(built.state.params) == matrices * 11 * 8 + 3 * of_layer + 8
        assert built.flops_per_position() == 6 * (11 * 8 + 3 * of_layer + 8) + 6 * 3 * 10 * 24
        assert memory.memory(built)['weights'] == 4 * (matrices * 128 * 8 + 3 * of_layer + 8)


def test_bfloat16_stays_near_float32():
    rng = np.random.default_rng(5)
    model, batch = make('mix'), text(rng)
    params = to_jax(model, reference.init(rng, model.norm_position, **SIZES))
    loss = jax.jit(lambda p: mean_loss(model, p, batch))(params)
    half = model.clone(compute_dtype='bfloat16')
    x, _ = jax.eval_shape(lambda p: half.apply({'params': p}, batch['inputs'], method='backbone'), params)
    assert x.dtype == jnp.bfloat16
    near = jax.jit(lambda p: mean_loss(half, p, batch))(params)
    np.testing.assert_allclose(near, loss, rtol=2e-2)
    assert near != loss

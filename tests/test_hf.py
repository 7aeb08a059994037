"""Hugging Face folders out and in: every placement bit for bit, shards, layers that were removed, what is refused."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import reference
import safetensors.numpy

from mixln_jax import config as configs
from mixln_jax.models import families, placements
from mixln_jax.models.hf import bert as hf_bert
from mixln_jax.models.hf import config as hf_config
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.system.errors import CheckpointError, UsageError

GOLDEN = pathlib.Path(__file__).parent / 'golden'
PLACEMENTS = [*placements.PLACEMENTS, 'mix', 'post,deepnorm,lns', 'sandwich*2,res_post']
SHARD = 3e-6  # 10^9 bytes: the network below becomes three shards
LLAMA3 = dict(
    rope_type='llama3', rope_factor=3.0, rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, rope_original_length=50,
)  # fmt: skip
KINDS = {  # what a LLaMA may be besides: keys of config.model
    'theta': {'rope_theta': 50.0},
    'tied': {'tie_word_embeddings': True},
    'attention_bias': {'attention_bias': True},
    'mlp_bias': {'mlp_bias': True},
    'head_dim': {'head_dim': 6},
    'llama3': {'head_dim': 6, 'rope_theta': 50.0, **LLAMA3},  # one pair stays, one is slowed by a half, one wholly
}
KINDS['all'] = {name: value for kind in KINDS.values() for name, value in kind.items()}


@functools.cache
def network(norm_position, **changes):
    """(model, params): three layers, 11 words, no two numbers alike."""
    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_heads=4, num_kv_heads=2, num_layers=3)
    model = families.from_config(configs.Model(norm_position=norm_position, **(sizes | changes)), 'float32')
    rng = np.random.default_rng(0)
    draw = lambda path, leaf: rng.normal('norm' in str(path), 0.4, leaf.shape).astype(np.float32)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(draw, model.shapes()['params'])
    vocab = model.config.vocab_size
    params['embed']['embedding'][vocab:] = 0
    if 'head' in params:
        params['head']['kernel'][:, vocab:] = 0
    return model, params


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    return model.apply({'params': params}, np.arange(10).reshape(2, 5))[0]


def edit(folder, name='config.json', **changes):
    """Changes keys of a JSON file; None takes one away."""
    found = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def change(folder, name, how, file='model.safetensors'):
    """Changes a tensor of a file; `how` gives the new one, None: none."""
    tensors = safetensors.numpy.load_file(folder / file)
    new = how(tensors.pop(name, None))
    safetensors.numpy.save_file(tensors if new is None else tensors | {name: np.ascontiguousarray(new)}, folder / file)


@pytest.fixture
def mixed(tmp_path):
    """An exported Mix-LN network."""
    hf_llama.save(tmp_path / 'mixed', *network('mix'))
    return tmp_path / 'mixed'


@pytest.fixture
def sharded(tmp_path):
    """An exported Pre-LN network, in shards."""
    hf_llama.save(tmp_path / 'sharded', *network('pre'), max_shard_gb=SHARD)
    return tmp_path / 'sharded'


@pytest.mark.parametrize(
    'norm_position, max_shard_gb, kind',
    [
        *((name, SHARD, '') for name in PLACEMENTS),
        *((name, 5.0, kind) for name, kind in [('mix', ''), *(('mix', kind) for kind in KINDS), ('pre', 'all')]),
    ],
)
def test_out_and_in_again_is_bitwise_the_same(tmp_path, norm_position, max_shard_gb, kind):
    model, params = network(norm_position, **KINDS.get(kind, {}))
    hf_llama.save(tmp_path / 'out', model, params, max_shard_gb=max_shard_gb)
    assert len(list((tmp_path / 'out').glob('*.safetensors'))) == (1 if max_shard_gb == 5.0 else 3)
    again, found = hf_llama.load(tmp_path / 'out')
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype('float32')}
    assert found['embed']['embedding'].shape == (128, 8)  # what pads the vocabulary is not stored, and zeros again
    assert (again.norm_position, again.layer_index, again.depth) == (model.norm_position, (1, 2, 3), 3)
    assert again.config == dataclasses.replace(model.config, norm_position=again.config.norm_position)
    np.testing.assert_array_equal(logits(again, found), logits(model, params))


@pytest.mark.parametrize('norm_position', PLACEMENTS)
def test_only_pre_ln_is_stock_llama(tmp_path, norm_position):
    hf_llama.save(tmp_path / 'out', *network(norm_position))
    config = json.loads((tmp_path / 'out/config.json').read_text())
    stock = norm_position == 'pre'
    assert config['model_type'] == ('llama' if stock else 'mixln')
    assert ('auto_map' in config, (tmp_path / 'out/modeling_mixln.py').exists()) == (not stock, not stock)
    tensors = safetensors.numpy.load_file(tmp_path / 'out/model.safetensors')
    assert tensors['lm_head.weight'].shape == tensors['model.embed_tokens.weight'].shape == (11, 8)  # nothing pads


def test_the_placements_in_words():
    model, _ = network('post,deepnorm,lns')
    post = {'attention': {'post': 'post_attention_layernorm'}, 'mlp': {'post': 'post_feedforward_layernorm'}}
    alpha, third = {'residual_scale': float(np.float32(6**0.25))}, {'in_scale': float(np.float32(3**-0.5))}
    assert hf_config.described(model) == [
        post,
        {name: at | alpha for name, at in post.items()},
        {'attention': {'pre': 'input_layernorm'} | third, 'mlp': {'pre': 'post_attention_layernorm'} | third},
    ]


@pytest.mark.parametrize('name', ['bfloat16', 'float16'])
def test_half_precision_loads_as_float32(tmp_path, name):
    model, params = network('mix')
    if name == 'bfloat16':
        hf_llama.save(tmp_path / 'out', model, params, dtype='bfloat16')
        kind = ml_dtypes.bfloat16
    else:
        hf_llama.save(tmp_path / 'out', model, params)
        tensors = safetensors.numpy.load_file(tmp_path / 'out/model.safetensors')
        kind = np.float16
        safetensors.numpy.save_file(
            {at: tensor.astype(kind) for at, tensor in tensors.items()}, tmp_path / 'out/model.safetensors'
        )
    stored = safetensors.numpy.load_file(tmp_path / 'out/model.safetensors')
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(kind)}
    _, found = hf_llama.load(tmp_path / 'out')
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(kind).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, found, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype('float32')}


class TestPruned:
    """A network whose layers 2 and 5 of 6 are left keeps their constants."""

    names = ('lns', 'deepnorm')

    def make(self, tmp_path):
        model, params = network('lns,deepnorm', num_layers=2)
        model = model.clone(layer_index=(2, 5), depth=6)
        hf_llama.save(tmp_path / 'out', model, params)
        return tmp_path / 'out', model, params

    def test_constants_are_kept(self, tmp_path):
        folder, model, params = self.make(tmp_path)
        again, found = hf_llama.load(folder)
        assert (again.layer_index, again.depth) == ((2, 5), 6)
        np.testing.assert_array_equal(logits(again, found), logits(model, params))
        edit(folder, layer_index=None, depth=None, placements=None)
        forgot, found = hf_llama.load(folder)
        assert np.abs(logits(forgot, found) - logits(model, params)).max() > 1e-3

    @pytest.mark.parametrize(
        'changes',
        [
            {'layer_index': [2]},
            {'layer_index': [5, 2]},
            {'layer_index': [2, 2]},
            {'layer_index': [0, 5]},
            {'layer_index': [2, 7]},
            {'layer_index': [2, 5.0]},
            {'layer_index': 'all'},
            {'depth': 4},
            {'depth': '6'},
        ],
    )
    def test_numbers_that_cannot_be(self, tmp_path, changes):
        folder, _, _ = self.make(tmp_path)
        edit(folder, **changes)
        with pytest.raises(CheckpointError, match=r'config\.json: layer_index=.* 2 rising layer numbers from 1'):
            hf_llama.load(folder)

    def test_constants_that_are_not_ours(self, tmp_path):
        folder, _, _ = self.make(tmp_path)
        edit(folder, layer_index=[3, 5])
        with pytest.raises(CheckpointError, match='placements is not that of'):
            hf_llama.load(folder)


class TestPlacementOfAFolder:
    @pytest.mark.parametrize(
        'name, names',
        [
            ('mix', 'post_feedforward_layernorm'),
            ('post', 'post_feedforward_layernorm'),
            ('sandwich', 'post_feedforward_layernorm and pre_feedforward_layernorm'),
        ],
    )
    def test_tensor_names_that_are_not_pre_ln(self, name, names):
        with pytest.raises(CheckpointError, match=f'{name}: layer 0 has {names}: not Pre-LN; pass norm_position$'):
            hf_llama.load(GOLDEN / name)

    def test_a_folder_that_says_it_is_not_read_as_another(self, mixed):
        for same in ('mix', ['post', 'pre', 'pre'], 'post*1,pre*2'):
            assert hf_llama.load(mixed, same)[0].norm_position == ('post', 'pre', 'pre')
        with pytest.raises(UsageError, match=r'config.json says norm_position=post\*1,pre\*2, not pre\*3'):
            hf_llama.load(mixed, 'pre')

    @pytest.mark.parametrize(
        'value, message',
        [
            (['post', 'pre'], 'lists 2 layers'),
            (['post', 'pre', 'pree'], "'pree' is not one of"),
            ([1, 2, 3], 'norm_position: .*str'),
            (3, 'norm_position: '),
            (None, 'has no key norm_position, which model_type=mixln needs'),
        ],
    )
    def test_bad_values(self, mixed, value, message):
        edit(mixed, norm_position=value)
        with pytest.raises(CheckpointError, match=rf'config\.json.*{message}'):
            hf_llama.load(mixed)


class TestShards:
    def first(self, folder):
        return sorted(folder.glob('model-00001-*'))[0].name

    def test_a_missing_shard(self, sharded):
        (sharded / self.first(sharded)).unlink()
        with pytest.raises(CheckpointError, match=r'index\.json names model-00001-of-00003\.safetensors, which is not'):
            hf_llama.load(sharded)

    def test_a_tensor_that_the_shard_lacks(self, sharded):
        change(sharded, 'model.embed_tokens.weight', lambda tensor: None, 'model-00001-of-00003.safetensors')
        with pytest.raises(CheckpointError, match='00001-of-00003.safetensors lacks tensor model.embed_tokens.weight'):
            hf_llama.load(sharded)

    def test_a_tensor_that_the_index_does_not_name(self, sharded):
        change(sharded, 'stray', lambda _: np.zeros(3, np.float32), self.first(sharded))
        with pytest.raises(CheckpointError, match='holds tensor stray, which .* does not put there'):
            hf_llama.load(sharded)

    @pytest.mark.parametrize('path', ['../mixed/model.safetensors', '/etc/passwd', 'a/b.safetensors', '..', 7])
    def test_a_path_that_leaves_the_folder(self, sharded, path):
        name = 'model.safetensors.index.json'
        index = json.loads((sharded / name).read_text())
        index['weight_map']['model.norm.weight'] = path
        (sharded / name).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match='model.norm.weight is in .*, which is not a file of this folder'):
            hf_llama.load(sharded)

    @pytest.mark.parametrize('content', ['{', '[]', '{}', '{"weight_map": 3}'])
    def test_an_index_that_is_none(self, sharded, content):
        (sharded / 'model.safetensors.index.json').write_text(content)
        with pytest.raises(CheckpointError, match='not a readable index'):
            hf_llama.load(sharded)


class TestRefused:
    @pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'model.pkl', 'consolidated.00.pth'])
    def test_pickles_are_not_opened(self, mixed, name):
        (mixed / 'model.safetensors').rename(mixed / name)
        with pytest.raises(CheckpointError, match=f'has {name}, a pickle, which is never opened here: safetensors'):
            hf_llama.load(mixed)

    def test_a_pickle_beside_safetensors_is_nobodys_business(self, mixed):
        (mixed / 'training_args.bin').write_bytes(b'')
        hf_llama.load(mixed)

    @pytest.mark.parametrize(
        'name, how, message',
        [
            ('model.layers.1.mlp.up_proj.weight', lambda tensor: None, 'no tensor model.layers.1.mlp.up_proj.weight'),
            ('model.stray.weight', lambda _: np.ones(3, np.float32), 'tensor model.stray.weight has no place'),
            ('lm_head.weight', lambda tensor: tensor[:-1], r'lm_head.weight has shape \(8, 10\)'),
            ('lm_head.weight', lambda tensor: tensor.astype(np.int32), 'lm_head.weight is not finite numbers'),
            ('lm_head.weight', lambda tensor: tensor * np.nan, 'lm_head.weight is not finite numbers'),
        ],
    )
    def test_tensors(self, mixed, name, how, message):
        hf_llama.load(mixed)
        change(mixed, name, how)
        with pytest.raises(CheckpointError, match=message):
            hf_llama.load(mixed)

    def test_a_missing_file(self, mixed):
        (mixed / 'model.safetensors').unlink()
        with pytest.raises(UsageError, match='model.safetensors does not exist'):
            hf_llama.load(mixed)

    @pytest.mark.parametrize(
        'options, message',
        [
            ({'dtype': 'int8'}, "dtype='int8' is not one of float32, bfloat16"),
            ({'max_shard_gb': 0}, 'max_shard_gb=0 must be above 0'),
            ({'max_shard_gb': float('nan')}, 'max_shard_gb=nan must be'),
        ],
    )
    def test_options(self, tmp_path, options, message):
        with pytest.raises(UsageError, match=message):
            hf_llama.save(tmp_path / 'out', *network('pre'), **options)
        assert not (tmp_path / 'out').exists()

    def test_a_folder_with_something_in_it(self, mixed):
        before = sorted(mixed.iterdir())
        with pytest.raises(UsageError, match='mixed is not empty'):
            hf_llama.save(mixed, *network('pre'))
        assert sorted(mixed.iterdir()) == before

    def test_a_switch_that_cannot_be_said(self, tmp_path, monkeypatch):
        @dataclasses.dataclass(frozen=True)
        class Spun(placements.Placement):
            spin: bool = False

        monkeypatch.setitem(placements.PLACEMENTS, 'spun', placements.Layer(Spun(pre=True), Spun(pre=True, spin=True)))
        with pytest.raises(UsageError, match='norm_position spun: spin cannot be said'):
            hf_llama.save(tmp_path / 'out', *network('pre,spun*2'))
        assert not (tmp_path / 'out').exists()

    def test_two_norms_of_one_name(self, tmp_path, monkeypatch):
        both = placements.Placement(out=True, post=True)
        monkeypatch.setitem(placements.PLACEMENTS, 'both', placements.Layer(both, both))
        with pytest.raises(UsageError, match=r'parameters of both\*3 have the tensor name .*post_attention_layernorm'):
            hf_llama.save(tmp_path / 'out', *network('both'))

    def test_a_parameter_without_a_name(self, tmp_path):
        model, params = network('pre')
        segment = params['layers']['segment_0'] | {'attention_spin': np.ones((3, 1), np.float32)}
        params = params | {'layers': {'segment_0': segment}}
        with pytest.raises(UsageError, match='parameter layers/0/attention_spin of norm_position pre has no tensor'):
            hf_llama.save(tmp_path / 'out', model, params)
        assert not (tmp_path / 'out').exists()


def test_a_new_row_of_known_switches_needs_nothing_here(tmp_path, monkeypatch):
    half = placements.Placement(pre=True, residual_scale=lambda l, L: 0.5 * l, branch_scale=lambda l, L: 1 / L)
    normed = placements.Placement(residual_normed=True, out=True)
    monkeypatch.setitem(placements.PLACEMENTS, 'new', placements.Layer(half, normed))
    model, params = network('new,post,new')
    hf_llama.save(tmp_path / 'out', model, params)
    again, found = hf_llama.load(tmp_path / 'out')
    np.testing.assert_array_equal(logits(again, found), logits(model, params))
    assert hf_config.described(model)[2]['attention'] == {
        **{'pre': 'input_layernorm', 'residual_scale': 1.5, 'branch_scale': float(np.float32(1 / 3))}
    }


def test_copied_golden_folders_gain_their_placement(tmp_path):
    """The authors' folder, written again: what it is then stands in it."""
    model, params = hf_llama.load(GOLDEN / 'sandwich', 'sandwich')
    hf_llama.save(tmp_path / 'out', model, params)
    theirs, ours = (
        safetensors.numpy.load_file(folder / 'model.safetensors') for folder in (GOLDEN / 'sandwich', tmp_path / 'out')
    )
    assert theirs.keys() == ours.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert hf_llama.load(shutil.copytree(tmp_path / 'out', tmp_path / 'copy'))[0].norm_position == ('sandwich',) * 8


def test_scaled_embeddings_are_written_scaled(tmp_path):
    model, params = network('post', scale_embed=True)
    hf_llama.save(tmp_path / 'out', model, params)
    found = hf_llama.load(tmp_path / 'out')
    assert not found[0].config.scale_embed
    np.testing.assert_array_equal(logits(*found), logits(model, params))


def test_groups_go_along(tmp_path):
    model, params = network('group_pre', norm_groups=2)
    hf_llama.save(tmp_path / 'out', model, params)
    found = hf_llama.load(tmp_path / 'out')
    assert found[0].config.norm_groups == 2
    np.testing.assert_array_equal(logits(*found), logits(model, params))


@pytest.mark.parametrize(
    'norm_position, key, value',
    [('group_pre', 'norm_groups', None), ('peri', 'embed_norm', None), ('sandwich', 'embed_norm', True)],
)
def test_facts_that_contradict_the_placement(tmp_path, norm_position, key, value):
    hf_llama.save(tmp_path / 'out', *network(norm_position))
    edit(tmp_path / 'out', **{key: value})
    with pytest.raises(CheckpointError, match=f'config.json: {key} is not that of norm_position'):
        hf_llama.load(tmp_path / 'out')


def test_a_config_says_what_the_network_is(tmp_path):
    """In the words of transformers 5 (rope_parameters) and 4 (rope_theta, rope_scaling)."""
    hf_llama.save(tmp_path / 'out', *network('pre', **KINDS['all']))
    found = json.loads((tmp_path / 'out/config.json').read_text())
    scaling = {
        'rope_type': 'llama3', 'factor': 3.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
        'original_max_position_embeddings': 50,
    }  # fmt: skip
    expected = {
        'model_type': 'llama', 'tie_word_embeddings': True, 'attention_bias': True, 'mlp_bias': True, 'head_dim': 6,
        'rope_theta': 50.0, 'rope_scaling': scaling, 'rope_parameters': {'rope_theta': 50.0, **scaling},
    }  # fmt: skip
    assert found | expected == found
    shapes = {
        name: tensor.shape for name, tensor in safetensors.numpy.load_file(tmp_path / 'out/model.safetensors').items()
    }
    assert 'lm_head.weight' not in shapes
    biases = {name.removeprefix('model.layers.1.'): shape for name, shape in shapes.items() if 'layers.1.' in name}
    assert {name: shape for name, shape in biases.items() if name.endswith('bias')} == {
        'self_attn.q_proj.bias': (24,), 'self_attn.k_proj.bias': (12,), 'self_attn.v_proj.bias': (12,),
        'self_attn.o_proj.bias': (8,), 'mlp.gate_proj.bias': (12,), 'mlp.up_proj.bias': (12,),
        'mlp.down_proj.bias': (8,),
    }  # fmt: skip


def test_a_scaled_embedding_that_is_the_head_becomes_two(tmp_path):
    model, params = network('mix', scale_embed=True, tie_word_embeddings=True)
    hf_llama.save(tmp_path / 'out', model, params)
    found = hf_llama.load(tmp_path / 'out')
    assert not found[0].config.tie_word_embeddings
    np.testing.assert_array_equal(logits(*found), logits(model, params))


def test_what_transformers_refuses_is_not_written(tmp_path):
    with pytest.raises(UsageError, match='hidden_size=10 is not divisible by num_heads=4'):
        hf_llama.save(tmp_path / 'out', *network('pre', hidden_size=10, head_dim=6))
    assert not (tmp_path / 'out').exists()


class TestWhatAConfigSays:
    @pytest.fixture
    def folder(self, tmp_path):
        hf_llama.save(tmp_path / 'out', *network('pre', **KINDS['theta']))
        edit(tmp_path / 'out', rope_theta=None, rope_parameters=None)
        return tmp_path / 'out'

    scaling = {
        'factor': 3, 'low_freq_factor': 1, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 50,
    }  # fmt: skip

    @pytest.mark.parametrize(
        'says, theta, expected',
        [
            ({}, 10000.0, {}),
            ({'rope_theta': 50}, 50.0, {}),
            ({'rope_theta': 7.0, 'rope_parameters': {'rope_theta': 50.0}}, 50.0, {}),
            ({'rope_theta': 50.0, 'rope_scaling': {'type': 'default'}, 'tie_word_embeddings': None}, 50.0, {}),
            ({'rope_parameters': {'rope_type': 'default', 'rope_theta': 50.0}, 'partial_rotary_factor': 1}, 50.0, {}),
            ({'rope_theta': 50.0, 'rope_scaling': {'rope_type': 'llama3', **scaling}}, 50.0, LLAMA3),
            ({'rope_theta': 50.0, 'rope_scaling': {'type': 'llama3', **scaling}}, 50.0, LLAMA3),
            ({'rope_parameters': {'rope_type': 'llama3', 'rope_theta': 50.0, **scaling}}, 50.0, LLAMA3),
            (
                {
                    'rope_scaling': {'rope_type': 'llama3', **scaling, 'original_max_position_embeddings': None},
                    'max_position_embeddings': 50,
                },
                10000.0,
                LLAMA3,
            ),
        ],
    )
    def test_rotary_positions(self, folder, says, theta, expected):
        edit(folder, **says)
        found = hf_llama.load(folder)[0].config
        assert found == dataclasses.replace(
            network('pre')[0].config, norm_position='pre*3', rope_theta=theta, **expected
        )

    @pytest.mark.parametrize(
        'says, message',
        [
            *(
                ({name: {key: kind, 'factor': 2.0}}, f'{name}: rope_type={kind!r} is not modelled here')
                for name, key in (('rope_scaling', 'type'), ('rope_parameters', 'rope_type'))
                for kind in ('linear', 'dynamic', 'yarn', 'longrope', 7)
            ),
            ({'rope_scaling': {'type': 'llama3', 'factor': 2.0}}, 'type llama3 lacks low_freq_factor'),
            ({'rope_scaling': {'type': 'llama3', **scaling, 'factor': '8'}}, 'rope_factor must be of type float'),
            ({'rope_scaling': {'type': 'llama3', **scaling, 'factor': 0.5}}, 'rope_factor must be at least 1'),
            ({'rope_scaling': {'type': 'llama3', **scaling, 'high_freq_factor': 1}}, 'must be above .*rope_low_freq'),
            ({'rope_scaling': 'llama3'}, "rope_scaling='llama3' is not modelled"),
            ({'rope_parameters': [1]}, r'rope_parameters=\[1\] is not modelled'),
            ({'rope_parameters': {'full_attention': {'rope_theta': 5.0}}}, 'rope_parameters=.*only one rotation'),
            (
                {'rope_parameters': {'rope_theta': 5.0, 'partial_rotary_factor': 0.5}},
                'partial_rotary_factor=0.5 is not',
            ),
            (
                {'rope_parameters': {'rope_type': 'default'}, 'rope_scaling': {'rope_type': 'llama3', **scaling}},
                "rope_scaling has rope_type='llama3', rope_parameters 'default'",
            ),
            ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5 is not modelled here'),
            ({'sliding_window': 4096}, 'sliding_window=4096 is not modelled here'),
            ({'quantization_config': {'bits': 4}}, 'quantization_config=.* is not modelled here'),
            ({'attention_bias': 2}, 'attention_bias must be of type bool'),
            ({'attention_bias': True}, r'no tensor model\.layers\.0\.self_attn\.\w_proj\.bias'),
            ({'head_dim': 4}, r'k_proj\.weight has shape \(8, 4\), config.json makes it \(8, 8\)'),
            ({'head_dim': 3}, r'the head size 3 \(config.model.head_dim\) must be even'),
            ({'head_dim': '2'}, 'head_dim must be of type int'),
        ],
    )
    def test_what_is_not_modelled_is_named(self, folder, says, message):
        edit(folder, **says)
        with pytest.raises(CheckpointError, match=message) as found:
            hf_llama.load(folder)
        assert str(folder) in str(found.value) and '\n' not in str(found.value)

    def test_the_head_that_is_the_embedding(self, tmp_path):
        """With its tensor or without; with the head's alone; but not with another one."""
        model, params = network('pre', **KINDS['tied'])
        hf_llama.save(tmp_path / 'out', model, params)
        table = params['embed']['embedding'][:11]
        for head, embedding in ((None, table), (table, table), (table, None)):
            change(tmp_path / 'out', 'lm_head.weight', lambda _, new=head: new)
            change(tmp_path / 'out', 'model.embed_tokens.weight', lambda _, new=embedding: new)
            np.testing.assert_array_equal(logits(*hf_llama.load(tmp_path / 'out')), logits(model, params))
        change(tmp_path / 'out', 'model.embed_tokens.weight', lambda _: table + 1)
        with pytest.raises(CheckpointError, match='tie_word_embeddings=true, but lm_head.weight is not model.embed'):
            hf_llama.load(tmp_path / 'out')
        edit(tmp_path / 'out', tie_word_embeddings=False)
        assert not hf_llama.load(tmp_path / 'out')[0].config.tie_word_embeddings
        change(tmp_path / 'out', 'lm_head.weight', lambda _: None)
        with pytest.raises(CheckpointError, match='no tensor lm_head.weight, and .* does not say tie_word_embeddings'):
            hf_llama.load(tmp_path / 'out')


THETA, LAYER = 50.0, 'model.layers.1.self_attn.'
FREQUENCY = THETA ** (-np.arange(3) / 3)
ANGLES = np.outer(np.arange(40), np.tile(FREQUENCY, 2))[None, None]
TRIANGLE = np.tri(7, dtype=bool)[None, None]
BUFFERS = {  # name of a tensor and what it holds in folders that old versions of transformers wrote
    'by layer': (f'{LAYER}rotary_emb.inv_freq', FREQUENCY.astype(np.float32)),
    'of the whole': ('model.rotary_emb.inv_freq', FREQUENCY.astype(np.float32)),
    'original': ('model.rotary_emb.original_inv_freq', FREQUENCY),
    'bfloat16': (f'{LAYER}rotary_emb.inv_freq', FREQUENCY.astype(ml_dtypes.bfloat16)),
    'float16': (f'{LAYER}rotary_emb.inv_freq', FREQUENCY.astype(np.float16)),
    'cosines': (f'{LAYER}rotary_emb.cos_cached', np.cos(ANGLES).astype(np.float32)),
    'sines': (f'{LAYER}rotary_emb.sin_cached', np.sin(ANGLES).astype(ml_dtypes.bfloat16)),
    'mask': (f'{LAYER}bias', TRIANGLE),
    'mask of numbers': (f'{LAYER}bias', TRIANGLE.astype(np.uint8)),
    'masked': (f'{LAYER}masked_bias', np.float32(-1e9).reshape(())),
    'masked infinitely': (f'{LAYER}masked_bias', np.float32(-np.inf).reshape(())),
    'mask of the whole': ('model.causal_mask', ~TRIANGLE),
    'positions': ('model.position_ids', np.arange(9)[None]),
}


class TestBuffers:
    """What carries no weights is compared with what the network computes itself, and left."""

    @pytest.fixture
    def folder(self, tmp_path):
        hf_llama.save(tmp_path / 'out', *network('mix', rope_theta=THETA, head_dim=6))
        return tmp_path / 'out'

    @pytest.mark.parametrize('name, tensor', BUFFERS.values(), ids=BUFFERS)
    def test_is_left(self, folder, name, tensor):
        expected = hf_llama.load(folder)[1]
        change(folder, name, lambda _: tensor)
        jax.tree.map(np.testing.assert_array_equal, hf_llama.load(folder)[1], expected)

    @pytest.mark.parametrize(
        'name, tensor, message',
        [
            *(
                (name, (51.0 ** (-np.arange(3) / 3)).astype(kind), 'rotary frequencies of rope_theta=50 in config.json')
                for name in (f'{LAYER}rotary_emb.inv_freq', 'model.rotary_emb.inv_freq')
                for kind in (np.float32, np.float16)
            ),
            (f'{LAYER}rotary_emb.inv_freq', FREQUENCY[:2], 'rope_theta=50'),
            (f'{LAYER}rotary_emb.inv_freq', FREQUENCY * np.nan, 'rope_theta=50'),
            (f'{LAYER}rotary_emb.cos_cached', np.sin(ANGLES), 'cosines of the rotary frequencies of rope_theta=50'),
            (f'{LAYER}rotary_emb.sin_cached', np.sin(1.1 * ANGLES), 'sines of the rotary frequencies of rope_theta=50'),
            (f'{LAYER}rotary_emb.sin_cached', np.zeros(()), 'sines'),
            (f'{LAYER}bias', np.ones((7, 7), bool), 'a causal mask'),
            (f'{LAYER}bias', np.ones(7, np.float32), 'a causal mask'),
            (f'{LAYER}masked_bias', np.float32(0.1).reshape(()), 'a very negative number'),
            ('model.position_ids', np.arange(9)[::-1], 'positions from 0'),
        ],
    )
    def test_that_holds_something_else(self, folder, name, tensor, message):
        change(folder, name, lambda _: tensor)
        with pytest.raises(CheckpointError, match=f'out: tensor {name} does not hold .*{message}'):
            hf_llama.load(folder)

    def test_of_slowed_rotations(self, tmp_path):
        """llama3: the last frequency a third, the middle one by hand between (tests/reference.py)."""
        hf_llama.save(tmp_path / 'out', *network('mix', **KINDS['llama3']))
        slowed = reference.llama3(FREQUENCY, 3.0, 1.0, 4.0, 50)
        assert slowed[2] == pytest.approx(FREQUENCY[2] / 3)
        change(tmp_path / 'out', 'model.rotary_emb.inv_freq', lambda _: slowed.astype(np.float32))
        hf_llama.load(tmp_path / 'out')
        change(tmp_path / 'out', 'model.rotary_emb.inv_freq', lambda _: FREQUENCY.astype(np.float32))
        with pytest.raises(CheckpointError, match='rope_theta=50 and rope_type=llama3'):
            hf_llama.load(tmp_path / 'out')

    @pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', '_orig_mod.module.'])
    def test_names_that_torch_puts_before_others(self, folder, prefix):
        expected = hf_llama.load(folder)[1]
        tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
        safetensors.numpy.save_file(
            {f'{prefix}{name}': tensor for name, tensor in tensors.items()}, folder / 'model.safetensors'
        )
        jax.tree.map(np.testing.assert_array_equal, hf_llama.load(folder)[1], expected)
        change(folder, 'model.norm.weight', lambda _: tensors['model.norm.weight'])
        with pytest.raises(CheckpointError, match='holds the tensor model.norm.weight twice'):
            hf_llama.load(folder)

    @pytest.mark.parametrize(
        'name', ['model.layers.1.self_attn.rotary_emb.weight', 'model.layers.1.bias', 'lm_head.bias']
    )
    def test_others_are_unknown(self, folder, name):
        change(folder, name, lambda _: np.zeros(3, np.float32))
        with pytest.raises(CheckpointError, match=f'tensor {name} has no place'):
            hf_llama.load(folder)


@pytest.mark.parametrize('inside', ['checkpoints/20/about', 'about'])
def test_a_run_is_not_read_as_a_hugging_face_folder(tmp_path, inside):
    (tmp_path / inside).mkdir(parents=True)
    (tmp_path / 'config.json').write_text('{"model": {}}')
    for load in (hf_llama.load, hf_bert.load):
        with pytest.raises(UsageError, match='is a run or a checkpoint of ours, which mixln_jax.load opens'):
            load(tmp_path)

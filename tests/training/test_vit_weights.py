"""Weights of ViT runs out and in: the export command, `init_from` with other classes and other image sizes."""

import json

import hf_folders
import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import evaluate, export, main
from mixln_jax.analysis import angular
from mixln_jax.models import vit
from mixln_jax.models.hf import vit as hf_vit
from mixln_jax.runs import weights
from mixln_jax.system.errors import CheckpointError, UsageError

KEYS = {
    'task.name': 'classification', 'model.family': 'vit', 'model.image_size': 8, 'model.patch_size': 4,
    'model.num_classes': 10, 'model.hidden_size': 16, 'model.intermediate_size': 32, 'model.num_layers': 2,
    'model.num_heads': 2, 'model.norm_position': 'pre', 'model.pool': 'tok', 'model.positions': 'learned',
    'data.source': 'digits', 'data.held_out': 0.2, 'data.images.flip': 0.0, 'data.images.eval_crop': 1.0,
    'compute_dtype': 'float32', 'batch_size': 16, 'num_steps': 2, 'eval.every': 0, 'eval.tokens': 200,
    'checkpoint.every': 2, 'analysis.every': 0, 'analysis.tokens': 0, 'optim.learning_rate': 1e-2, 'mesh.data': 1,
}  # fmt: skip


def train(folder, **changes):
    values = configs.default()
    values.update_from_flattened_dict(KEYS | changes)
    main.run(values, folder)
    return folder


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp('runs') / 'vit')


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    keys = {'model.norm_position': 'mix', 'model.post_ratio': 0.5, 'model.pool': 'gap', 'model.positions': 'sincos2d'}
    return train(tmp_path_factory.mktemp('runs') / 'mix', **keys)


def same(one, other, but=()):
    one, other = ({name: part for name, part in tree.items() if name not in but} for tree in (one, other))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_exported(trained, mixed, tmp_path, capsys):
    for run, model_type in ((trained, 'vit'), (mixed, 'mixln_vit')):
        out = tmp_path / model_type
        assert export.main(['--checkpoint', str(run), '--out', str(out)]) == 0
        assert 'identical (on 2 random images' in capsys.readouterr().out
        config = json.loads((out / 'config.json').read_text())
        assert config['model_type'] == model_type and config['id2label'] == {
            str(digit): str(digit) for digit in range(10)
        }
        before, after = weights.load(run), weights.load(out)
        same(before.params, after.params)
        assert after.model.norm_position == before.model.norm_position and len(after.class_names) == 10
        # And once more, from the folder itself.
        assert export.main(['--checkpoint', str(out), '--out', str(tmp_path / 'again')]) == 0
        for name in ('config.json', 'preprocessor_config.json', 'model.safetensors'):
            assert (tmp_path / 'again' / name).read_bytes() == (out / name).read_bytes()
    assert export.main(['--checkpoint', str(mixed), '--out', str(tmp_path / 'cut'), '--remove_layers', '1']) == 0
    assert weights.load(tmp_path / 'cut').model.layer_index == (2,)


def test_exported_for_timm(trained, mixed, tmp_path, capsys):
    command = lambda *words: export.main(['--format', 'timm', *map(str, words)])  # noqa: E731
    assert command('--checkpoint', trained, '--out', tmp_path / 'timm') == 0
    assert 'identical (on 2 random images' in capsys.readouterr().out
    content = json.loads((tmp_path / 'timm/config.json').read_text())
    assert content['label_names'] == [str(digit) for digit in range(10)]
    assert content['pretrained_cfg']['crop_pct'] == 1.0
    before, after = weights.load(trained), weights.load(tmp_path / 'timm')
    same(before.params, after.params)
    assert after.class_names == before.class_names
    # From a folder of transformers it is the same but for how a run prepares images, and it replaces an export.
    assert export.main(['--checkpoint', str(tmp_path / 'timm'), '--out', str(tmp_path / 'vit')]) == 0
    assert command('--checkpoint', tmp_path / 'vit', '--out', tmp_path / 'timm', '--remove_layers', '2') == 0
    assert sorted(path.name for path in (tmp_path / 'timm').iterdir()) == [
        'config.json', 'export.json', 'model.safetensors',
    ]  # fmt: skip
    assert weights.load(tmp_path / 'timm').model.depth == 1
    capsys.readouterr()
    assert command('--checkpoint', mixed, '--out', tmp_path / 'mix') == 2
    said = capsys.readouterr().err
    assert 'norm_position=post*1,pre*1: timm has pre alone; leave out --format' in said and said.count('\n') == 1
    assert not (tmp_path / 'mix').exists()
    assert command('--checkpoint', trained, '--out', tmp_path / 'x', '--adapter') == 2
    assert '--format has no meaning with --adapter' in capsys.readouterr().err


@pytest.mark.parametrize('source', ['run', 'folder'])
def test_a_run_starts_from(trained, tmp_path, capsys, source):
    where = str(trained)
    if source == 'folder':
        export.main(['--checkpoint', where, '--out', str(tmp_path / 'out')])
        where = f'hf:{tmp_path}/out'
    keys = {'init_from': where, 'optim.learning_rate': 1e-9, 'num_steps': 1, 'checkpoint.every': 1}
    capsys.readouterr()
    folder = train(tmp_path / 'same', **keys)
    said = capsys.readouterr().out
    assert f'starts from the weights of {where}' in said and 'is new' not in said and 'resized' not in said
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        weights.load(folder).params,
        weights.load(trained).params,
    )


def images_file(folder, classes):
    rng = np.random.default_rng(0)
    arrays = {'x_train': rng.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8), 'y_train': np.arange(40) % classes}
    arrays |= {'x_test': arrays['x_train'][:20], 'y_test': arrays['y_train'][:20]}
    np.savez(folder / 'set.npz', **arrays)
    return {'data.source': 'npz', 'data.path': str(folder / 'set.npz'), 'data.held_out': 0.0}


def test_other_classes_and_sizes(trained, mixed, tmp_path, capsys):
    keys = images_file(tmp_path, 3) | {'optim.learning_rate': 1e-9, 'num_steps': 1, 'checkpoint.every': 1}
    keys |= {'model.num_classes': 3, 'model.image_size': 16}
    capsys.readouterr()
    folder = train(tmp_path / 'learned', init_from=str(trained), **keys)
    said = capsys.readouterr().out
    assert said.count(f'the head, for 3 classes, is new: that of {trained} is for 10 classes\n') == 1
    assert said.count('learned positions are resized, bicubically, from 2 x 2 to 4 x 4\n') == 1
    before, after = weights.load(trained).params, weights.load(folder).params
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    for name in ('patch', 'token', 'layers', 'norm'):
        jax.tree.map(close, after[name], before[name])
    assert after['classes']['kernel'].shape == (16, 3) and np.abs(after['classes']['kernel']).max() < 1e-6
    resized = vit.resized_positions(np.asarray(before['positions']['embedding']), 2, 4)
    close(after['positions']['embedding'], resized)
    # Sines and cosines are computed for any size. What a run began with is made again for the analyses.
    extra = {'model.norm_position': 'mix', 'model.post_ratio': 0.5, 'model.pool': 'gap', 'model.positions': 'sincos2d'}
    folder = train(tmp_path / 'sines', init_from=str(mixed), **keys | extra)
    assert 'positions are computed, none are resized\n' in capsys.readouterr().out
    for run in (tmp_path / 'learned', folder):
        assert evaluate.main(['--checkpoint', str(run)]) == 0
        assert angular.main(['--checkpoint', str(run), '--steps', 'init', '--tokens', '200']) == 0


def test_what_cannot_be_taken(trained, tmp_path):
    for key, value, message in (
        ('model.norm_position', 'mix', 'norm_position pre*2, config.model.norm_position is post*1,pre*1'),
        ('model.patch_size', 2, 'patch_size 4, config.model.patch_size is 2'),
        ('model.pool', 'gap', 'pool tok, config.model.pool is gap'),
    ):
        with pytest.raises(UsageError, match='its network has ') as error:
            train(tmp_path / 'new', init_from=str(trained), **{key: value, 'model.post_ratio': 0.5})
        assert message in str(error.value).replace('post,pre', 'post*1,pre*1')


# --- Folders that are damaged, or of another kind


@pytest.fixture
def folder(tmp_path):
    model, params = hf_folders.network(
        'pre', family='vit', hidden_size=16, intermediate_size=24, num_heads=2, image_size=12, patch_size=4,
        num_classes=5, pool='tok', positions='learned',
    )  # fmt: skip
    hf_vit.save(tmp_path / 'in', model, params, names=['a', 'b', 'c', 'd', 'e'])
    return tmp_path / 'in'


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'hidden_act': 'relu'}, "hidden_act='relu' is not modelled here"),
        ({'hidden_act': ['gelu']}, 'is not modelled here'),
        ({'qkv_bias': False}, 'qkv_bias=False is not modelled here, only True'),
        ({'num_channels': 1}, 'num_channels=1 is not modelled here'),
        ({'image_size': [12, 16]}, 'image_size'),
        ({'image_size': 13}, 'is not divisible by'),
        ({'image_size': 16}, 'position_embeddings has shape (10, 16), config.json makes it (17, 16)'),
        ({'patch_size': 0}, 'patch_size'),
        ({'num_attention_heads': 3}, 'num_heads=3'),
        ({'layer_norm_eps': None}, 'has no key layer_norm_eps'),
        ({'id2label': {}}, 'does not say how many labels'),
        ({'id2label': {'1': 'a', '7': 'b'}}, 'does not name the classes 0 to 1'),
        ({'id2label': {'0': 'a', '1': 'b', '2': 'c'}}, 'classifier.bias has shape (5,), config.json makes it (3,)'),
        ({'norm_position': 'post'}, 'is Pre-LN, not post'),
        ({'model_type': 'mixln_vit'}, 'positions'),
        ({'model_type': 'deit'}, "model_type='deit' is not"),
    ],
    ids=str,
)
def test_bad_config(folder, changes, message):
    hf_folders.edit(folder, **changes)
    with pytest.raises((CheckpointError, UsageError)) as error:
        weights.load(folder)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'image_mean': [0.1, 0.2, 0.3]}, 'are not those of any config.model.pixels'),
        ({'image_std': 'x'}, 'are not those of any config.model.pixels'),
        ({'do_rescale': False}, 'do_rescale=False is not modelled here'),
        ({'rescale_factor': 1}, 'rescale_factor=1 is not modelled here'),
        ({'do_normalize': 'no'}, "do_normalize='no' is not modelled here"),
    ],
    ids=str,
)
def test_bad_processor(folder, changes, message):
    hf_folders.edit(folder, 'preprocessor_config.json', **changes)
    with pytest.raises(CheckpointError, match='preprocessor_config') as error:
        weights.load(folder)
    assert message in str(error.value)


def test_bad_tensors(folder):
    hf_folders.change(folder, 'classifier.bias', lambda old: None)
    with pytest.raises(CheckpointError, match='no tensor classifier.bias'):
        weights.load(folder)
    hf_folders.change(folder, 'classifier.weight', lambda old: None)
    with pytest.raises(CheckpointError, match='has no head for classes: it can only start a run'):
        weights.load(folder)
    hf_folders.change(folder, 'vit.pooler.dense.weight', lambda old: np.ones((2, 2), np.float32))  # is not used
    hf_folders.change(folder, 'vit.embeddings.patch_embeddings.projection.weight', lambda old: old[:, :1])
    with pytest.raises(CheckpointError, match='projection.weight has shape'):
        hf_vit.read(folder)


def test_without_a_head_it_starts_a_run(trained, tmp_path, capsys):
    export.main(['--checkpoint', str(trained), '--out', str(tmp_path / 'out')])
    for name in ('weight', 'bias'):
        hf_folders.change(tmp_path / 'out', f'classifier.{name}', lambda old: None)
    train(tmp_path / 'new', init_from=f'hf:{tmp_path}/out', num_steps=1)
    assert f'the head, for 10 classes, is new: that of hf:{tmp_path}/out is for none' in capsys.readouterr().out


def test_another_placement_than_a_folder_states(folder):
    with pytest.raises(UsageError, match='says norm_position=pre'):
        weights.load(folder, norm_position='post')
    hf_folders.edit(folder, norm_position=None)
    with pytest.raises(UsageError, match='is Pre-LN, not post'):
        weights.load(folder, norm_position='post')
    assert weights.load(folder, norm_position='pre').model.norm_position == ('pre',) * 3


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'architecture': 'resnet50'}, "architecture='resnet50' is not modelled here"),
        ({'architecture': 'vit_base_patch16_clip_224'}, 'is not modelled here'),
        ({'architecture': 3}, 'architecture=3 is not modelled here'),
        ({'model_args': {'init_values': 1e-5}}, 'model_args: init_values=1e-05 is not modelled here'),
        ({'model_args': {'act_layer': 'relu'}}, 'act_layer'),
        ({'model_args': [1]}, 'not the config.json of a network of timm'),
        ({'global_pool': 'avg'}, "global_pool='avg'"),
        ({'model_args': {'num_heads': 7}}, 'num_heads=7'),
        ({'pretrained_cfg': {}}, 'are not those of any config.model.pixels'),
        ({'pretrained_cfg': 'x'}, 'timm'),
    ],
    ids=str,
)
def test_bad_timm(tmp_path, changes, message):
    config = {'architecture': 'vit_tiny_patch4_12', 'pretrained_cfg': {'mean': [0.5] * 3, 'std': [0.5] * 3}}
    tensors = {'patch_embed.proj.weight': np.ones((192, 3, 4, 4)), 'pos_embed': np.ones((1, 10, 192))}
    tensors |= {'blocks.0.norm1.weight': np.ones(192), 'blocks.0.mlp.fc1.weight': np.ones((8, 192))}
    tensors |= {'cls_token': np.ones((1, 1, 192))}
    (tmp_path / 'config.json').write_text(json.dumps(config | changes))
    hf_folders.save(tmp_path, tensors)
    with pytest.raises(CheckpointError) as error:
        weights.load(tmp_path)
    assert message in str(error.value) and '\n' not in str(error.value)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match='no tensor '):
        weights.load(tmp_path)

"""Folders of timm, in and out, against those that timm wrote itself; see tests/golden/README.md."""

import json
import pathlib

import hf_folders
import jax
import numpy as np
import optax
import pytest
import safetensors.numpy

from mixln_jax import config as configs
from mixln_jax.models.hf import vit as hf_vit
from mixln_jax.system.errors import CheckpointError, UsageError

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden/timm'


def network(norm_position='pre', **changes):
    keys = dict(hidden_size=16, intermediate_size=24, num_heads=2, image_size=12, patch_size=4, num_classes=5)
    return hf_folders.network(norm_position, family='vit', **keys | changes)


def write(folder, model, params, **options):
    """Returns (config.json, tensors) of a folder for timm."""
    hf_vit.save(folder, model, params, layout='timm', **options)
    assert sorted(path.name for path in folder.iterdir()) == ['config.json', 'model.safetensors']
    return json.loads((folder / 'config.json').read_text()), safetensors.numpy.load_file(folder / 'model.safetensors')


@pytest.mark.parametrize('kind', ['token', 'avg'])
def test_what_timm_wrote(tmp_path, kind):
    model, params = hf_vit.load(GOLDEN / kind)
    expected = np.load(GOLDEN / kind / 'expected.npz')

    def loss(params):
        logits, _ = model.apply({'params': params}, {'images': expected['images']})
        return optax.softmax_cross_entropy_with_integer_labels(logits, expected['labels']).mean(), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=1e-4)
    _, tensors = write(tmp_path / 'grads', model, grads)
    for name, tensor in tensors.items():
        grad = expected[f'grad/{name}']
        np.testing.assert_allclose(tensor, grad, rtol=0, atol=1e-5 * np.abs(grad).max() + 1e-6)
    content, tensors = write(tmp_path / 'out', model, params, names=list('abcde'), images=configs.Images())
    theirs = safetensors.numpy.load_file(GOLDEN / kind / 'model.safetensors')
    jax.tree.map(np.testing.assert_array_equal, tensors, theirs)
    # What builds the network, as timm states it but for what it states twice.
    stated = json.loads((GOLDEN / kind / 'config.json').read_text())
    arguments = {'act_layer': 'gelu'} | stated.pop('model_args') | {'img_size': 12}
    assert content.pop('model_args') | {'num_classes': 5, 'in_chans': 3} == arguments
    known = stated['pretrained_cfg'] | {'crop_pct': 0.875, 'interpolation': 'bilinear'}
    assert content.pop('pretrained_cfg') == {key: known[key] for key in known.keys() - {'tag', 'license'}}
    assert content.pop('label_names') == list('abcde')
    assert content == {key: stated[key] for key in content}


@pytest.mark.parametrize('pool', ['tok', 'gap'])
def test_sines_and_cosines_become_a_table(tmp_path, pool):
    model, params = network(pool=pool)
    _, tensors = write(tmp_path / 'out', model, params)
    assert tensors['pos_embed'].shape == (1, 9 + (pool == 'tok'), 16)
    again, same = hf_vit.load(tmp_path / 'out')
    images = {'images': np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)}
    logits = [one.apply({'params': weights}, images)[0] for one, weights in ((model, params), (again, same))]
    np.testing.assert_array_equal(*logits)


def test_ratios_that_are_cut_off(tmp_path):
    """timm's hidden width is int(width * mlp_ratio): 22 * (15 / 22) is 14.99."""
    model, params = network(hidden_size=22, intermediate_size=15, positions='learned')
    content, _ = write(tmp_path / 'out', model, params)
    assert int(22 * (15 / 22)) == 14 and int(22 * content['model_args']['mlp_ratio']) == 15


@pytest.mark.parametrize(
    'norm_position, changes, message',
    [
        ('mix', {}, 'norm_position=post*1,pre*2: timm has pre alone'),
        ('lns_branch', {}, 'norm_position=lns_branch*3: timm has pre alone'),
        ('pre+prores', {}, 'norm_position=pre+prores*3: timm has pre alone'),
        ('pre', {'representation': True}, 'representation=True: timm has no layer'),
        ('pre', {'norm_eps': 1e-12}, 'norm_eps=1e-12: timm has 1e-06'),
    ],
    ids=str,
)
def test_what_timm_cannot_express(tmp_path, norm_position, changes, message):
    model, params = network(norm_position, **changes)
    model = model.clone(trained_steps=10)  # amid a ramp
    with pytest.raises(UsageError) as error:
        hf_vit.save(tmp_path / 'out', model, params, layout='timm')
    assert f'config.model.{message}' in str(error.value) and 'leave out --format' in str(error.value)
    assert not (tmp_path / 'out').exists()


def test_stated_defaults(tmp_path):
    model, params = network(pool='tok', positions='learned')
    content, _ = write(tmp_path / 'out', model, params)
    for changes, refused in (
        ({'qk_norm': False, 'reg_tokens': 0, 'init_values': None}, ''),
        ({'reg_tokens': 4}, 'reg_tokens=4 is not modelled here'),
        ({'in_chans': 1}, 'in_chans=1 is not modelled here'),
        ({'qkv_bias': 1}, 'qkv_bias=1 is not modelled here'),
    ):
        (tmp_path / 'out/config.json').write_text(json.dumps(content | {'model_args': content['model_args'] | changes}))
        if not refused:
            hf_vit.load(tmp_path / 'out')
            continue
        with pytest.raises(CheckpointError, match=refused):
            hf_vit.load(tmp_path / 'out')

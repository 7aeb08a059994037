"""What transformers and timm compute from ViT folders, and we: needs torch, see requirements-parity.txt.

timm itself needs torchvision: its VisionTransformer.forward is written here, from its source.
"""

import dataclasses
import json

import hf_folders
import jax
import numpy as np
import optax
import pytest
import safetensors.torch
import torch
import transformers

from mixln_jax import config as configs
from mixln_jax.models import vit
from mixln_jax.models.hf import vit as hf_vit

SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=3, image_size=12)
IMAGES = np.random.default_rng(1).integers(0, 256, (3, 12, 12, 3)).astype(np.uint8)
LABELS = np.array([0, 3, 4])
PIXELS = torch.tensor(((IMAGES / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2), dtype=torch.float32)


def stock(**changes):
    """A network whose biases and gains are not those it starts with."""
    torch.manual_seed(0)
    keys = SIZES | dict(patch_size=4, num_labels=5, initializer_range=0.2, layer_norm_eps=1e-5)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**keys | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def ours_computes(model, params):
    """Logits, and the gradients of the mean cross-entropy by the names of a folder's tensors."""

    def loss(params):
        logits, _ = model.apply({'params': params}, {'images': IMAGES})
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean(), logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
    return np.asarray(logits), grads


def theirs_computes(model):
    """Logits, and the gradients in the parameters themselves."""
    found = model(pixel_values=PIXELS, labels=torch.tensor(LABELS))
    found.loss.backward()
    return found.logits.detach().numpy()


def compare_gradients(folder, model, grads, theirs):
    """Writes both gradients as weights, so that they are compared by name."""
    for name, write in (('ours', lambda at: hf_vit.save(at, model, grads)), ('theirs', None)):
        if write:
            write(folder / name)
        else:
            with torch.no_grad():
                for weight in theirs.parameters():
                    weight.copy_(weight.grad)
            theirs.save_pretrained(folder / name)
    ours, other = (safetensors.torch.load_file(folder / name / 'model.safetensors') for name in ('ours', 'theirs'))
    assert ours.keys() == other.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], other[name], rtol=0, atol=1e-5 * other[name].abs().max() + 1e-6)


@pytest.mark.parametrize('changes', [{}, {'hidden_act': 'gelu_pytorch_tanh'}, {'patch_size': 6}], ids=str)
def test_transformers_to_ours_and_back(tmp_path, changes):
    theirs = stock(**changes)
    theirs.save_pretrained(tmp_path / 'in')
    assert 'vit.encoder.layer.0.attention.attention.query.weight' in safetensors.torch.load_file(
        tmp_path / 'in/model.safetensors'
    )
    model, params = hf_vit.load(tmp_path / 'in')
    assert (model.config.norm_eps, model.config.pool, model.config.num_classes) == (1e-5, 'tok', 5)
    hf_vit.save(tmp_path / 'out', model, params)
    one, other = (safetensors.torch.load_file(tmp_path / name / 'model.safetensors') for name in ('in', 'out'))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'out')
    assert type(again) is transformers.ViTForImageClassification
    logits, grads = ours_computes(model, params)
    for network in (again, theirs):
        np.testing.assert_allclose(logits, theirs_computes(network), rtol=0, atol=1e-4)
    compare_gradients(tmp_path, model, grads, theirs)
    # The comparison must be able to fail: a bias of the last layer, moved a little.
    with torch.no_grad():
        next(weight for name, weight in again.named_parameters() if '2.mlp.fc1.bias' in name).add_(0.1)
        assert np.abs(logits - again(PIXELS).logits.numpy()).max() > 1e-3


def ours(norm_position='pre', **changes):
    keys = dict(
        family='vit', hidden_size=16, intermediate_size=24, num_heads=2, image_size=12, patch_size=4, num_classes=5
    )
    return hf_folders.network(norm_position, **keys | changes)


KINDS = [
    dict(),
    dict(pool='tok'),
    dict(positions='learned', representation=True),
    dict(positions='learned', pool='tok', representation=True, gelu='tanh'),
]


@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('name', ['pre', 'mix'])
def test_kinds_with_the_modelling_file(tmp_path, kind, name):
    check_with_modelling_file(tmp_path, *ours(name, **kind))


@pytest.mark.parametrize('name', hf_folders.PLACEMENTS)
def test_placements_with_the_modelling_file(tmp_path, name):
    check_with_modelling_file(tmp_path, *ours(name, pool='tok', positions='learned'))


def check_with_modelling_file(folder, model, params):
    hf_vit.save(folder / 'out', model, params)
    theirs = transformers.AutoModelForImageClassification.from_pretrained(
        folder / 'out', trust_remote_code=True, dtype=torch.float32
    ).eval()
    logits, grads = ours_computes(model, params)
    scale = max(1.0, np.abs(logits).max())
    np.testing.assert_allclose(logits, theirs_computes(theirs), rtol=0, atol=1e-4 * scale)
    if hf_vit.is_stock(model):
        return
    theirs.save_pretrained(folder / 'theirs')
    again, same = hf_vit.load(folder / 'out')
    config = dataclasses.replace(model.config, norm_position=again.config.norm_position)  # post*3 is post
    assert again == model.clone(config=config)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    expected = {name: weight.grad for name, weight in theirs.named_parameters()}
    hf_vit.save(folder / 'grads', model, grads)
    found = safetensors.torch.load_file(folder / 'grads/model.safetensors')
    assert found.keys() == expected.keys()
    largest = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in expected.items():  # after a saturated softmax a gradient is a small difference of large ones
        np.testing.assert_allclose(found[name], grad, rtol=0, atol=1e-5 * largest)


# --- timm 1.0.31, models/vision_transformer.py: VisionTransformer.forward_features and forward_head


def timm_tensors(token, representation=False, D=192, L=2, F=768, C=5):
    """A state_dict of `vit_tiny_patch4_12`, with random tensors."""
    torch.manual_seed(0)
    shapes = {'patch_embed.proj.weight': (D, 3, 4, 4), 'patch_embed.proj.bias': (D,), 'pos_embed': (1, 9 + token, D)}
    shapes |= {'cls_token': (1, 1, D)} if token else {}
    linear = lambda name, rows, columns: {f'{name}.weight': (rows, columns), f'{name}.bias': (rows,)}  # noqa: E731
    norms = ['norm'] + [f'blocks.{number}.norm{at}' for number in range(L) for at in (1, 2)]
    shapes |= {f'{name}.{leaf}': (D,) for name in norms for leaf in ('weight', 'bias')}
    for number in range(L):
        block = f'blocks.{number}'
        shapes |= linear(f'{block}.attn.qkv', 3 * D, D) | linear(f'{block}.attn.proj', D, D)
        shapes |= linear(f'{block}.mlp.fc1', F, D) | linear(f'{block}.mlp.fc2', D, F)
    shapes |= linear('head', C, D)
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


def timm_forward(w, x, heads, token):
    F = torch.nn.functional
    linear = lambda name, x: F.linear(x, w[f'{name}.weight'], w[f'{name}.bias'])  # noqa: E731
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'], 1e-6)  # noqa: E731
    x = F.conv2d(x, w['patch_embed.proj.weight'], w['patch_embed.proj.bias'], stride=4).flatten(2).transpose(1, 2)
    if token:
        x = torch.cat([w['cls_token'].expand(len(x), -1, -1), x], dim=1)
    x = x + w['pos_embed']
    for number in range(2):
        block = f'blocks.{number}'
        B, N, D = x.shape
        qkv = linear(f'{block}.attn.qkv', norm(f'{block}.norm1', x)).reshape(B, N, 3, heads, D // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)
        x = x + linear(f'{block}.attn.proj', y)
        x = x + linear(f'{block}.mlp.fc2', F.gelu(linear(f'{block}.mlp.fc1', norm(f'{block}.norm2', x))))
    x = norm('norm', x)
    return linear('head', x[:, 0] if token else x.mean(dim=1))


def timm_folder(folder, token, **changes):
    config = {'architecture': 'vit_tiny_patch4_12', 'num_classes': 5, 'global_pool': 'token' if token else 'avg'}
    config['pretrained_cfg'] = {'mean': [0.5] * 3, 'std': [0.5] * 3, 'input_size': [3, 12, 12]}
    config |= {} if token else {'model_args': {'class_token': False, 'global_pool': 'avg', 'fc_norm': False}}
    weights = timm_tensors(token)
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config | changes))
    safetensors.torch.save_file(weights, folder / 'model.safetensors')
    return weights


@pytest.mark.parametrize('token', [True, False])
def test_timm(tmp_path, token):
    weights = timm_folder(tmp_path / 'timm', token)
    model, params = hf_vit.load(tmp_path / 'timm')
    assert (model.config.pool, model.config.image_size, model.config.num_heads) == ('tok' if token else 'gap', 12, 3)
    logits, grads = ours_computes(model, params)
    for weight in weights.values():
        weight.requires_grad_()
    found = timm_forward(weights, PIXELS, 3, token)
    np.testing.assert_allclose(logits, found.detach(), rtol=0, atol=1e-4)
    torch.nn.functional.cross_entropy(found, torch.tensor(LABELS)).backward()
    gradients = {name: tensor.grad for name, tensor in weights.items()}
    safetensors.torch.save_file(gradients, tmp_path / 'timm/model.safetensors')
    _, expected = hf_vit.load(tmp_path / 'timm')
    for grad, other in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(grad, other, rtol=0, atol=1e-5 * np.abs(other).max() + 1e-6)


@pytest.mark.parametrize('before, after', [(3, 5), (7, 4)])
def test_positions_are_resized_as_timm_does(before, after):
    """Its resample_abs_pos_embed with one token before the patches."""
    table = np.random.default_rng(0).normal(size=(1 + before**2, 6)).astype(np.float32)
    grid = torch.tensor(table[1:]).reshape(1, before, before, 6).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(grid, size=(after, after), mode='bicubic', antialias=True)
    found = vit.resized_positions(table, before, after)
    np.testing.assert_array_equal(found[0], table[0])
    np.testing.assert_allclose(found[1:], resized.permute(0, 2, 3, 1).reshape(-1, 6), rtol=0, atol=1e-5)


def test_their_processor_prepares_what_ours_does(tmp_path):
    """On an image that needs no resizing, with the crop that a run states."""
    model, params = ours('pre', pixels='imagenet')
    hf_vit.save(tmp_path / 'out', model, params, images=configs.Images(eval_crop=0.75))
    content = json.loads((tmp_path / 'out/preprocessor_config.json').read_text())
    assert content['size'] == {'shortest_edge': 16} and content['crop_size'] == {'height': 12, 'width': 12}
    image = np.random.default_rng(0).integers(0, 256, (16, 20, 3)).astype(np.uint8)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / 'out')
    found = np.asarray(processor(image, return_tensors='np')['pixel_values'])[0].transpose(1, 2, 0)
    expected = vit.normalized(image[2:14, 4:16], 'imagenet')
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

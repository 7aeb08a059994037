"""ViT against an independent float64 reference, for every placement; patches, positions and initial weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models import families, placements, transformer, vit
from mixln_jax.system.errors import UsageError

SIZES = dict(
    family='vit', hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, image_size=12, patch_size=4,
    num_classes=5, norm_position='pre',
)  # fmt: skip
IMAGES = np.random.default_rng(1).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)
EPS = 1e-6


def network(**changes):
    """A network and random parameters, float32; gains about 1."""
    model = families.from_config(configs.Model(**(SIZES | changes)), 'float32')
    rng = np.random.default_rng(0)
    draw = lambda path, leaf: rng.normal(path[-1].key == 'scale', 0.3, leaf.shape).astype(np.float32)  # noqa: E731
    return model, jax.tree_util.tree_map_with_path(draw, model.shapes()['params'])


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, images, layer_mask=None):
    logits, out = model.apply({'params': params}, {'images': images}, layer_mask, capture=True)
    return logits, out['hidden']


# --- The reference, from Dosovitskiy et al. (arXiv 2010.11929), equations 1 to 4, and Vaswani et al.


def layer_norm(x, w, groups=1):
    """Ba et al., arXiv 1607.06450; over each of `groups` parts."""
    out = []
    for part in np.split(x, groups, axis=-1):
        centred = part - part.mean(-1, keepdims=True)
        out.append(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS))
    return np.concatenate(out, -1) * w['scale'] + w['bias']


def linear(x, w):
    return x @ w['kernel'] + w['bias']


def attention(x, w, heads):
    outputs = []
    for head in range(heads):
        part = slice(head * x.shape[-1] // heads, (head + 1) * x.shape[-1] // heads)
        q, k, v = (linear(x, w[name])[..., part] for name in 'qkv')
        if 'q_norm' in w:
            q, k, v = (layer_norm(a, w[f'{name}_norm']) for a, name in ((q, 'q'), (k, 'k'), (v, 'v')))
        p = np.exp(q @ np.swapaxes(k, 1, 2) / np.sqrt(q.shape[-1]))
        outputs.append(p / p.sum(-1, keepdims=True) @ v)
    return linear(np.concatenate(outputs, -1), w['o'])


def mlp(x, w, gelu):
    h = linear(x, w['up'])
    if gelu == 'tanh':
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    else:
        h = h * 0.5 * (1 + np.vectorize(math.erf)(h / np.sqrt(2)))
    return linear(h, w['down'])


def sines(grid, width):
    """positions of patches one by one, as big_vision's posemb_sincos_2d."""
    table = np.zeros((grid * grid, width))
    quarter = width // 4
    for row in range(grid):
        for column in range(grid):
            for i in range(quarter):
                frequency = 1 / 10_000 ** (i / (quarter - 1))
                values = math.sin(column * frequency), math.cos(column * frequency)
                values += math.sin(row * frequency), math.cos(row * frequency)
                table[row * grid + column, i::quarter] = values
    return table


def expected(model, params, images, keep=None):
    """(logits, [L+1,B,T,D]) in float64."""
    config = model.config
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    mean, deviation = {
        'half': (np.full(3, 0.5), np.full(3, 0.5)),
        'imagenet': (np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])),
    }[config.pixels]
    x, size = (images / 255.0 - mean) / deviation, config.patch_size
    corners = [(row, column) for row in range(0, x.shape[1], size) for column in range(0, x.shape[2], size)]
    x = np.stack([x[:, r : r + size, c : c + size].reshape(len(x), -1) for r, c in corners], axis=1)
    x = linear(x, params['patch'])
    if config.positions == 'sincos2d':
        x = x + sines(config.image_size // size, config.hidden_size)
    if config.pool == 'tok':
        x = np.concatenate([np.broadcast_to(params['token']['embedding'], (len(x), 1, x.shape[-1])), x], axis=1)
    if config.positions == 'learned':
        x = x + params['positions']['embedding']
    if 'embed_norm' in params:
        x = layer_norm(x, params['embed_norm'])
    hidden = [x]
    for l, w in enumerate(transformer.split_layers(params['layers'], model.norm_position), 1):
        vectors = {
            f'{sub}_{at}': w.get(f'{sub}_norm_{at}') for sub in ('attention', 'mlp') for at in ('in', 'out', 'post')
        }
        vectors |= {name.removesuffix('_scale'): leaf for name, leaf in w.items() if name.endswith('_scale')}
        rule = reference.PLACEMENTS[model.norm_position[l - 1]]
        attend = lambda x, w=w: attention(x, w['attention'], config.num_heads)  # noqa: E731
        feed = lambda x, w=w: mlp(x, w['mlp'], config.gelu)  # noqa: E731
        y = rule(x, vectors, attend, feed, layer_norm, l, config.num_layers)
        x = y if keep is None or keep[l - 1] else x
        hidden.append(x)
    x = layer_norm(x, params['norm'])
    x = x[:, 0] if config.pool == 'tok' else x.mean(1)
    if config.representation:
        x = np.tanh(linear(x, params['representation']))
    return linear(x, params['classes']), np.stack(hidden)


@pytest.mark.parametrize('name', [*placements.PLACEMENTS, 'mix'])
def test_placements(name):
    model, params = network(norm_position=name)
    logits, hidden = forward(model, params, IMAGES)
    wanted, stream = expected(model, params, IMAGES)
    np.testing.assert_allclose(hidden, stream, rtol=1e-5, atol=1e-5 * np.abs(stream).max())
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize(
    'changes',
    [
        dict(pool='tok'),
        dict(positions='learned'),
        dict(pool='tok', positions='learned', pixels='imagenet'),
        dict(representation=True, gelu='tanh'),
    ],
    ids=str,
)
def test_kinds(changes):
    model, params = network(**changes)
    wanted, stream = expected(model, params, IMAGES)
    logits, hidden = forward(model, params, IMAGES)
    np.testing.assert_allclose(hidden, stream, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-4)
    assert hidden.shape[2] == model.row_length(0) == 9 + ('pool' in changes)


@pytest.mark.parametrize('keep', [(True, False, True), (False, False, False)])
def test_removed_layers(keep):
    model, params = network(norm_position='mix', post_ratio=0.34)
    logits, _ = forward(model, params, IMAGES, np.array(keep))
    np.testing.assert_allclose(logits, expected(model, params, IMAGES, keep)[0], rtol=1e-5, atol=1e-4)


def test_every_parameter_matters():
    model, params = network(pool='tok', positions='learned', representation=True)
    before, _ = forward(model, params, IMAGES)
    for name, leaf in trees.named_leaves(params):
        moved = jax.tree_util.tree_map_with_path(
            lambda path, other, name=name, leaf=leaf: leaf * 1.1 + 0.1 if trees.path_name(path) == name else other,
            params,
        )
        differ = np.abs(forward(model, moved, IMAGES)[0] - before).max()
        # What a bias adds to all keys alike, the softmax takes away.
        assert (differ < 1e-5) if name.endswith('attention/k/bias') else (differ > 1e-3), name


def test_integers_and_fractions_are_the_same_pixels():
    model, params = network()
    floats, _ = forward(model, params, IMAGES.astype(np.float32))
    np.testing.assert_array_equal(forward(model, params, IMAGES)[0], floats)


def test_initial_weights():
    model, _ = network(pool='tok', positions='learned', representation=True, hidden_size=64, init='xavier')
    params = dict(trees.named_leaves(model.init(jax.random.key(0))['params']))
    assert not params['classes/kernel'].any() and not params['token/embedding'].any()
    assert np.std(params['patch/kernel']) == pytest.approx(48**-0.5, rel=0.05)
    assert np.std(params['representation/kernel']) == pytest.approx(1 / 8, rel=0.05)
    assert np.std(params['positions/embedding']) == pytest.approx(0.02, rel=0.1)
    up = params['layers/segment_0/mlp/up/kernel']
    assert up.shape == (3, 64, 24)
    limit = (6 / (64 + 24)) ** 0.5  # Glorot and Bengio 2010, equation 16
    assert limit > np.abs(up).max() > 0.99 * limit and np.std(up) == pytest.approx(limit / 3**0.5, rel=0.03)
    normal = dict(trees.named_leaves(network()[0].init(jax.random.key(0))['params']))
    assert np.std(normal['layers/segment_0/mlp/up/kernel']) == pytest.approx(0.02, rel=0.05)


def test_equal_matrices_under_every_placement():
    def layers(name):
        model, _ = network(norm_position=name)
        return transformer.split_layers(model.init(jax.random.key(3))['params']['layers'], model.norm_position)

    for one, other in zip(layers('pre'), layers('mix'), strict=True):
        np.testing.assert_array_equal(one['mlp']['up']['kernel'], other['mlp']['up']['kernel'])


def test_flops():
    model, params = network()
    shapes = model.shapes()['params']
    head = 16 * 5 + 5
    body = sum(leaf.size for leaf in jax.tree.leaves(shapes)) - head
    # 6 for each weight and patch, 12 T D for each layer and patch; the head multiplies once for each image
    assert model.flops_per_position(shapes, 0) * 9 == pytest.approx(9 * (6 * body + 12 * 3 * 9 * 16) + 6 * head, abs=9)


def test_refused():
    def refused(match, **changes):
        with pytest.raises(UsageError, match=match):
            families.from_config(configs.Model(**(SIZES | changes)))

    refused('image_size=12 is not divisible by config.model.patch_size=5', patch_size=5)
    refused('hidden_size=18 must be a multiple of 4', hidden_size=18)
    refused('vocab_size=7 has no meaning for config.model.family=vit', vocab_size=7)
    refused('rope_theta=2.0 has no meaning for config.model.family=vit', rope_theta=2.0)
    refused('num_classes=5 has no meaning for config.model.family=llama', family='llama', image_size=224, patch_size=16)
    model, params = network()
    with pytest.raises(UsageError, match='images of 8 x 12 x 3, but the network is for 12 x 12 x 3'):
        model.apply({'params': params}, {'images': jnp.zeros((1, 8, 12, 3))})


def test_patches_are_rows_of_the_image():
    image = np.arange(6 * 6 * 3).reshape(1, 6, 6, 3)
    cut = vit.patches(jnp.asarray(image), 3)
    np.testing.assert_array_equal(cut[0, 1], image[0, :3, 3:].reshape(-1))
    np.testing.assert_array_equal(cut[0, 2], image[0, 3:, :3].reshape(-1))

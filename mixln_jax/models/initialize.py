"""Initial weights, for any network over the shared stack.

Every matrix is drawn from a key made of (seed, leaf name, layer), so equal seeds give equal matrices under every
placement: runs that compare placements start from the same weights.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax.models import placements

OUTPUTS = ('attention/o/kernel', 'mlp/down/kernel')  # what a sub-layer adds to the stream
QUERY_KEY = ('attention/q/kernel', 'attention/k/kernel')


def initialize(
    key: jax.Array,
    shapes: Any,
    config: configs.Model,
    norm_position: Sequence[str],
    depth: int,
    padded: Mapping[str, int],
    stds: Mapping[str, float],
) -> Any:
    """Fills a tree of parameter shapes.

    Args:
        key: a JAX random key.
        shapes: the parameters as ShapeDtypeStructs: `layers/segment_<i>/...` stacked, everything else single.
        config: config.Model: init, init_std, embed_std, vocab_size.
        norm_position: placement name of each layer.
        depth: L in the constants of `scaled` and `deepnorm`.
        padded: {path: axis} of the leaves with an axis over the vocabulary; entries beyond vocab_size are zero.
        stds: {path: standard deviation} of leaves outside the layers that are not drawn as the others.

    Returns:
        The tree of arrays. Norm gains are 1, biases 0; `scaled` divides sub-layer outputs by sqrt(2L) (GPT-2);
        `deepnorm` is xavier-normal with gain (8L)^(-1/4), 1 for query and key (DeepNet, arXiv 2203.00555, section 3.1);
        `deepnorm_official` has its inverse, as the Mix-LN authors' code; `xavier` is uniform with the variance of
        xavier-normal (Glorot and Bengio 2010), in all matrices of the layers.
    """
    runs = placements.layer_runs(norm_position)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        names = [part.key for part in path]
        if names[-1] in ('scale', 'bias'):
            return jnp.full(shape.shape, names[-1] == 'scale', shape.dtype)
        if names[0] == 'layers':
            name, first, end = runs[int(names[1].removeprefix('segment_'))]
            if names[-1].endswith('_scale'):
                sublayer, by = names[-1].split('_', 1)
                start = getattr(placements.PLACEMENTS[name], sublayer).factors()[by].start
                return jnp.full(shape.shape, start, shape.dtype)
            std = _std('/'.join(names[2:]), shape.shape[1:], config, placements.PLACEMENTS[name].init, depth)
            drawn = _uniform if config.init == 'xavier' else _normal
            draw = lambda number: drawn(leaf_key(key, '/'.join(names[2:]), number), shape.shape[1:], shape.dtype)  # noqa: E731
            return jax.vmap(draw)(jnp.arange(first + 1, end + 1)) * std
        std = stds.get('/'.join(names), config.embed_std if names[-1] == 'embedding' else config.init_std)
        vocab_axis = padded.get('/'.join(names))
        used = tuple(config.vocab_size if axis == vocab_axis else size for axis, size in enumerate(shape.shape))
        values = _normal(leaf_key(key, '/'.join(names), 0), used, shape.dtype) * std
        return jnp.pad(values, [(0, size - n) for size, n in zip(shape.shape, used, strict=True)])

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def leaf_key(key: jax.Array, name: str, layer: Any) -> jax.Array:
    """Returns the random key of a leaf of a layer, from 1; 0: of a leaf outside the layers."""
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), layer)


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Returns numbers of variance 1, evenly spread."""
    return jax.random.uniform(key, shape, jnp.float32, -(3**0.5), 3**0.5).astype(dtype)


def _std(name: str, shape: tuple[int, ...], config: configs.Model, placement_init: str, depth: int) -> float:
    init = config.init if config.init != 'auto' else placement_init or 'normal'
    if init in ('deepnorm', 'deepnorm_official'):
        gain = 1.0 if name in QUERY_KEY else (8 * depth) ** (-0.25 if init == 'deepnorm' else 0.25)
        return gain * (2 / (shape[0] + shape[1])) ** 0.5
    if init == 'xavier':
        return (2 / (shape[0] + shape[1])) ** 0.5
    if init == 'scaled' and name in OUTPUTS:
        return config.init_std / (2 * depth) ** 0.5
    return config.init_std

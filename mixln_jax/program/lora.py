"""Adapters of low rank (Hu et al. 2022, LoRA, arXiv 2106.09685): leaves of a network next to the matrices they adapt.

`lora_a` A [n, in, r], `lora_b` B [n, r, out] and `lora_scale` s [n] stand next to `kernel` W [n, in, out], for each of
the n layers of a run; `models.layers.Linear` computes x W + (x A) B s. s = alpha / r is a leaf, so that a network says
itself what it computes.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models.initialize import leaf_key
from mixln_jax.system.errors import UsageError, nearest

TRAINED = ('lora_a', 'lora_b')
LEAVES = (*TRAINED, 'lora_scale')


def is_adapter(name: str) -> bool:
    """Returns whether a leaf is of an adapter, by its name."""
    return name.rpartition('/')[2] in LEAVES


def base(network: Any) -> dict[str, Any]:
    """Returns the leaves of a network without those of adapters."""
    return trees.split(network, is_adapter)[1]


def with_adapters(network: Any, tune: configs.Tune, key: jax.Array) -> dict[str, Any]:
    """Returns a network with new adapters, which add nothing yet.

    A is uniform in +-1/sqrt(in), which is what peft draws (Kaiming uniform with a = sqrt(5)), from (key, matrix,
    layer); B is 0.

    Raises UsageError, naming the key, for a matrix that no layer has and for a rank larger than a matrix.
    """
    found = list(_matrices(network))
    chosen, rank = _chosen([matrix for _, matrix, _, _ in found], tune.matrices), tune.rank
    adapters: list[tuple[str, jax.Array]] = []
    for path, matrix, first, kernel in found:
        layers, width, out = kernel.shape
        if matrix not in chosen:
            continue
        if rank > min(width, out):
            raise UsageError(f'config.tune.rank={rank} is larger than the matrix {matrix} [{width}, {out}]')

        def draw(layer: jax.Array, matrix: str = matrix, width: int = width) -> jax.Array:
            bound = width**-0.5
            return jax.random.uniform(
                leaf_key(key, f'{matrix}/lora_a', layer), (width, rank), minval=-bound, maxval=bound
            )

        adapters += [
            (f'{path}/lora_a', jax.vmap(draw)(jnp.arange(first, first + layers))),
            (f'{path}/lora_b', jnp.zeros((layers, rank, out))),
            (f'{path}/lora_scale', jnp.full(layers, tune.alpha / rank)),
        ]
    return trees.join(network, trees.nested(adapters))


def merged(network: Any) -> Any:
    """Returns a network with W + A B s in place of W and its adapters; without adapters, as it is."""
    leaves = dict(trees.named_leaves(network))
    if not any(map(is_adapter, leaves)):
        return network

    def plain(name: str, leaf: Any) -> Any:
        parent, _, last = name.rpartition('/')
        if last != 'kernel' or f'{parent}/lora_a' not in leaves:
            return leaf
        A, B, scale = (jnp.asarray(leaves[f'{parent}/{part}'], jnp.float32) for part in LEAVES)
        return leaf.astype(jnp.float32) + jnp.matmul(A, B, precision='highest') * scale[:, None, None]

    return trees.nested((name, plain(name, leaf)) for name, leaf in leaves.items() if not is_adapter(name))


def dropout(network: Any, rate: float, keys: jax.Array) -> dict[str, Any]:
    """Returns the collection `dropout` of a network with adapters; see `models.layers.Linear`.

    Args:
        network: its parameters.
        rate: share of the adapters' input that is dropped.
        keys: [B], of the examples of a batch in an update: what is dropped depends on (key, matrix, layer) alone.
    """
    found: list[tuple[str, jax.Array]] = []
    leaves = dict(trees.named_leaves(network))
    for path, matrix, first, kernel in _matrices(network):
        if f'{path}/lora_a' not in leaves:
            continue
        by_example = jax.vmap(lambda key, layer, matrix=matrix: leaf_key(key, matrix, layer), (0, None))
        by_layer = jax.vmap(by_example, (None, 0))(keys, jnp.arange(first, first + len(kernel)))
        found.append((f'{path}/keys', jax.random.key_data(by_layer)))
        found.append((f'{path}/keep', jnp.full(len(kernel), 1 - rate)))
    return trees.nested(found)


def _matrices(network: Any) -> Iterator[tuple[str, str, int, Any]]:
    """Yields (path of a stacked matrix, its name in a layer, number of its first layer from 1, kernel [n, in, out])."""
    first = 1
    for number, run in enumerate(trees.layer_runs(network)):
        length = len(jax.tree.leaves(run)[0])
        for name, leaf in trees.named_leaves(run):
            matrix, _, last = name.rpartition('/')
            if last == 'kernel':
                yield f'{trees.STACKED}/segment_{number}/{matrix}', matrix, first, leaf
        first += length


def _chosen(matrices: list[str], wanted: str) -> set[str]:
    """Returns the names that `config.tune.matrices` names in full or by their end."""
    if wanted == 'all':
        return {*matrices}
    chosen: set[str] = set()
    for name in (part.strip() for part in wanted.split(',')):
        matching = {matrix for matrix in matrices if f'/{matrix}'.endswith(f'/{name}')} if name else set()
        if not matching:
            known = sorted({*matrices})
            raise UsageError(
                f'config.tune.matrices={wanted}: no layer has a matrix {name!r}{nearest(name, known)}; '
                f'there are {", ".join(known)}'
            )
        chosen |= matching
    return chosen

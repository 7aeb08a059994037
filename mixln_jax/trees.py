"""Parameter trees: names of leaves, parts of a tree, and which leaves are stacked over layers."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

STACKED = 'layers'  # params['layers']['segment_<i>']: every leaf has a leading axis over the layers of the segment


def path_name(path: tuple) -> str:
    """Returns a JAX key path joined by slashes, such as `layers/segment_0/mlp/up/kernel`."""
    return '/'.join(str(getattr(part, 'key', getattr(part, 'name', getattr(part, 'idx', '')))) for part in path)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Returns [(name, leaf)] in the tree's order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def nested(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the tree of nested dicts that has these (name, leaf); the inverse of `named_leaves`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves:
        *groups, last = name.split('/')
        parent = tree
        for group in groups:
            parent = parent.setdefault(group, {})
        parent[last] = leaf
    return tree


def split(tree: Any, chosen: Callable[[str], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns (the leaves whose name is `chosen`, the others) of nested dicts, both as nested dicts; see `join`."""
    leaves = named_leaves(tree)
    return (
        nested((name, leaf) for name, leaf in leaves if chosen(name)),
        nested((name, leaf) for name, leaf in leaves if not chosen(name)),
    )


def join(tree: Any, other: Any) -> Any:
    """Returns the tree of the leaves of both of two trees of nested dicts, which share none; None stands for no leaves.

    It computes nothing.
    """
    if other is None:
        return tree
    return nested([*named_leaves(tree), *named_leaves(other)])


def layer_runs(params: Any) -> list[Any]:
    """Returns the stacked runs of equal layers of a parameter tree, in layer order."""
    stack = params[STACKED]
    return [stack[f'segment_{number}'] for number in range(len(stack))]


def layer_norms(tree: Any, network: Any = None) -> tuple[jax.Array, jax.Array]:
    """Returns (Euclidean norm of each layer `[L]`, norm of the whole tree).

    Args:
        tree: parameters or their gradients.
        network: all parameters, where `tree` has a part of them alone: layers without a leaf in it have norm 0.
    """
    squares = jax.tree.map(lambda leaf: jnp.square(leaf.astype(jnp.float32)), tree)
    layers = []
    for number, run in enumerate(layer_runs(tree if network is None else network)):
        leaves = jax.tree.leaves(squares.get(STACKED, {}).get(f'segment_{number}'))
        norms = [leaf.sum(axis=range(1, leaf.ndim)) for leaf in leaves]
        layers.append(sum(norms) if norms else jnp.zeros(len(jax.tree.leaves(run)[0])))
    by_layer = jnp.concatenate(layers)
    rest = sum(leaf.sum() for name, leaf in named_leaves(squares) if not name.startswith(f'{STACKED}/'))
    return jnp.sqrt(by_layer), jnp.sqrt(by_layer.sum() + rest)


def layer_sizes(tree: Any, network: Any) -> list[int]:
    """Returns the number of values of each layer [L] that `tree` has, a part of `network` or all of it."""
    sizes: list[int] = []
    for number, run in enumerate(layer_runs(network)):
        count = jax.tree.leaves(run)[0].shape[0]
        leaves = jax.tree.leaves(tree.get(STACKED, {}).get(f'segment_{number}'))
        sizes += [sum(leaf.size for leaf in leaves) // count] * count
    return sizes


def matrix_norms(tree: Any) -> dict[str, jax.Array]:
    """Returns the Euclidean norm of every matrix by name: `[L]` for a matrix that all layers have, else a scalar.

    `tree`: parameters or their gradients.
    """
    stacked: dict[str, list[jax.Array]] = {}
    single: dict[str, jax.Array] = {}
    for name, leaf in named_leaves(tree):
        inner = name.split('/', 2)[2] if name.startswith(f'{STACKED}/') else ''
        if inner.endswith('/kernel'):
            norms = jnp.sqrt(jnp.square(leaf.astype(jnp.float32)).sum((-2, -1)))
            stacked.setdefault(inner.removesuffix('/kernel'), []).append(norms)
        elif not inner:
            single[name.split('/')[0]] = jnp.linalg.norm(leaf.astype(jnp.float32))
    return {name: jnp.concatenate(norms) for name, norms in stacked.items()} | single

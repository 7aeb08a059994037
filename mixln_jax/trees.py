"""Parameter trees: names of leaves, and which leaves are stacked over layers."""

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


def layer_runs(params: Any) -> list[Any]:
    """Returns the stacked runs of equal layers of a parameter tree, in layer order."""
    stack = params[STACKED]
    return [stack[f'segment_{number}'] for number in range(len(stack))]


def layer_norms(tree: Any) -> tuple[jax.Array, jax.Array]:
    """Returns (Euclidean norm of each layer `[L]`, norm of the whole tree).

    `tree`: parameters or their gradients.
    """
    squares = jax.tree.map(lambda leaf: jnp.square(leaf.astype(jnp.float32)), tree)
    layers = [
        sum(leaf.sum(axis=range(1, leaf.ndim)) for leaf in jax.tree.leaves(segment)) for segment in layer_runs(squares)
    ]
    by_layer = jnp.concatenate(layers)
    rest = sum(leaf.sum() for name, leaf in named_leaves(squares) if not name.startswith(f'{STACKED}/'))
    return jnp.sqrt(by_layer), jnp.sqrt(by_layer.sum() + rest)


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

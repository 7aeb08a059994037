"""Parameter trees: names of leaves, and which leaves are stacked over layers."""

import jax
import jax.numpy as jnp

from mixln_jax import trees

STACKED = 'layers'  # params['layers']['segment_<i>']: every leaf has a leading axis over the layers of the segment


def path_name(path):
    """A JAX key path joined by slashes, `layers/segment_0/mlp/up/kernel`."""
    return '/'.join(str(getattr(part, 'key', getattr(part, 'name', getattr(part, 'idx', '')))) for part in path)


def named_leaves(tree):
    """[(name, leaf)] in the tree's order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def layer_runs(params):
    """The stacked segments of a parameter tree, in layer order."""
    stack = params[STACKED]
    return [stack[f'segment_{number}'] for number in range(len(stack))]


def layer_norms(tree):
    """Euclidean norm of each layer's leaves.

    Args:
        tree: parameters or their gradients, `layers/segment_<i>/...` stacked.

    Returns:
        ([L] norms, norm of the whole tree).
    """
    squares = jax.tree.map(lambda leaf: jnp.square(leaf.astype(jnp.float32)), tree)
    layers = [
        sum(leaf.sum(axis=range(1, leaf.ndim)) for leaf in jax.tree.leaves(segment))
        for segment in trees.layer_runs(squares)
    ]
    by_layer = jnp.concatenate(layers)
    rest = sum(leaf.sum() for name, leaf in trees.named_leaves(squares) if not name.startswith(f'{trees.STACKED}/'))
    return jnp.sqrt(by_layer), jnp.sqrt(by_layer.sum() + rest)


def matrix_norms(tree):
    """Euclidean norm of every matrix, {name: [L], of a matrix in all layers; scalar, of one outside them}.

    Args:
        tree: parameters or their gradients, `layers/segment_<i>/...` stacked.
    """
    found = {}
    for name, leaf in trees.named_leaves(tree):
        inside = name.split('/', 2)[2] if name.startswith(f'{trees.STACKED}/') else ''
        if inside.endswith('/kernel'):
            norms = jnp.sqrt(jnp.square(leaf.astype(jnp.float32)).sum((-2, -1)))
            found.setdefault(inside.removesuffix('/kernel'), []).append(norms)
        elif not inside:
            found[name.split('/')[0]] = jnp.linalg.norm(leaf.astype(jnp.float32))
    return {name: jnp.concatenate(norms) if isinstance(norms, list) else norms for name, norms in found.items()}

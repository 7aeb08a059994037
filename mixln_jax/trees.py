"""Parameter trees: names of leaves, and which leaves are stacked over layers."""

import jax

STACKED = 'layers'  # params['layers']['segment_<i>']: every leaf has a leading axis over the layers of the segment


def path_name(path):
    """A JAX key path joined by slashes, `layers/segment_0/mlp/up/kernel`."""
    return '/'.join(str(getattr(part, 'key', getattr(part, 'name', getattr(part, 'idx', '')))) for part in path)


def named_leaves(tree):
    """[(name, leaf)] in the tree's order."""
    return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def segments(params):
    """The stacked segments of a parameter tree, in layer order."""
    stack = params[STACKED]
    return [stack[f'segment_{number}'] for number in range(len(stack))]

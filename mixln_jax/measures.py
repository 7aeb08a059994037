"""Measures of layers, pure functions of arrays, in float32."""

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import trees


def angular_distance(u, v):
    """Angle between vectors as a share of pi: 0 parallel, 1/2 orthogonal, 1 opposite (Gromov et al. 2024, eq. 4).

    arccos(cosine) / pi, computed as (2/pi) atan2(|p-q|, |p+q|) with unit p and q, which is exact at 0, 1/2 and 1, where
    float32 arccos is off by 1e-4.

    Args:
        u, v: [..., D].

    Returns:
        [...] in [0, 1].
    """
    p, q = (_unit(a.astype(jnp.float32)) for a in (u, v))
    return 2 / jnp.pi * jnp.arctan2(jnp.linalg.norm(p - q, axis=-1), jnp.linalg.norm(p + q, axis=-1))


def neighbour_distances(hidden, weights):
    """Mean angular distance of the residual stream before and after each layer.

    Args:
        hidden: [L+1,B,T,D], the raw stream.
        weights: [B,T], 1 at positions that count.

    Returns:
        (sum [L], count): the mean is sum / count.
    """
    distances = angular_distance(hidden[:-1], hidden[1:])
    return jnp.sum(distances * weights, axis=(1, 2)), weights.sum()


def distance_matrix(hidden, weights):
    """Mean angular distance of the residual stream between any two depths (Gromov et al. 2024, section 3).

    Args:
        hidden: [L+1,B,T,D], the raw stream: 0 is what layer 1 sees, l what layer l gives.
        weights: [B,T], 1 at positions that count.

    Returns:
        (sum [L+1,L+1], count): the mean is sum / count; element (l, l+n) spans n layers.
    """
    rows = jax.lax.map(lambda one: (angular_distance(one, hidden) * weights).sum((1, 2)), hidden)
    return rows, weights.sum()


def branch_variances(branches, weights, width):
    """Var[F] of what every sub-layer adds to the stream, over all features of the positions that count.

    Args:
        branches: `norm` and `mean` [L,2,B,T]; see `trunk`.
        weights: [B,T], 1 at positions that count.
        width: D.

    Returns:
        [2L]: attention and MLP of layer 1, of layer 2 and so on.
    """
    over = lambda values: (values * weights).sum((-2, -1)) / weights.sum()  # noqa: E731
    return (over(jnp.square(branches['norm'])) / width - jnp.square(over(branches['mean']))).reshape(-1)


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
        for segment in trees.segments(squares)
    ]
    by_layer = jnp.concatenate(layers)
    rest = sum(leaf.sum() for name, leaf in trees.named_leaves(squares) if not name.startswith(f'{trees.STACKED}/'))
    return jnp.sqrt(by_layer), jnp.sqrt(by_layer.sum() + rest)


def unigram_entropy(counts):
    """Entropy in nats of the tokens that were counted: the loss of a network that knows their frequencies alone.

    With Miller and Madow's correction for a small sample (Miller 1955): + (tokens seen at all - 1) / 2N.
    """
    counts = np.asarray(counts, np.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() + (len(share) - 1) / (2 * counts.sum()))


def _unit(a):
    length = jnp.linalg.norm(a, axis=-1, keepdims=True)
    return a / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)  # a frozen row of an embedding is zero

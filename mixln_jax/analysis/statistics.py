"""Measures of layers: pure functions of arrays.

What is averaged over tokens comes as a sum and a count of every row of text, in float32; `mean_and_error` makes means
of them in float64, so that no mean depends on how rows are batched.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


def angular_distance(u: jax.Array, v: jax.Array) -> jax.Array:
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


def distance_matrix(hidden: jax.Array, weights: jax.Array) -> jax.Array:
    """Angular distances of the residual stream between any two depths (Gromov et al. 2024, section 3; Mix-LN Figure 2).

    Args:
        hidden: [L+1,B,T,D], the raw stream: 0 is what layer 1 sees, l what layer l gives, never after the final norm.
        weights: [B,T], 1 at positions that count.

    Returns:
        [B,L+1,L+1]: sums over the positions of each row; element (l, l+n) spans n layers.
    """
    rows = jax.lax.map(lambda one: (angular_distance(one, hidden) * weights).sum(-1), hidden)
    return jnp.moveaxis(rows, -1, 0)


def stream_variance(hidden: jax.Array, weights: jax.Array) -> jax.Array:
    """Variance of the residual stream: over the features of a position, (1/D) sum_i (x_i - mean x)^2.

    Sun et al. 2025 (The Curse of Depth, section 3.1): its growth with depth makes deep Pre-LN layers an identity.

    Args:
        hidden: [L+1,B,T,D].
        weights: [B,T], 1 at positions that count.

    Returns:
        [B,L+1]: sums over the positions of each row.
    """
    return (hidden.astype(jnp.float32).var(axis=-1) * weights).sum(-1).T


def contribution(branches: Mapping[str, jax.Array], weights: jax.Array) -> jax.Array:
    """|F(x)| / |x|: the norm of what a sub-layer adds to the stream over the norm of the stream before it.

    Norms behind a sub-layer (`out`) and branch scales are part of F; factors of the stream (DeepNorm's) are not of x.

    Args:
        branches: `norm` and `stream_norm` [L,2,B,T]; see `backbone`.
        weights: [B,T], 1 at positions that count.

    Returns:
        [B,L,2], attention and MLP: sums over the positions of each row.
    """
    ratio = branches['norm'] / jnp.maximum(branches['stream_norm'], jnp.finfo(jnp.float32).tiny)
    return jnp.moveaxis((ratio * weights).sum(-1), -1, 0)


def mean_and_error(sums: ArrayLike, counts: ArrayLike) -> dict[str, Any]:
    """Mean over tokens and its standard error, taking the rows of text as drawn independently of each other.

    The error is that of a ratio (Cochran 1977, section 2.11): sqrt(R/(R-1) sum_r (s_r - mean c_r)^2) / sum_r c_r.

    Args:
        sums: [R,...] of each row.
        counts: [R], tokens of each row; rows of 0 are padding.

    Returns:
        {'mean': [...], 'standard_error': [...]} in float64; the error of a single row is NaN.
    """
    sums, counts = np.asarray(sums, np.float64)[np.asarray(counts) > 0], np.asarray(counts, np.float64)
    counts = counts[counts > 0].reshape(-1, *[1] * (sums.ndim - 1))
    rows, total = len(sums), counts.sum()
    mean = sums.sum(0) / total
    spread = np.square(sums - mean * counts).sum(0)
    return {'mean': mean, 'standard_error': np.sqrt(spread * (rows / (rows - 1) if rows > 1 else np.nan)) / total}


def drops(
    sums: ArrayLike,
    counts: ArrayLike,
    of_loss: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] | None = None,
) -> dict[str, Any]:
    """Performance drop of removed layers: a metric without them minus the metric with all (Mix-LN, section 3.1).

    Args:
        sums: [R,1+M] losses (nats) of each row: of the whole network, then with layers removed.
        counts: [R], tokens of each row.
        of_loss: further metrics, functions of the mean loss: {name: (function, its derivative)}.

    Returns:
        {'loss', ...}: each {'value', 'standard_error'} of the whole network and 'drop', as `mean_and_error` [M]. Errors
        of drops are those of paired rows, of functions of the loss by the delta method.
    """
    sums = np.asarray(sums, np.float64)
    with np.errstate(over='ignore', invalid='ignore'):  # without a layer nothing may be left of a network
        losses, loss_drops = mean_and_error(sums, counts), mean_and_error(sums[:, 1:] - sums[:, :1], counts)
        metrics = {'loss': (losses['mean'], losses, loss_drops['mean'], loss_drops)}
        for name, (function, derivative) in (of_loss or {}).items():
            values, linear = function(losses['mean']), derivative(losses['mean']) * sums
            metrics[name] = (
                values,
                mean_and_error(linear, counts),
                values[1:] - values[0],
                mean_and_error(linear[:, 1:] - linear[:, :1], counts),
            )
    return {
        name: {
            'value': values[0],
            'standard_error': error['standard_error'][0],
            'drop': {'mean': drop, 'standard_error': drop_error['standard_error']},
        }
        for name, (values, error, drop, drop_error) in metrics.items()
    }


def variance_theory(variances: ArrayLike, factors: ArrayLike) -> tuple[np.ndarray, float]:
    """What the Curse of Depth says of the stream's variance in layers with Pre-LN alone, up to one constant.

    Sun et al. 2025 (arXiv 2502.05795), section 3: var_l = var_{l-1} (1 + c f_l / sqrt(var_{l-1})) with f_l = 1, under
    LayerNorm Scaling (section 4) 1/sqrt(l). The paper leaves c open (Theta); here it is fitted, by least squares of the
    logarithms.

    Args:
        variances: [L+1], measured; every run of such layers starts at what was measured before it, the first layers
            behind layer 1, as the embedding before it has whatever size its initialisation gave it.
        factors: [L], f_l; NaN in layers that the theory is not about.

    Returns:
        ([L+1], NaN where it says nothing; c). c is NaN where there is no such layer.
    """
    variances, factors = np.asarray(variances, np.float64), np.asarray(factors, np.float64)
    about = np.isfinite(factors)

    def lines(c: np.ndarray) -> np.ndarray:
        """[C] -> [C,L+1]"""
        found = np.full((len(c), len(variances)), np.nan)
        for l in np.flatnonzero(about):
            if l and not about[l - 1]:
                found[:, l] = variances[l]
            before = found[:, l]
            found[:, l + 1] = before * (1 + c * factors[l] / np.sqrt(before)) if l else variances[1]
        return found

    if not about[1:].any() or not (np.isfinite(variances) & (variances > 0)).all():
        return np.full(len(variances), np.nan), np.nan
    candidates = np.geomspace(1e-4, 1e4, 4001)  # 0.5 % apart
    all_lines = lines(candidates)
    best = int(np.argmin(np.nansum(np.square(np.log(all_lines) - np.log(variances)), axis=1)))
    return all_lines[best], float(candidates[best])


def _unit(a: jax.Array) -> jax.Array:
    length = jnp.linalg.norm(a, axis=-1, keepdims=True)
    return a / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)  # a frozen row of an embedding is zero

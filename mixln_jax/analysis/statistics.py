"""Measures of layers: pure functions of arrays.

Averages over tokens are kept as a sum and a count for each row of text, in float32; `mean_and_error` divides them in
float64, so that no mean depends on how rows are batched.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


def angular_distance(u: jax.Array, v: jax.Array) -> jax.Array:
    """Returns the angle between vectors as a share of pi: 0 parallel, 1/2 orthogonal, 1 opposite.

    Gromov et al. 2024, equation 4: arccos(cosine) / pi. It is computed as (2/pi) atan2(|p-q|, |p+q|) with unit p and q,
    which is exact at 0, 1/2 and 1, where arccos in float32 is off by 1e-4.

    Args:
        u, v: [..., D].

    Returns:
        [...] in [0, 1].
    """
    p, q = (_unit(a.astype(jnp.float32)) for a in (u, v))
    return 2 / jnp.pi * jnp.arctan2(jnp.linalg.norm(p - q, axis=-1), jnp.linalg.norm(p + q, axis=-1))


def distance_matrix(hidden: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns angular distances of the residual stream between any two depths.

    Gromov et al. 2024, section 3; Mix-LN, Figure 2.

    Args:
        hidden: [L+1,B,T,D], the raw stream, never after the final norm: 0 is the input of layer 1, l the output of
            layer l.
        weights: [B,T], 1 at positions that count.

    Returns:
        [B,L+1,L+1]: sums over the positions of each row; element (l, l+n) spans n layers.
    """
    rows = jax.lax.map(lambda depth: (angular_distance(depth, hidden) * weights).sum(-1), hidden)
    return jnp.moveaxis(rows, -1, 0)


def stream_variance(hidden: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the variance of the residual stream over the features of a position, (1/D) sum_i (x_i - mean x)^2.

    Sun et al. 2025 (The Curse of Depth, section 3.1): its growth with depth turns deep Pre-LN layers into the identity.

    Args:
        hidden: [L+1,B,T,D].
        weights: [B,T], 1 at positions that count.

    Returns:
        [B,L+1]: sums over the positions of each row.
    """
    return (hidden.astype(jnp.float32).var(axis=-1) * weights).sum(-1).T


def contribution(branches: Mapping[str, jax.Array], weights: jax.Array) -> jax.Array:
    """Returns |F(x)| / |x|: the norm of what a sub-layer adds to the stream over the norm of the stream before it.

    Norms after a sub-layer (`out`) and branch scales belong to F; DeepNorm's factors of the stream do not belong to x.

    Args:
        branches: `norm` and `stream_norm` [L,2,B,T]; see `backbone`.
        weights: [B,T], 1 at positions that count.

    Returns:
        [B,L,2], attention and MLP: sums over the positions of each row.
    """
    ratio = branches['norm'] / jnp.maximum(branches['stream_norm'], jnp.finfo(jnp.float32).tiny)
    return jnp.moveaxis((ratio * weights).sum(-1), -1, 0)


def mean_and_error(sums: ArrayLike, counts: ArrayLike) -> dict[str, Any]:
    """Returns the mean over tokens and its standard error, as if the rows of text were drawn independently.

    The error is that of a ratio (Cochran 1977, section 2.11): sqrt(R/(R-1) sum_r (s_r - mean c_r)^2) / sum_r c_r.

    Args:
        sums: [R,...], of each row.
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
    """Returns what is lost with removed layers: a metric without them minus the metric with all (Mix-LN, section 3.1).

    Args:
        sums: [R,1+M], losses (nats) of each row: of the whole network, then without layers.
        counts: [R], tokens of each row.
        of_loss: further metrics, functions of the mean loss: {name: (function, its derivative)}.

    Returns:
        {'loss', ...}: each {'value', 'standard_error'} of the whole network and 'drop', as `mean_and_error` [M]. Errors
        of drops are those of paired rows, of functions of the loss by the delta method.
    """
    sums = np.asarray(sums, np.float64)
    with np.errstate(over='ignore', invalid='ignore'):  # a network may be ruined by the loss of a layer
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
    """Returns what the Curse of Depth predicts of the stream's variance in layers with Pre-LN alone, and its constant.

    Sun et al. 2025 (arXiv 2502.05795), section 3: var_l = var_{l-1} (1 + c f_l / sqrt(var_{l-1})) with f_l = 1, under
    LayerNorm Scaling (section 4) 1/sqrt(l). The paper leaves c open (Theta); here it is fitted, by least squares of the
    logarithms.

    Args:
        variances: [L+1], measured. Each run of such layers starts at the value that was measured before it; a run at
            the bottom starts after layer 1, since the size of the embedding depends on its initialisation.
        factors: [L], f_l; NaN in layers that the theory does not cover.

    Returns:
        (prediction [L+1], NaN where there is none; c, NaN if the theory covers no layer).
    """
    variances, factors = np.asarray(variances, np.float64), np.asarray(factors, np.float64)
    covered = np.isfinite(factors)

    def predictions(c: np.ndarray) -> np.ndarray:
        """Returns the prediction [C,L+1] of every constant [C]."""
        values = np.full((len(c), len(variances)), np.nan)
        for l in np.flatnonzero(covered):
            if l and not covered[l - 1]:
                values[:, l] = variances[l]
            before = values[:, l]
            values[:, l + 1] = before * (1 + c * factors[l] / np.sqrt(before)) if l else variances[1]
        return values

    if not covered[1:].any() or not (np.isfinite(variances) & (variances > 0)).all():
        return np.full(len(variances), np.nan), np.nan
    candidates = np.geomspace(1e-4, 1e4, 4001)  # 0.5 % apart
    predicted = predictions(candidates)
    best = int(np.argmin(np.nansum(np.square(np.log(predicted) - np.log(variances)), axis=1)))
    return predicted[best], float(candidates[best])


def _unit(a: jax.Array) -> jax.Array:
    length = jnp.linalg.norm(a, axis=-1, keepdims=True)
    return a / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)  # a frozen row of an embedding is zero

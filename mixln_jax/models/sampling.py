"""The choice of the next token: temperature, top-k, top-p, and one random number for each row and position."""

import dataclasses

import jax
import jax.numpy as jnp

from mixln_jax.system.errors import UsageError

BLOCK = 128  # tokens


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits, in this order: temperature, top-k, top-p.

    Attributes:
        temperature: logits are divided by it; 0: the likeliest token is taken.
        top_k: only the k likeliest tokens are drawn; 0: all.
        top_p: only the likeliest tokens that together have this probability are drawn (Holtzman et al. 2020, nucleus
            sampling); 1: all. The probabilities are those after temperature and top-k.

    A token is kept if the tokens that are strictly likelier number less than `top_k`, or have less probability than
    `top_p`; so equally likely tokens are kept together, and the likeliest always are.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ('temperature', 0 <= self.temperature <= 1e3, 'from 0 to 1000'),
            ('top_k', 0 <= self.top_k < 2**24, 'at least 0'),
            ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1'),
        ):
            if not valid:
                raise UsageError(f'{name}={getattr(self, name)} must be {wanted}')


def draw(
    logits: jax.Array, sampling: Sampling, seed: jax.Array, rows: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns a token for each row, and its log-probability.

    The random number of a row depends on `seed`, its number and its position alone, not on other rows.

    Args:
        logits: [B, V] float32.
        sampling: how to draw.
        seed: int32.
        rows: [B] int32, the number of each row.
        positions: [B] int32, of the tokens that are drawn.

    Returns:
        Tokens [B] int32, and their log-probabilities [B] float32 under the softmax of the logits as they are, without
        temperature, top-k and top-p.
    """
    if sampling.temperature == 0:
        tokens = _likeliest(logits)
    else:
        tokens = _pick(probabilities(logits, sampling), _uniform(seed, rows, positions))
    log_probs = jnp.take_along_axis(logits, tokens[:, None], -1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)
    return tokens.astype(jnp.int32), log_probs


def probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the probabilities [B, V] with which `draw` draws, for a temperature above 0."""
    scaled = logits / sampling.temperature
    order = _order(scaled)
    if sampling.top_k:
        scaled = jnp.where(_among_likeliest(order, jnp.ones_like(scaled), sampling.top_k), scaled, -jnp.inf)
    p = jax.nn.softmax(scaled)
    if sampling.top_p < 1:
        p = jnp.where(_among_likeliest(order, p, sampling.top_p), p, 0)
        p /= p.sum(-1, keepdims=True)
    return p


def _likeliest(logits: jax.Array) -> jax.Array:
    """Returns the first of the largest logits of each row; on CPUs `argmax` takes five times as long."""
    largest = logits == logits.max(-1, keepdims=True)
    return jnp.where(largest, jnp.arange(logits.shape[-1]), logits.shape[-1]).min(-1)


def _pick(p: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the index [B] at which the cumulative sum of p [B, V] passes `uniform` [B], found in two stages, among
    blocks and inside one: a cumulative sum over all of V takes long."""
    B, V = p.shape
    blocks = jnp.pad(p, [(0, 0), (0, -V % BLOCK)]).reshape(B, -1, BLOCK)
    sums = blocks.sum(-1)
    target = uniform * sums.sum(-1)
    block, before = _passing(sums, target)
    inside, _ = _passing(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], target - before)
    return block * BLOCK + inside


def _passing(mass: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the first index at which the cumulative sum of `mass` [B, n] passes `target` [B], and the sum before it.

    It never is an index without mass. Rounding may let no sum pass; then it is that of the largest mass.
    """
    cumulative = jnp.cumsum(mass, axis=-1)
    passed = (cumulative > target[:, None]) & (mass > 0)
    index = jnp.where(passed.any(-1), passed.argmax(-1), mass.argmax(-1))
    return index, jnp.take_along_axis(cumulative - mass, index[:, None], -1)[:, 0]


def _uniform(seed: jax.Array, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns a number in [0, 1) for each row [B] and position [B]."""
    key = jax.random.key(seed)
    fold_in = jax.random.fold_in
    return jax.vmap(lambda row, position: jax.random.uniform(fold_in(fold_in(key, row), position)))(rows, positions)


def _order(values: jax.Array) -> jax.Array:
    """Returns int32 that are ordered as float32 values are."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _among_likeliest(order: jax.Array, mass: jax.Array, limit: float) -> jax.Array:
    """Returns which entries [B, V] have entries of higher order whose `mass` is less than `limit` in all.

    The lowest such order is found by bisection: 32 sums take less time than sorting V entries.
    """

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        enough = jnp.where(order > middle, mass, 0).sum(-1, keepdims=True) < limit
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = order.min(-1, keepdims=True), order.max(-1, keepdims=True)
    return order >= jax.lax.fori_loop(0, 32, halve, bounds)[1]

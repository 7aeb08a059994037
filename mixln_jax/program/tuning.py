"""What is trained of a network: which leaves, and in which of the layers."""

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models import placements
from mixln_jax.models.network import SCORE
from mixln_jax.program import lora
from mixln_jax.system.errors import UsageError, nearest

LISA = 0x4C495341  # apart from the other random choices of a seed


def split(network: Any, tune: configs.Tune) -> tuple[Any, Any]:
    """Returns (the trained leaves, the frozen ones in `tune.base_dtype`) of a network; None: no leaf is frozen.

    A head of the task's own is always trained. Norms, biases and the scales of adapters stay in float32.

    Raises UsageError for a pattern of `tune.train` that matches no weight, and for patterns that match them all.
    """
    if tune.method != 'lora' and not tune.train:
        return network, None
    names = [name for name, _ in trees.named_leaves(lora.base(network))]
    trained = {SCORE} | (_matching(names, tune.train) if tune.train else set())
    params, frozen = trees.split(network, lambda name: name in trained or name.rpartition('/')[2] in lora.TRAINED)
    return params, in_base_dtype(frozen, tune.base_dtype)


def in_base_dtype(frozen: Any, dtype: str) -> Any:
    """Returns frozen weights with matrices and embeddings in `dtype`, all others in float32."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype if path[-1].key in ('kernel', 'embedding') else 'float32')

    return jax.tree_util.tree_map_with_path(cast, frozen)


def _matching(names: list[str], patterns: str) -> set[str]:
    trained: set[str] = set()
    for pattern in (part.strip() for part in patterns.split(',')):
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise UsageError(
                f'config.tune.train={patterns}: {pattern!r} matches no weight; --verbose lists them, such as {names[0]}'
            )
        trained |= {*matching}
    if len(trained | {SCORE}) == len({*names} | {SCORE}):
        raise UsageError(f'config.tune.train={patterns} matches every weight: leave it out, and all are trained')
    return trained


def drawn_layers(tune: configs.Tune, seed: int, step: jax.Array, num_layers: int) -> jax.Array | None:
    """Returns which layers [L] train in the update after `step` updates; None: all of them in every update.

    Pan et al. 2024 (LISA, arXiv 2403.17919), algorithm 1, as in LMFlow and OwLore: every `tune.interval` updates
    `tune.layers` of them are drawn from (seed, step), uniformly without replacement.
    """
    if tune.method != 'lisa':
        return None
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), LISA), step // tune.interval)
    return jax.random.permutation(key, num_layers) < tune.layers


def trained_layers(params: Any, network: Any, drawn: jax.Array | None) -> jax.Array:
    """Returns which layers [L] an update trains: those that have a trained leaf and are `drawn`.

    Args:
        params: the trained leaves.
        network: all leaves.
        drawn: see `drawn_layers`.
    """
    stacked, trained = params.get(trees.STACKED, {}), list[bool]()
    for number, run in enumerate(trees.layer_runs(network)):
        trained += [f'segment_{number}' in stacked] * len(jax.tree.leaves(run)[0])
    return jnp.array(trained) if drawn is None else jnp.array(trained) & drawn


def choose(drawn: jax.Array | None, new: Any, old: Any) -> Any:
    """Returns `new`, with the layers that are not drawn as in `old`; both are parameters, or states of an optimiser of
    them. `drawn`: see `drawn_layers`."""
    if drawn is None:
        return new
    chosen, first = {}, 0
    for number in range(len(new[trees.STACKED])):
        name = f'segment_{number}'
        before, after = old[trees.STACKED][name], new[trees.STACKED][name]
        length = len(jax.tree.leaves(after)[0])
        here, first = drawn[first : first + length], first + length

        def pick(b: jax.Array, a: jax.Array, here: jax.Array = here) -> jax.Array:
            return jnp.where(here.reshape(-1, *[1] * (a.ndim - 1)), a, b)

        chosen[name] = jax.tree.map(pick, before, after)
    return {**new, trees.STACKED: chosen}


def rate_factors(text: str, params: Any, norm_position: Sequence[str]) -> Any:
    """Returns the factor of the learning rate of every trained leaf, as a tree of floats; None: all of them are 1.

    Args:
        text: `config.optim.rate_factors`. A pattern stands for the leaves whose name it matches, and for those of the
            layers whose placement it matches; of several the last one counts.
        params: the trained leaves.
        norm_position: the placement of every layer [L].

    Raises UsageError for a pattern that matches no trained weight.
    """
    if not text:
        return None
    placement = {
        f'{trees.STACKED}/segment_{number}/': name
        for number, (name, _, _) in enumerate(placements.layer_runs(norm_position))
    }
    names = [name for name, _ in trees.named_leaves(params)]
    factors = dict.fromkeys(names, 1.0)
    for pattern, factor in configs.rate_factors(text).items():
        runs = tuple(run for run, name in placement.items() if fnmatch.fnmatchcase(name, pattern))
        matching = [name for name in names if fnmatch.fnmatchcase(name, pattern) or name.startswith(runs)]
        if not matching:
            raise UsageError(
                f'config.optim.rate_factors={text}: {pattern!r} matches no trained weight and no placement; --verbose '
                f'lists the weights, such as {names[0]}, and the placements are {", ".join(sorted({*norm_position}))}'
                f'{nearest(pattern, {*norm_position})}'
            )
        factors |= dict.fromkeys(matching, factor)
    return trees.nested(factors.items())


def scaled(updates: Any, factors: Any) -> Any:
    """Returns the updates times `factors`, from `rate_factors`; those with factor 1 as they are."""
    if factors is None:
        return updates
    return jax.tree.map(lambda update, factor: update if factor == 1 else factor * update, updates, factors)

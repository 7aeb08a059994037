"""Generation: a causal network continues rows of tokens, with the keys and values of earlier positions in a cache.

B rows, T tokens of the longest prompt, S positions of the cache, V tokens of the vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.distributed import mesh as meshes
from mixln_jax.models.network import Network
from mixln_jax.models.sampling import Sampling, draw
from mixln_jax.system.errors import NumericsError, UsageError

AS_PREDICTED = Sampling()  # draws from the network's own probabilities
STEPS = 8  # tokens of a row between two looks of the host
SHORTEST = 16  # positions; shorter prompts and caches would save no time


@dataclasses.dataclass
class Completion:
    """How a prompt goes on.

    Attributes:
        ids: the tokens that follow it; an end token is the last of them.
        log_probs: of these tokens, see `sampling.draw`.
        finish: `stop` after an end token; `length` after as many tokens as were asked for, or where the row is as long
            as the network's window; empty while it goes on. Whoever reads a stream may set it, which ends the row.
        cut: number of tokens that the prompt has lost on its left; see `fit`.
    """

    ids: list[int]
    log_probs: list[float]
    finish: str = ''
    cut: int = 0


@flax.struct.dataclass
class _State:
    """What goes from one token to the next. The last token of each row is not yet in the cache."""

    cache: Any  # keys and values [layers of a run, B, S, kv_heads, d]
    token: jax.Array  # [B]
    position: jax.Array  # [B], of that token
    left: jax.Array  # [B], tokens still to come
    ended: jax.Array  # [B] bool


@flax.struct.dataclass
class _Call:
    """What stays the same for a batch."""

    rows: jax.Array  # [B], the number of each row
    seed: jax.Array
    end_ids: jax.Array  # [E]


class Sampler:
    """Prefill and decoding of a network, compiled for a mesh and for a few lengths.

    Prompts of a batch may differ in length: they are padded on the right, each row has its own positions, and what
    padding leaves in the cache is never seen and is written over by the tokens that come.
    """

    def __init__(self, model: Network, window: int, mesh: Mesh | None = None) -> None:
        """Prepares the functions; they are compiled where they are first called.

        Args:
            model: a causal network.
            window: number of positions in the longest row.
            mesh: the devices; their row parts share the rows. None: all devices along `data`.

        Raises:
            UsageError: the network does not predict the next token.
        """
        if model.obstacle:
            raise UsageError(f'cannot generate: the network {model.obstacle}')
        self.mesh = mesh or meshes.make_mesh(configs.Mesh(), meshes.devices('auto'))
        self.window = window
        self._rows, everywhere = meshes.batch_sharding(self.mesh), meshes.replicated(self.mesh)
        self._everywhere = everywhere
        config = dataclasses.replace(model.config, remat='none')
        model = model.clone(config=config, stream_sharding=self._rows)
        out = None, everywhere, everywhere, everywhere
        self._prefill = jax.jit(
            functools.partial(_prefill, model=model, mesh=self.mesh),
            static_argnames=('sampling', 'capacity'),
            out_shardings=out,
        )
        self._decode = jax.jit(
            functools.partial(_decode, model=model),
            static_argnames=('sampling', 'steps'),
            donate_argnames='state',
            out_shardings=out,
        )

    def to_devices(self, params: Any) -> Any:
        """Returns the parameters on the devices of the mesh, split by its rules."""
        return jax.device_put(params, meshes.state_shardings(self.mesh, params))

    def generate(self, params: Any, prompts: Sequence[Sequence[int]], **options: Any) -> list[Completion]:
        """Returns the completion of each prompt; arguments are those of `stream`."""
        *_, last = self.stream(params, prompts, **options)
        return last

    def stream(
        self,
        params: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new: int | Sequence[int] = 128,
        sampling: Sampling = AS_PREDICTED,
        seed: int = 0,
        end_ids: Sequence[int] = (),
        rows: Sequence[int] | None = None,
        size: int = 0,
        step: int | jax.Array | None = None,
        steps: int = STEPS,
    ) -> Iterator[list[Completion]]:
        """Yields the completions of a batch of prompts, the same objects each time, which grow by up to `steps` tokens.

        Args:
            params: of the network, on the devices of the mesh; see `to_devices`.
            prompts: token ids, at least one in each; see `fit` for those that are as long as the window.
            max_new: most tokens of a completion; or those of each row.
            sampling: how tokens are chosen.
            seed: of the random numbers, below 2^32.
            end_ids: tokens that end a row.
            rows: the number of each row, on which its random numbers depend; None: 0, 1 and so on.
            size: rows in the batch; those that are missing are filled up, so that batches share compiled functions.
            step: number of updates done, at which ramps stand; see Network.
            steps: tokens between two yields.

        Raises:
            UsageError: a prompt without tokens, or `max_new` below 1. NumericsError: a log-probability is not finite.
        """
        limits = [max_new] * len(prompts) if isinstance(max_new, int) else list(max_new)
        kept, limits = self._fit(prompts, limits)
        completions = [Completion([], [], cut=len(a) - len(b)) for a, b in zip(prompts, kept, strict=True)]
        batch, missing = self._padded(kept, limits, size)
        numbers = np.array([*(range(len(prompts)) if rows is None else rows), *[0] * missing], np.int32)
        ends = np.array(sorted({*end_ids}) or [-1], np.int32)
        call = _Call(
            meshes.to_devices(numbers, self._rows),
            *meshes.to_devices((np.array(seed, np.uint32), ends), self._everywhere),
        )
        longest = max(len(ids) + limit for ids, limit in zip(kept, limits, strict=True))
        capacity = _bucket(longest, self.window, 4)
        state, *drawn = self._prefill(
            params, meshes.to_devices(batch, self._rows), call, step, sampling=sampling, capacity=capacity
        )
        while True:
            _extend(completions, limits, end_ids, *jax.device_get(drawn))
            yield completions
            ended = np.array([*(bool(row.finish) for row in completions), *[True] * missing])
            if ended.all():
                return
            ended = meshes.to_devices(ended, self._rows)
            state, *drawn = self._decode(params, state, ended, call, step, sampling=sampling, steps=steps)

    def _fit(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> tuple[list[Sequence[int]], list[int]]:
        """Returns the prompts as far as the window has room for them, and how many tokens may follow each."""
        if not all(map(len, prompts)):
            raise UsageError('a prompt has no token')
        if min(limits) < 1:
            raise UsageError(f'max_new={min(limits)} must be at least 1')
        kept = [fit(prompt, limit, self.window) for prompt, limit in zip(prompts, limits, strict=True)]
        return kept, [min(limit, self.window - len(ids)) for limit, ids in zip(limits, kept, strict=True)]

    def _padded(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int], size: int
    ) -> tuple[dict[str, np.ndarray], int]:
        """Returns a batch of at least `size` rows that the mesh divides, and how many of its rows only fill it up."""
        parts = meshes.row_parts(self.mesh)
        missing = -(-max(size, len(prompts)) // parts) * parts - len(prompts)
        ids = np.zeros((len(prompts) + missing, _bucket(max(map(len, prompts)), self.window, 1)), np.int32)
        for padded, prompt in zip(ids, prompts, strict=False):
            padded[: len(prompt)] = prompt
        return {
            'ids': ids,
            'lengths': np.array([*map(len, prompts), *[1] * missing], np.int32),
            'left': np.array([*limits, *[0] * missing], np.int32),
        }, missing


def fit(prompt: Sequence[int], max_new: int, window: int) -> Sequence[int]:
    """Returns a prompt that leaves room for a token in the window: as it is if it is shorter than the window.

    Otherwise it loses its beginning, and what is left starts at position 0: its last tokens, so few that `max_new`
    tokens can follow, but at least half of the window.
    """
    return prompt if len(prompt) < window else prompt[len(prompt) - (window - max(1, min(max_new, window // 2))) :]


def _bucket(length: int, window: int, parts: int) -> int:
    """Returns a length of which there are few: rounded up to a power of two, or to one of `parts` equal steps from one
    power to the next; at least SHORTEST, at most the window."""
    power = 2 ** max(0, math.ceil(math.log2(max(length, 1))) - 1)
    return min(window, max(SHORTEST, power + math.ceil((length - power) * parts / power) * power // parts))


def _extend(
    completions: Sequence[Completion],
    limits: Sequence[int],
    end_ids: Sequence[int],
    tokens: np.ndarray,
    log_probs: np.ndarray,
    count: np.ndarray,
) -> None:
    """Adds the first `count` drawn tokens [B, n] to the completions that go on, up to where each of them ends."""
    for row, limit, ids, values in zip(completions, limits, tokens.tolist(), log_probs.tolist(), strict=False):
        for token, value in zip(ids[:count], values, strict=False):
            if row.finish:
                break
            if not math.isfinite(value):
                raise NumericsError('the log-probability of a generated token is not finite')
            row.ids.append(token)
            row.log_probs.append(value)
            row.finish = 'stop' if token in end_ids else 'length' if len(row.ids) >= limit else ''


def _prefill(
    params: Any,
    batch: dict[str, jax.Array],
    call: _Call,
    step: Any,
    *,
    model: Network,
    mesh: Mesh,
    sampling: Sampling,
    capacity: int,
) -> tuple[_State, jax.Array, jax.Array, jax.Array]:
    """Returns the state after the prompts, the first token of each row [B, 1], its log-probability, and 1.

    `batch` has `ids` [B, T], padded on the right, `lengths` [B], and `left` [B], tokens that may follow.
    """
    lengths = batch['lengths']
    (x, _), made = model.apply(
        {'params': params}, {'inputs': batch['ids']}, step=step, method='backbone', mutable=['intermediates']
    )
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    tokens, log_probs = draw(_logits(model, params, last), sampling, call.seed, call.rows, lengths)
    room = max(0, capacity - x.shape[1])

    def grow(leaf: jax.Array) -> jax.Array:  # [n, B, T, K, d] -> [n, B, S, K, d]
        return jnp.pad(leaf, [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)])[:, :, :capacity]

    cache = jax.tree.map(grow, made['intermediates'])
    cache = jax.lax.with_sharding_constraint(cache, meshes.state_shardings(mesh, {'cache': cache})['cache'])
    left = batch['left'] - 1
    state = _State(cache, tokens, lengths, left, _ended(tokens, left, call))
    return state, tokens[:, None], log_probs[:, None], jnp.int32(1)


def _decode(
    params: Any,
    state: _State,
    ended: jax.Array,
    call: _Call,
    step: Any,
    *,
    model: Network,
    sampling: Sampling,
    steps: int,
) -> tuple[_State, jax.Array, jax.Array, jax.Array]:
    """Returns the state after up to `steps` more tokens, the tokens [B, steps], their log-probabilities, and how many
    tokens these are: fewer where all rows have ended. `ended` [B] are those that the host has ended too."""
    params = _in_compute_dtype(params, model)
    B, S = len(state.token), jax.tree.leaves(state.cache)[0].shape[2]
    blank = jnp.zeros((B, steps), jnp.int32), jnp.zeros((B, steps), jnp.float32)

    recent = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:2], steps, *leaf.shape[3:]), leaf.dtype), state.cache)

    def goes_on(carry: Any) -> jax.Array:
        count, state, *_ = carry
        return (count < steps) & ~state.ended.all()

    def body(carry: Any) -> Any:
        count, now, recent, tokens, log_probs = carry
        visible = jnp.arange(S) < state.position[:, None], jnp.broadcast_to(jnp.arange(steps) < count, (B, steps))
        caches = {'cache': state.cache, 'recent': recent}
        now, new, token, log_prob = _next(params, now, caches, jnp.hstack(visible), call, step, model, sampling)
        recent = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, count, 2), recent, new)
        return count + 1, now, recent, tokens.at[:, count].set(token), log_probs.at[:, count].set(log_prob)

    # All rows write their keys and values into the same place of `recent`. The cache, in which each row has a place of
    # its own, stays as it is until the end: to write there for each token would copy all of it.
    start = dataclasses.replace(state, cache=None, ended=state.ended | ended)
    count, now, recent, tokens, log_probs = jax.lax.while_loop(goes_on, body, (jnp.int32(0), start, recent, *blank))
    write = jax.vmap(jax.vmap(_write), in_axes=(0, 0, None))  # layers, rows: in this order nothing is transposed
    cache = jax.tree.map(lambda old, new: write(old, new, state.position), state.cache, recent)
    return dataclasses.replace(now, cache=cache), tokens, log_probs, count


def _next(
    params: Any,
    state: _State,
    caches: dict[str, Any],
    visible: jax.Array,
    call: _Call,
    step: Any,
    model: Network,
    sampling: Sampling,
) -> tuple[_State, Any, jax.Array, jax.Array]:
    """Returns the state after one more token, the keys and values of the last one, and the token of each row [B] with
    its log-probability [B]. `visible` [B, S+R] says which positions of the caches are seen."""
    batch = {'inputs': state.token[:, None], 'positions': state.position[:, None], 'cache_mask': visible}
    (x, _), made = model.apply(
        {'params': params, **caches}, batch, step=step, method='backbone', mutable=['intermediates']
    )
    tokens, log_probs = draw(_logits(model, params, x[:, 0]), sampling, call.seed, call.rows, state.position + 1)
    on, left = ~state.ended, state.left - 1
    state = _State(
        state.cache,
        jnp.where(on, tokens, state.token),
        jnp.where(on, state.position + 1, state.position),
        left,
        state.ended | _ended(tokens, left, call),
    )
    return state, made['intermediates'], tokens, log_probs


def _write(cache: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """Returns the cache of a row [S, K, d] with `new` [R, K, d] from a position on; what is beyond S is dropped."""
    return cache.at[position + jnp.arange(len(new))].set(new, mode='drop')


def _ended(tokens: jax.Array, left: jax.Array, call: _Call) -> jax.Array:
    """Returns which rows [B] end with these tokens [B], `left` [B] of which may follow."""
    return jnp.isin(tokens, call.end_ids) | (left <= 0)


def _logits(model: Network, params: Any, x: jax.Array) -> Any:
    return model.apply({'params': params}, x, method='logits')


def _in_compute_dtype(params: Any, model: Network) -> Any:
    """Returns the parameters with the layers' matrices in the type that they are multiplied in, once for all tokens."""
    cast: Callable[[tuple, jax.Array], jax.Array] = lambda path, leaf: (  # noqa: E731
        leaf.astype(model.compute_dtype) if trees.path_name(path).endswith('/kernel') else leaf
    )
    return params | {trees.STACKED: jax.tree_util.tree_map_with_path(cast, params[trees.STACKED])}

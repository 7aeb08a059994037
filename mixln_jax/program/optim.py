"""Optimisers and learning-rate schedules."""

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from mixln_jax import config as configs
from mixln_jax import trees

MATRICES = ('kernel', 'lora_a', 'lora_b')  # leaves that are matrices between features, or of an adapter


def schedule(config: configs.Optim, num_steps: int, official: bool = False) -> Callable[[Any], jax.Array]:
    """The learning rate of update s = 0, 1, ...: a linear warm-up that ends at the peak, then a decay that ends at
    min_ratio * peak with the last update. The first update already learns; `official`, its rate is 0 and each later
    one is the rate of the update before, as in the Mix-LN authors' code, whose linear decay ends at 0.

    wsd (Hu et al. 2024, MiniCPM, arXiv 2404.06395) stays at the peak and decays linearly over the last decay_steps
    or decay_ratio.
    """
    warmup = config.warmup(num_steps)
    peak, decay_steps = config.learning_rate, max(1, num_steps - warmup)
    floor = 0.0 if official and config.schedule == 'linear' else peak * config.min_ratio
    falling = min(decay_steps, max(1, config.decay_steps or round(config.decay_ratio * num_steps)))
    line = _line(peak, floor, falling)
    decay = {
        'cosine': optax.cosine_decay_schedule(peak, decay_steps, alpha=config.min_ratio),
        'linear': _line(peak, floor, decay_steps),
        'constant': optax.constant_schedule(peak),
        # The line begins at the peak, but may round it: the plateau lasts for one update more.
        'wsd': optax.join_schedules(
            [optax.constant_schedule(peak), lambda step: line(step + 1)], [decay_steps - falling + 1]
        ),
    }[config.schedule]
    whole = optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), decay], [warmup])
    return whole if official else lambda step: whole(step + 1)


def _line(start: float, end: float, steps: int) -> Callable[[Any], jax.Array]:
    """Returns optax's linear schedule, which after `steps` is `end` exactly; rounding may put optax's below 0."""
    line = optax.linear_schedule(start, end, steps)
    return lambda step: jnp.where(step >= steps, jnp.float32(end), line(step))


def optimizer(config: configs.Optim, undecayed: Collection[str] = ()) -> optax.GradientTransformation:
    """The gradient transformation without clipping and learning rate, which belong to the step.

    Weight decay is for matrices and embeddings, but for those whose paths are in `undecayed`, as `Network.undecayed`.

    Only the first moment may have a type of its own: in bfloat16, with 8 bits, the second one would not follow, for an
    update moves it by a part in 1 / (1 - b2) = 1000.
    """
    mu_dtype = None if config.mu_dtype == 'auto' else config.mu_dtype
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=mu_dtype)
    rule = {
        'adam': adam,
        'adamw': adam,
        'sgd': optax.trace(config.b1, accumulator_dtype=mu_dtype),
        'lion': optax.scale_by_lion(config.b1, config.b2, mu_dtype),
        'adafactor': optax.chain(optax.adafactor(), optax.scale(-1.0)),  # the sign of a descent is the step's
        'muon': optax.chain(scale_by_muon(config.b1, mu_dtype), optax.stateless_with_tree_map(_size_of_adam)),
        'galore': scale_by_galore(config.galore_rank, config.galore_gap, config.galore_scale, adam),
    }[config.name]
    decaying = _relative_decay if config.name == 'adafactor' else optax.add_decayed_weights
    mask = functools.partial(_decays, undecayed=undecayed)
    decay = [decaying(config.weight_decay, mask=mask)] if config.weight_decay else []
    others = rule
    if config.name in ('muon', 'galore'):  # for matrices between features alone
        kind = lambda path, _: 'matrix' if path[-1].key in MATRICES else 'vector'  # noqa: E731
        by_leaf = functools.partial(jax.tree_util.tree_map_with_path, kind)
        rule, others = optax.partition({'matrix': rule, 'vector': adam}, by_leaf), adam
    return per_layer(optax.chain(rule, *decay), optax.chain(others, *decay), one_by_one=config.name == 'galore')


def _relative_decay(rate: float, mask: Callable[[Any], Any]) -> optax.GradientTransformation:
    """Weight decay for adafactor, at each matrix's own rate, which is relative to its root mean square, as in Hugging
    Face's Adafactor. The paper (Shazeer and Stern 2018, arXiv 1804.04235) has none."""

    def add(update: jax.Array, leaf: jax.Array) -> jax.Array:
        return update + rate * jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(leaf))), 1e-3) * leaf

    return optax.masked(optax.stateless_with_tree_map(add), mask)


def scale_by_muon(momentum: float, mu_dtype: Any = None) -> optax.GradientTransformation:
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon): Nesterov momentum, then five Newton-Schulz iterations.

    mu <- momentum mu + (1 - momentum) g, and momentum mu + (1 - momentum) g is made orthogonal. Liu et al. 2025 (arXiv
    2502.16982) have both sums without (1 - momentum), a factor that the normalisation before the iterations removes.
    optax's own momentum divides mu and g by different powers, so its Muon is given none.
    """
    orthogonal = contrib.scale_by_muon(
        beta=0.0,
        eps=1e-7,
        mu_dtype=mu_dtype,
        nesterov=False,
        weight_dimension_numbers=lambda matrices: jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), matrices),
    )

    def mix(gradients: Any, moments: Any) -> Any:
        return jax.tree.map(lambda g, mu: momentum * mu + (1 - momentum) * g, gradients, moments)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = mix(gradients, state.mu)
        updates, after = orthogonal.update(mix(gradients, mu), state)
        return updates, after._replace(mu=jax.tree.map(lambda new, old: new.astype(old.dtype), mu, state.mu))

    return optax.GradientTransformation(orthogonal.init, update)


def _size_of_adam(update: jax.Array, _: Any) -> jax.Array:
    """Scales an orthogonal matrix to the size of Adam's updates, so that one learning rate serves both (Liu et al.
    2025, Muon is Scalable, arXiv 2502.16982, equation 4)."""
    return 0.2 * max(update.shape) ** 0.5 * update


def scale_by_galore(
    rank: int, gap: int, scale: float, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Zhao et al. 2024 (GaLore, arXiv 2403.03507, algorithm 2): `inner` sees gradients G [in, out] of rank r alone.

    The shorter side is projected. in <= out: P [in, r] has the first left singular vectors of G, `inner` sees P^T G
    [r, out], P times its update comes back. in > out: P [out, r] has right ones, it sees G P [in, r], and the update
    times P^T comes back. Square matrices are projected on their input side, as in the authors' code (proj_type std),
    whose matrices are [out, in]. P is made of G at updates 0, gap, 2 gap and so on; moments stay as they are.
    """
    dot = functools.partial(jnp.matmul, precision='highest')

    def wide(gradient: jax.Array) -> bool:
        return gradient.shape[0] <= gradient.shape[1]

    def singular_vectors(gradient: jax.Array) -> jax.Array:
        U, _, Vt = jnp.linalg.svd(gradient.astype(jnp.float32), full_matrices=False)
        return (U if wide(gradient) else Vt.T)[:, :rank].astype(gradient.dtype)

    def project(gradient: jax.Array, P: jax.Array) -> jax.Array:
        return dot(P.T, gradient) if wide(gradient) else dot(gradient, P)

    def project_back(gradient: jax.Array, P: jax.Array, update: jax.Array) -> jax.Array:
        return scale * (dot(P, update) if wide(gradient) else dot(update, P.T))

    def init(params: Any) -> Any:
        projector = jax.tree.map(lambda p: jnp.zeros((min(p.shape), min(rank, *p.shape)), p.dtype), params)
        inner_state = inner.init(jax.tree.map(project, params, projector))
        return contrib.GaLoreState(jnp.int32(0), inner_state, projector)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        made = functools.partial(jax.tree.map, singular_vectors, gradients)
        projector = jax.lax.cond(state.count % gap == 0, made, lambda: state.projector)
        projected = jax.tree.map(project, gradients, projector)
        updates, inner_state = inner.update(projected, state.base_optimizer_state)
        updates = jax.tree.map(project_back, gradients, projector, updates)
        return updates, contrib.GaLoreState(state.count + 1, inner_state, projector)

    return optax.GradientTransformation(init, update)


def per_layer(
    transformation: optax.GradientTransformation, others: optax.GradientTransformation, one_by_one: bool = False
) -> optax.GradientTransformation:
    """Shows `transformation` one layer at a time: it is mapped over the stacked axis of every segment, so it sees a
    layer's matrices and never the stack. `others` sees the leaves outside the layers, as one tree.

    `one_by_one` runs the layers in turn: what is done now and then (GaLore's singular value decomposition) would be
    done at every step by layers that run together.
    """

    def mapped(*arguments: Any) -> Any:
        if one_by_one:
            return jax.lax.map(lambda one: transformation.update(*one), arguments)
        return jax.vmap(transformation.update)(*arguments)

    def split(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {name: leaf for name, leaf in params.items() if name != trees.STACKED}, params.get(trees.STACKED, {})

    def stacked(layers: dict[str, Any]) -> dict[str, Any]:
        return {trees.STACKED: layers} if layers else {}  # none of their weights may be trained

    def init(params: Any) -> Any:
        rest, stack = split(params)
        layers = {name: jax.vmap(transformation.init)(segment) for name, segment in stack.items()}
        return {'rest': others.init(rest)} | stacked(layers)

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        (rest, stack), (params_rest, params_stack) = split(updates), split(params)
        rest, rest_state = others.update(rest, state['rest'], params_rest)
        layers, states = {}, {}
        for name, segment in stack.items():
            layers[name], states[name] = mapped(segment, state[trees.STACKED][name], params_stack[name])
        return rest | stacked(layers), {'rest': rest_state} | stacked(states)

    return optax.GradientTransformation(init, update)


def _decays(params: Any, undecayed: Collection[str]) -> Any:
    """Returns which leaves decay, by name: a stacked norm gain looks like a matrix."""

    def decays(path: tuple, _: Any) -> bool:
        return path[-1].key in (*MATRICES, 'embedding') and trees.path_name(path) not in undecayed

    return jax.tree_util.tree_map_with_path(decays, params)

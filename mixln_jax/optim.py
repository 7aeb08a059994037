"""Optimisers and learning-rate schedules."""

import jax
import optax

from mixln_jax import config as configs
from mixln_jax import trees


def schedule(config: configs.Optim, num_steps):
    """The learning rate of update s = 0, 1, ...: a linear warm-up that ends at the peak, then a decay that ends at
    min_ratio * peak with the last update. The first update already learns."""
    warmup = round(config.warmup_ratio * num_steps)
    peak, floor, decay_steps = config.learning_rate, config.learning_rate * config.min_ratio, max(1, num_steps - warmup)
    decay = {
        'cosine': optax.cosine_decay_schedule(peak, decay_steps, alpha=config.min_ratio),
        'linear': optax.linear_schedule(peak, floor, decay_steps),
        'constant': optax.constant_schedule(peak),
    }[config.schedule]
    whole = optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), decay], [warmup])
    return lambda step: whole(step + 1)


def optimizer(config: configs.Optim):
    """The gradient transformation without clipping and learning rate, which belong to the step.

    Only the first moment may have a type of its own: in bfloat16, with 8 bits, the second one would not follow, for an
    update moves it by a part in 1 / (1 - b2) = 1000.
    """
    mu_dtype = None if config.mu_dtype == 'auto' else config.mu_dtype
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=mu_dtype)
    decay = [optax.add_decayed_weights(config.weight_decay, mask=_is_matrix)] if config.weight_decay else []
    chains = {
        'adam': [adam],
        'adamw': [adam, *decay],
        'sgd': [optax.trace(config.b1, accumulator_dtype=mu_dtype), *decay],
    }
    return per_layer(optax.chain(*chains[config.name]))


def per_layer(transformation):
    """Shows `transformation` one layer at a time: it is mapped over the stacked axis of every segment, so it sees a
    layer's matrices and never the stack. The other leaves it sees as one tree."""

    def split(params):
        return {name: leaf for name, leaf in params.items() if name != trees.STACKED}, params[trees.STACKED]

    def init(params):
        rest, stack = split(params)
        layers = {name: jax.vmap(transformation.init)(segment) for name, segment in stack.items()}
        return {'rest': transformation.init(rest), trees.STACKED: layers}

    def update(updates, state, params):
        (rest, stack), (params_rest, params_stack) = split(updates), split(params)
        rest, rest_state = transformation.update(rest, state['rest'], params_rest)
        layers, states = {}, {}
        for name, segment in stack.items():
            layers[name], states[name] = jax.vmap(transformation.update)(
                segment, state[trees.STACKED][name], params_stack[name]
            )
        return rest | {trees.STACKED: layers}, {'rest': rest_state, trees.STACKED: states}

    return optax.GradientTransformation(init, update)


def _is_matrix(params):
    """Weight decay is for matrices and the embedding, by name: a stacked norm gain looks like a matrix."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ('kernel', 'embedding'), params)

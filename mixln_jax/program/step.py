"""The train step and the evaluation step: pure functions of a state and a batch."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mixln_jax import trees
from mixln_jax.models import transformer
from mixln_jax.tasks.task import Context


@flax.struct.dataclass
class State:
    """What training changes: all of a checkpoint's arrays."""

    step: jax.Array  # updates done
    params: Any
    opt_state: Any
    bad_step: (
        jax.Array
    )  # the first step whose loss or gradient was not finite; 0: none. While set, a step is the identity


def init_state(task, optimizer, key, param_dtype='float32'):
    """Returns a fresh State: the weights that the task's model draws, in `param_dtype`."""
    drawn = jax.tree.map(lambda leaf: leaf.astype(param_dtype), task.model.init(key)['params'])
    params = task.initial(drawn)
    return State(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))


def measure_factors(state, batch, *, model, accumulate=1):
    """Returns a fresh State with the measured factors (Admin's omega) set by one forward pass over the whole batch.

    Ramps count as done: the factors balance the branches that training will have. At step 0 each of them adds nothing.
    """

    def branches(micro_batch):
        _, out = model.apply({'params': state.params}, micro_batch, capture=True, method='backbone')
        return out['branches']

    micro = micro_batches(batch, accumulate)
    whole = {name: jnp.concatenate(values, axis=2) for name, values in jax.lax.map(branches, micro).items()}
    variances = transformer.branch_variances(whole, jnp.concatenate(micro['loss_mask']), model.config.hidden_size)
    return state.replace(params=model.with_measured(state.params, variances))


def train_step(state, batch, *, task, optimizer, schedule, clip_norm=0.0, accumulate=1, shardings=None):
    """Returns the state after one update, and its metrics.

    Args:
        state: State; donate it.
        batch: arrays [B, ...]; see the task's `batch_spec`.
        task: a tasks.task.Task.
        optimizer: from `optim.optimizer`.
        schedule: update number from 0 -> learning rate.
        clip_norm: largest global gradient norm; 0: no clipping.
        accumulate: micro-batches; they share one sum and one weight, so the mathematics is the whole batch's.
        shardings: of the weights, which their gradients are to have too; None: one device.

    Returns:
        (State, metrics): loss, grad_norm (before clipping), learning_rate, layer_grad_norm [L], bad_step, and the sums
        `sum`, `weight` and of the task's metrics. A non-finite loss or gradient leaves weights and moments untouched
        and sets `bad_step`.
    """
    context = Context(train=True, step=state.step)
    loss_and_gradient = jax.value_and_grad(lambda params, part: _losses(task, params, part, context), has_aux=True)

    def split(grads):  # left alone, XLA may let every device hold the whole sum
        return jax.lax.with_sharding_constraint(grads, shardings) if shardings else grads

    def add(totals, micro_batch):
        (_, sums), grads = loss_and_gradient(state.params, micro_batch)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), totals, (sums, split(grads))), None

    parts = micro_batches(batch, accumulate)
    sums = jax.eval_shape(lambda: _losses(task, state.params, jax.tree.map(lambda a: a[0], parts), context)[1])
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)  # noqa: E731
    (sums, grads), _ = jax.lax.scan(add, (zeros(sums), split(zeros(state.params))), parts)
    loss, grads = jax.tree.map(lambda total: total / jnp.maximum(sums['weight'], 1), (sums['sum'], grads))

    layer_grad_norm, grad_norm = trees.layer_norms(grads)
    if clip_norm:
        grads = jax.tree.map(lambda grad: grad * jnp.minimum(1, clip_norm / grad_norm), grads)
    grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, state.params)
    learning_rate = schedule(state.step)
    with jax.named_scope('update'):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda update: -learning_rate * update, updates))
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        bad_step = jnp.where((state.bad_step == 0) & ~finite, state.step + 1, state.bad_step)
        updated = State(state.step + 1, params, opt_state, bad_step)
        kept = state.replace(bad_step=bad_step)
        state = jax.tree.map(lambda new, old: jnp.where(bad_step == 0, new, old), updated, kept)
    return state, {
        'loss': loss,
        'grad_norm': grad_norm,
        'learning_rate': learning_rate,
        'layer_grad_norm': layer_grad_norm,
        'bad_step': bad_step,
    } | sums


def _losses(task, params, batch, context):
    """Returns the sum of the losses of a batch, and all sums by name."""
    losses = task.losses(params, batch, context)
    return losses.sum, {'sum': losses.sum, 'weight': losses.weight} | losses.metrics


def eval_step(params, batch, step=None, *, task):
    """Returns the sums of a batch after `step` updates: `sum`, `weight` and the task's metrics."""
    return _losses(task, params, batch, Context(step=step))[1]


def micro_batches(batch, accumulate):
    """[B,...] -> [accumulate, B/accumulate, ...], taking every accumulate-th row, so that a batch sharded over devices
    gives every device its share of each micro-batch."""
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(a.shape[0] // accumulate, accumulate, *a.shape[1:]), 0, 1), batch
    )

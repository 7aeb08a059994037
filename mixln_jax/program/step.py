"""The train step and the evaluation step: pure functions of a state and a batch."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mixln_jax import trees
from mixln_jax.kernels import cross_entropy
from mixln_jax.models import transformer


@flax.struct.dataclass
class State:
    """What training changes: all of a checkpoint's arrays."""

    step: jax.Array  # updates done
    params: Any
    opt_state: Any
    bad_step: (
        jax.Array
    )  # the first step whose loss or gradient was not finite; 0: none. While set, a step is the identity


def init_state(model, optimizer, key, param_dtype='float32', frozen_row=None):
    """A fresh State; weights as `model.init` draws them, in `param_dtype`, the frozen row of the embedding zero."""
    params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), model.init(key)['params'])
    if frozen_row is not None:
        params = _with_row(params, frozen_row, jnp.zeros_like)
    return State(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))


def measure_factors(state, batch, *, model, accumulate=1):
    """A fresh State whose measured factors (Admin's omega) are set, by one forward pass over the whole batch."""

    def branches(micro_batch):
        _, out = model.apply({'params': state.params}, **trunk_inputs(micro_batch), capture=True, method='trunk')
        return out['branches']

    micro = micro_batches(batch, accumulate)
    whole = {name: jnp.concatenate(values, axis=2) for name, values in jax.lax.map(branches, micro).items()}
    variances = transformer.branch_variances(whole, jnp.concatenate(micro['weights']), model.config.hidden_size)
    return state.replace(params=model.with_measured(state.params, variances))


def trunk_inputs(batch):
    """What `trunk` takes of a batch: the ids and, in a packed batch, where the documents of each row lie; of BERT the
    kinds of tokens and which are seen."""
    keys = ('positions', 'segments', 'types', 'mask')
    return {'ids': batch['inputs']} | {key: batch[key] for key in keys if key in batch}


def batch_loss(model, params, batch, keep=None, frozen_row=None):
    """Next-token loss of a batch as (sum, count, aux); see losses.py.

    `keep` [L] removes layers; see `trunk`. Reading `frozen_row` of the embedding has no gradient (torch's padding_idx).
    """
    read = params if frozen_row is None else _with_row(params, frozen_row, jax.lax.stop_gradient)
    x, _ = model.apply({'params': read}, **trunk_inputs(batch), keep=keep, method='trunk')
    kernel, sharding = model.head_kernel(params), model.stream_sharding
    mesh = sharding and sharding.mesh
    return cross_entropy.token_losses(x, kernel, batch['targets'], batch['weights'], model.config.vocab_size, mesh=mesh)


def train_step(
    state,
    batch,
    *,
    model,
    optimizer,
    schedule,
    clip_norm=0.0,
    accumulate=1,
    shardings=None,
    micro_means=False,
    frozen_row=None,
):
    """One update.

    Args:
        state: State; donate it.
        batch: {'inputs', 'targets', 'weights'} and, packed, {'positions', 'segments'} (see `trunk`), each [B,T].
        model: a module with `trunk`.
        optimizer: from `optim.optimizer`.
        schedule: update number from 0 -> learning rate.
        clip_norm: largest global gradient norm; 0: no clipping.
        accumulate: micro-batches; they share one sum and one count, so the mathematics is the whole batch's.
        shardings: of the weights, which their gradients are to have too; None: one device.
        micro_means: the mean of the micro-batches' means instead, which weighs tokens unequally (the Mix-LN authors').
        frozen_row: of the embedding, see `batch_loss`; None: all rows have a gradient.

    Returns:
        (State, metrics): loss (nats a token), grad_norm (before clipping), learning_rate, tokens, layer_grad_norm [L],
        bad_step. A non-finite loss or gradient leaves weights and moments untouched and sets `bad_step`.
    """

    def split(grads):  # left alone, XLA may let every device hold the whole sum
        return jax.lax.with_sharding_constraint(grads, shardings) if shardings else grads

    def add(sums, micro_batch):
        of_params = lambda params: batch_loss(model, params, micro_batch, frozen_row=frozen_row)[:2]  # noqa: E731
        (loss, count), grads = jax.value_and_grad(of_params, has_aux=True)(state.params)
        grads = split(grads)
        if micro_means:
            of_micro = lambda total: total / jnp.maximum(count, 1) * (whole / accumulate)  # noqa: E731
            loss, grads = jax.tree.map(of_micro, (loss, grads))
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, (loss, count, grads)), None

    whole = batch['weights'].astype(jnp.float32).sum()
    zeros = jax.tree.map(lambda param: jnp.zeros(param.shape, jnp.float32), state.params)
    start = jnp.float32(0), jnp.float32(0), split(zeros)
    (loss, count, grads), _ = jax.lax.scan(add, start, micro_batches(batch, accumulate))
    loss, grads = jax.tree.map(lambda total: total / jnp.maximum(count, 1), (loss, grads))

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
        'tokens': count,
        'layer_grad_norm': layer_grad_norm,
        'bad_step': bad_step,
    }


def _with_row(params, row, changed):
    """Parameters with `changed` of one row of the embedding."""
    table = params['embed']['embedding']
    return params | {'embed': {'embedding': table.at[row].set(changed(table[row]))}}


def eval_step(params, batch, *, model):
    """Sum of token losses and number of real tokens of a batch."""
    return batch_loss(model, params, batch)[:2]


def micro_batches(batch, accumulate):
    """[B,...] -> [accumulate, B/accumulate, ...], taking every accumulate-th row, so that a batch sharded over devices
    gives every device its share of each micro-batch."""
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(a.shape[0] // accumulate, accumulate, *a.shape[1:]), 0, 1), batch
    )

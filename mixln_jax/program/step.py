"""The train step and the evaluation step: pure functions of a state and a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.models import transformer
from mixln_jax.program import lora, tuning
from mixln_jax.tasks.task import Batch, Context, Task, example_keys

ALL = configs.Tune()  # every weight is trained


@flax.struct.dataclass
class State:
    """What training changes, all of a checkpoint's arrays, and the weights that it does not change."""

    step: jax.Array  # updates done
    params: Any  # the trained weights
    opt_state: Any
    bad_step: jax.Array  # the first step that was not finite; 0: none. While it is set, a step changes nothing
    ema: Any = None  # running average of params, float32; None: there is none
    frozen: Any = None  # the other weights of the network, which are never updated; None: there are none
    reference: Any = None  # all weights of the network that training began with, where a task needs them; see reference

    @property
    def network(self) -> Any:
        """All weights of the network, trained and frozen."""
        return trees.join(self.params, self.frozen)

    @property
    def averaged(self) -> Any:
        """The network that is evaluated: with the running average of the trained weights where there is one."""
        return trees.join(self.params if self.ema is None else self.ema, self.frozen)

    @property
    def own(self) -> 'State':
        """The state without the weights that no update changes, as checkpoints hold it."""
        return dataclasses.replace(self, frozen=None, reference=None)

    @property
    def fixed(self) -> tuple[Any, Any]:
        """The weights that no update changes: the frozen ones and those of the reference network."""
        return self.frozen, self.reference

    def with_fixed(self, fixed: tuple[Any, Any]) -> 'State':
        """Returns the state with other weights that no update changes."""
        return dataclasses.replace(self, frozen=fixed[0], reference=fixed[1])

    def with_network(self, network: Any) -> 'State':
        """Returns the state with other weights, from which a running average starts again, and the reference."""
        params, frozen = network, None
        if self.frozen is not None:
            params, frozen = trees.split(network, {name for name, _ in trees.named_leaves(self.params)}.__contains__)
        ema = None if self.ema is None else _float32(params)
        reference = None if self.reference is None else _copy(network)
        return dataclasses.replace(self, params=params, frozen=frozen, ema=ema, reference=reference)


def init_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    param_dtype: str = 'float32',
    ema: float = 0.0,
    tune: configs.Tune = ALL,
) -> State:
    """Returns a fresh State: the weights that the model draws, and adapters where `tune` wants them.

    Trained weights are in `param_dtype`, and `ema` keeps their average. Raises UsageError for keys of `tune` that do
    not fit the network.
    """
    in_type = lambda tree: jax.tree.map(lambda leaf: leaf.astype(param_dtype), tree)  # noqa: E731
    network = task.initial(in_type(task.model.init(key)['params']))
    if tune.method == 'lora':
        network = lora.with_adapters(network, tune, key)
    params, frozen = tuning.split(network, tune)
    params = in_type(params)
    average = _float32(params) if ema else None
    kept = task.needs_reference and not (tune.method == 'lora' and not tune.train)
    reference = _copy(network) if kept else None
    return State(jnp.int32(0), params, optimizer.init(params), jnp.int32(0), average, frozen, reference)


def reference(task: Task, network: Any, kept: Any) -> Any:
    """Returns all weights of the reference network: those that a state has kept, or where adapters alone are trained,
    the network without them; None where the task needs none."""
    if not task.needs_reference:
        return None
    return lora.base(network) if kept is None else kept


def _copy(network: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), network)  # else both would be donated


def _float32(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)  # else both would be donated


def measure_factors(state: State, batch: Batch, *, task: Task, seed: int = 0, accumulate: int = 1) -> State:
    """Returns a fresh State with the measured factors (Admin's omega) set by one forward pass over the whole batch.

    Ramps count as done: the factors balance the branches that training will have. At step 0 each of them adds nothing.
    """
    model, network = task.model, state.network

    def branches(micro_batch: Batch) -> Any:
        _, out = model.apply({'params': network}, micro_batch, capture=True, method='backbone')
        return out['branches']

    micro = micro_batches(task.prepare(batch, step_key(seed, 0), True), accumulate)
    whole = {name: jnp.concatenate(values, axis=2) for name, values in jax.lax.map(branches, micro).items()}
    variances = transformer.branch_variances(
        whole, jnp.concatenate(jax.vmap(task.position_mask)(micro)), model.config.hidden_size
    )
    return state.with_network(model.with_measured(network, variances))


def train_step(
    state: State,
    batch: Batch,
    *,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], jax.Array],
    seed: int = 0,
    clip_norm: float = 0.0,
    ema: float = 0.0,
    accumulate: int = 1,
    shardings: Any = None,
    tune: configs.Tune = ALL,
    rate_factors: Any = None,
    signs: bool = False,
) -> tuple[State, dict[str, jax.Array]]:
    """Returns the state after one update, and its metrics.

    Args:
        state: State; donate it.
        batch: arrays [B, ...]; see the task's `batch_spec`.
        task: a tasks.task.Task.
        optimizer: from `optim.optimizer`.
        schedule: update number from 0 -> learning rate.
        seed: of the random choices that the task makes; see `step_key`.
        clip_norm: largest global gradient norm; 0: no clipping.
        ema: decay of the running average of the weights, where the state has one.
        accumulate: micro-batches; they share one sum and one weight, so the mathematics is the whole batch's.
        shardings: of the trained weights, which their gradients are to have too; None: one device.
        tune: what is trained. Under `lisa` the layers that are not drawn have no gradient, so they do not enter its
            norm, and keep their weights and moments; see `tuning.drawn_layers`.
        rate_factors: factors of the learning rate of every trained leaf, from `tuning.rate_factors`; None: all are 1.
        signs: whether the metrics have layer_update_ratio.

    Returns:
        (State, metrics): loss, grad_norm (before clipping), learning_rate, layer_grad_norm [L] (nan of a layer that the
        update does not train), layer_update_ratio [L], the norm of what the update adds to the trained weights of a
        layer over the norm of these weights (nan likewise), bad_step, and the sums `sum`, `weight` and of the task's
        metrics. A non-finite loss or gradient leaves weights and moments untouched and sets `bad_step`.
    """
    parts = micro_batches(task.prepare(batch, step_key(seed, state.step), True), accumulate)
    sums, grads = _sums_and_gradients(task, state, parts, shardings, seed, tune.dropout)
    drawn = tuning.drawn_layers(tune, seed, state.step, task.model.config.num_layers)
    if drawn is not None:
        grads = tuning.choose(drawn, grads, jax.tree.map(jnp.zeros_like, grads))
    loss, grads = jax.tree.map(lambda total: total / jnp.maximum(sums['weight'], 1), (sums['sum'], grads))
    grads = jax.lax.optimization_barrier(grads)  # else what reads the updates decides how XLA fuses and rounds them
    layer_grad_norm, grad_norm = trees.layer_norms(grads, state.network)
    trained = tuning.trained_layers(state.params, state.network, drawn)
    layer_grad_norm = jnp.where(trained, layer_grad_norm, jnp.nan)
    if clip_norm:
        grads = jax.tree.map(lambda grad: grad * jnp.minimum(1, clip_norm / grad_norm), grads)
    grads = jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, state.params)
    learning_rate = schedule(state.step)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    with jax.named_scope('update'):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = tuning.scaled(updates, rate_factors)
        ratio = {'layer_update_ratio': _update_ratio(state, updates, learning_rate, trained)} if signs else {}
        updates = jax.tree.map(lambda update: -learning_rate * update, updates)
        state = _updated(state, updates, opt_state, finite, ema, drawn)
    return state, {
        'loss': loss,
        'grad_norm': grad_norm,
        'learning_rate': learning_rate,
        'layer_grad_norm': layer_grad_norm,
        'bad_step': state.bad_step,
    } | ratio | sums


def _sums_and_gradients(
    task: Task, state: State, parts: Any, shardings: Any, seed: int, dropout: float
) -> tuple[dict[str, jax.Array], Any]:
    """Returns all sums by name, and the gradient of the sum of the losses, over micro-batches [accumulate, ...]."""
    compared = reference(task, state.network, state.reference)

    def sums_of(params: Any, part: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        network = trees.join(params, state.frozen)
        return _sums(task, network, part, training_context(network, part, state.step, compared, seed, dropout))

    loss_and_gradient = jax.value_and_grad(sums_of, has_aux=True)

    def split(grads: Any) -> Any:  # left alone, XLA may let every device hold the whole sum
        return jax.lax.with_sharding_constraint(grads, shardings) if shardings else grads

    def add(totals: Any, part: Any) -> tuple[Any, None]:
        (_, sums), grads = loss_and_gradient(state.params, part)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), totals, (sums, split(grads))), None

    sums = jax.eval_shape(lambda: sums_of(state.params, jax.tree.map(lambda part: part[0], parts))[1])
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), tree)  # noqa: E731
    return jax.lax.scan(add, (zeros(sums), split(zeros(state.params))), parts)[0]


def training_context(
    network: Any, batch: Batch, updates_done: jax.Array | None, reference: Any, seed: int, dropout: float
) -> Context:
    """Returns what a training loss of a prepared batch depends on; `dropout`: share of an adapter's input left out."""
    context = Context(train=True, step=updates_done, reference=reference)
    if not dropout:
        return context
    assert updates_done is not None, 'training counts its updates'
    keys = example_keys(step_key(seed, updates_done), batch)
    return context._replace(collections={'dropout': lora.dropout(network, dropout, keys)})


def _update_ratio(state: State, updates: Any, learning_rate: jax.Array, trained: jax.Array) -> jax.Array:
    """Returns the norm of the updates of each layer [L] over that of its trained weights; nan where none is `trained`.

    The rate multiplies the norm: if it multiplied what the weights share with it, they would be rounded differently.
    """
    moved, weights = (trees.layer_norms(tree, state.network)[0] for tree in (updates, state.params))
    return jnp.where(trained, learning_rate * moved / weights, jnp.nan)


def _updated(
    state: State, updates: Any, opt_state: Any, finite: jax.Array, ema: float, drawn: jax.Array | None
) -> State:
    """Returns the state after `updates` of the `drawn` layers and of all that is not a layer; None: of all layers.

    If the update is not `finite`, or an earlier one was not, only `bad_step` changes.
    """
    params = optax.apply_updates(state.params, updates)
    params, opt_state = (
        tuning.choose(drawn, new, old) for new, old in ((params, state.params), (opt_state, state.opt_state))
    )
    bad_step = jnp.where((state.bad_step == 0) & ~finite, state.step + 1, state.bad_step)
    average = None
    if state.ema is not None:
        average = jax.tree.map(lambda old, new: ema * old + (1 - ema) * new.astype(old.dtype), state.ema, params)
    updated = State(state.step + 1, params, opt_state, bad_step, average)
    kept = dataclasses.replace(state.own, bad_step=bad_step)
    chosen = jax.tree.map(lambda new, old: jnp.where(bad_step == 0, new, old), updated, kept)
    return chosen.with_fixed(state.fixed)


def _sums(task: Task, network: Any, batch: Batch, context: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the sum of the losses of a prepared batch, and all sums by name."""
    losses = task.losses(network, batch, context)
    return losses.sum, {'sum': losses.sum, 'weight': losses.weight} | losses.metrics


def eval_step(
    network: Any, batch: Batch, step: jax.Array | None = None, kept: Any = None, *, task: Task
) -> dict[str, jax.Array]:
    """Returns the sums of a batch after `step` updates: `sum`, `weight` and the task's metrics. `kept`: the reference
    network of the state, if it has one.

    Random choices of the task are the same in every run, so that networks are compared on the same examples.
    """
    context = Context(step=step, reference=reference(task, network, kept))
    return _sums(task, network, task.prepare(batch, step_key(0, 0), False), context)[1]


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """Returns the random key of update number `step`, from 0."""
    return jax.random.fold_in(jax.random.key(seed), step)


def micro_batches(batch: Any, accumulate: int) -> Any:
    """[B,...] -> [accumulate, B/accumulate, ...], taking every accumulate-th row, so that a batch sharded over devices
    gives every device its share of each micro-batch."""
    return jax.tree.map(
        lambda a: jnp.swapaxes(a.reshape(a.shape[0] // accumulate, accumulate, *a.shape[1:]), 0, 1), batch
    )

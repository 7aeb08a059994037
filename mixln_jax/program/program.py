"""What runs on the devices: the functions of a run, jitted for a mesh, and the shapes they take."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.data.rows import OF_PAIRS
from mixln_jax.distributed import mesh as meshes
from mixln_jax.kernels import attention
from mixln_jax.models import families, transformer
from mixln_jax.program import inner, optim, probe, step, tuning
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks import build


class Program:
    """Model, state and steps of `config` on `mesh`.

    `state` is the train state as ShapeDtypeStructs with their shardings. `init`: key -> State, created with its final
    sharding. `measure_factors`: (State, batch) -> State, before the first step where `model.measured()`. `train_step`:
    (State, batch) -> (State, metrics). Both donate the state, `train_step` all but what no update changes. `eval_step`:
    (network, batch, step) -> sums, where `step` is what `transformer.needed_step` returns, with the state's reference
    network as a fourth argument if it has one; see step.py. `probe`: (network, batch, step) -> what a forward pass
    hides; see probe.py.

    Raises UsageError, naming the keys, for sizes that the mesh does not divide.
    """

    def __init__(self, config: configs.Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh):
        self.config, self.mesh = config, mesh
        _check_sizes(config, mesh)
        self._rows, everywhere = meshes.batch_sharding(mesh), meshes.replicated(mesh)
        official = config.compat != 'none'
        device = mesh.devices.flat[0] if isinstance(mesh, jax.sharding.Mesh) else None  # plans have none
        causal = families.FAMILIES[config.model.family].causal
        kernel = attention_kernel(config, device) if causal else 'blocks'
        self.model = families.from_config(
            config.model, config.compute_dtype, self._rows, official, kernel, config.task.num_outputs
        )
        longest = self.model.longest
        if longest and config.seq_length > longest:
            raise UsageError(f'config.seq_length={config.seq_length} is more than config.model.num_positions={longest}')
        if config.eval.samples and self.model.obstacle:
            raise UsageError(
                f'config.eval.samples={config.eval.samples} has no meaning: this network {self.model.obstacle}'
            )
        self.task = build.from_config(config, self.model)
        optimizer = optim.optimizer(config.optim, self.model.undecayed)
        init = functools.partial(
            step.init_state,
            self.task,
            optimizer,
            param_dtype=config.param_dtype,
            ema=config.optim.ema,
            tune=config.tune,
        )
        shapes = jax.eval_shape(init, jax.random.key(0))
        shardings = meshes.state_shardings(mesh, shapes)
        self.state = jax.tree.map(_like, shapes, shardings)
        self.init = jax.jit(init, out_shardings=shardings)
        train_step = functools.partial(
            step.train_step if self.task.collect is None else inner.train_step,
            task=self.task,
            optimizer=optimizer,
            seed=config.seed,
            schedule=optim.schedule(config.optim, config.num_steps, official),
            clip_norm=config.optim.clip_norm,
            ema=config.optim.ema,
            accumulate=config.accumulate,
            shardings=shardings.params,
            tune=config.tune,
            rate_factors=tuning.rate_factors(config.optim.rate_factors, shapes.params, self.model.norm_position),
            signs=config.stability.every > 0,
        )
        jitted = functools.partial(jax.jit, donate_argnums=0, out_shardings=(shardings.own, everywhere))
        self.train_step: Any = jitted(train_step)
        if self.has_fixed:
            self.train_step = _WithFixed(jitted(_without_fixed(train_step)))
        measure = functools.partial(
            step.measure_factors, task=self.task, seed=config.seed, accumulate=config.accumulate
        )
        self.measure_factors = jax.jit(measure, donate_argnums=0, out_shardings=shardings)
        parts = meshes.row_parts(mesh)
        rows = min(config.batch_size, parts * -(-config.stability.rows // parts))
        probing = functools.partial(probe.probe, task=self.task, seed=config.seed, rows=rows)
        self.probe = jax.jit(probing, out_shardings=everywhere)
        self.eval_step = jax.jit(functools.partial(step.eval_step, task=self.task), out_shardings=everywhere)

    @property
    def has_fixed(self) -> bool:
        """Whether the state has weights that no update changes."""
        return any(part is not None for part in self.state.fixed)

    @property
    def references(self) -> tuple[Any, ...]:
        """The reference network of the state as a tuple, which is empty if it has none."""
        return () if self.state.reference is None else (self.state.reference,)

    @property
    def row_length(self) -> int:
        """Number of positions of a row."""
        return self.model.row_length(self.config.seq_length)

    def flops_per_position(self) -> int:
        """Returns the FLOPs of training on one position, by formula; frozen weights have no gradient, a third less."""
        found = self.model.flops_per_position(self.state.network, self.row_length)
        return found - 2 * self.num_frozen(multiplied=True)

    def flops(self) -> dict[str, float]:
        """Returns the FLOPs of a step on all devices by formula: of its `updates`, and of each of the task's
        `forward_passes`, which have a third of those of training on all weights."""
        positions = self.config.batch_size * self.row_length
        forward = self.model.flops_per_position(self.state.network, self.row_length) / 3
        passes = {name: count * positions * forward for name, count in self.task.forward_passes.items()}
        return {'updates': float(self.task.updates * positions * self.flops_per_position())} | passes

    def num_frozen(self, multiplied: bool = False) -> int:
        """Returns the number of frozen weights; `multiplied`: without tables that are only looked up."""
        leaves = dict(trees.named_leaves(self.state.frozen))
        looked_up = () if not multiplied or self.model.is_tied else self.model.lookups
        return self.model.num_params({name: leaf for name, leaf in leaves.items() if name not in looked_up})

    def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of `size` rows as ShapeDtypeStructs."""
        return {name: _like(values, self._rows) for name, values in self.task.batch_spec(size).items()}

    def compile(self) -> tuple[Callable[..., Any], jax.stages.Compiled]:
        """`train_step` for batches of `batch_size`, `eval_step` for its micro-batches, compiled."""
        size, step = self.config.batch_size, transformer.needed_step(self.model, self.state.step)
        train_step = self.train_step.lower(self.state, self.batch(size)).compile()
        return (
            _WithFixed(train_step) if self.has_fixed else train_step,
            self.eval_step.lower(
                self.state.averaged, self.batch(size // self.config.accumulate), step, *self.references
            ).compile(),
        )


class _WithFixed:
    """A train step that neither donates nor returns what no update changes: the state that it returns keeps it.

    `function` is that of `_without_fixed`, jitted or compiled.
    """

    def __init__(self, function: Any):
        self._function = function

    def __call__(self, state: step.State, batch: Any) -> tuple[step.State, dict[str, jax.Array]]:
        after, metrics = self._function(state.own, state.fixed, batch)
        return after.with_fixed(state.fixed), metrics

    def lower(self, state: step.State, batch: Any) -> jax.stages.Lowered:
        """Returns the lowered function of (the state without what no update changes, that, batch)."""
        return self._function.lower(state.own, state.fixed, batch)


def _without_fixed(train_step: Callable[..., Any]) -> Callable[..., Any]:
    def update(own: step.State, fixed: tuple[Any, Any], batch: Any) -> tuple[step.State, dict[str, jax.Array]]:
        after, metrics = train_step(own.with_fixed(fixed), batch)
        return after.own, metrics

    return update


def _check_sizes(config: configs.Config, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
    parts, tensor = meshes.row_parts(mesh), mesh.shape['tensor']
    if config.batch_size % (config.accumulate * parts):
        raise UsageError(
            f'config.batch_size={config.batch_size} is not divisible by config.accumulate={config.accumulate} '
            f'times {parts} parts (config.mesh.data times config.mesh.fsdp)'
        )
    if (heads := config.model.kv_heads) % tensor:
        raise UsageError(
            f'{heads} key/value heads (config.model.num_kv_heads, num_heads) are not divisible by '
            f'config.mesh.tensor={tensor}'
        )


def attention_kernel(config: configs.Config, device: jax.Device | None) -> str:
    """Returns the attention kernel of a run on a kind of device; see kernels/attention.py."""
    return attention.choose_kernel(
        device,
        config.compute_dtype,
        config.model.head_size,
        config.seq_length,
        wanted=config.model.attention,
        deterministic_mask=config.deterministic and (config.data.mode == 'pack' or config.task.name in OF_PAIRS),
    )


def _like(array: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

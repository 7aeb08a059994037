"""The stack of layers that all our networks share: norms, attention, MLP, and the one residual rule.

B batch, T length, D width, H query heads, K key/value heads, F MLP width, L layers. Equal neighbouring layers are one
run, executed by one `nn.scan` over stacked parameters, so compile time grows with the number of runs, not with depth.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.models import placements
from mixln_jax.models.attention import Attention
from mixln_jax.models.layers import LOGITS, MLP, RMSNorm


def _dots(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """Returns whether the backward pass keeps a result: those of matrices, but not rotated heads [B,T,H,d] on TPUs."""
    saveable = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)
    return saveable and arguments[0].ndim < 4


REMAT_POLICIES = {
    'dots': _dots,
    'full': jax.checkpoint_policies.nothing_saveable,
}
UNROLL_UP_TO = 12  # layers; beyond it `auto` keeps the loop, for the compile time


@dataclasses.dataclass(frozen=True)
class Parts:
    """The modules that the layers of a family are made of, with the fields and arguments of LLaMA's, the defaults."""

    norm: type[nn.Module] = RMSNorm
    attention: type[nn.Module] = Attention
    mlp: type[nn.Module] = MLP


class Layer(nn.Module):
    """Attention, then MLP, each put into the residual stream by its placement."""

    config: configs.Model
    dtype: jnp.dtype
    placement: placements.Layer
    stream_sharding: jax.sharding.NamedSharding | None
    capture: bool = False
    parts: Parts = Parts()
    kernel: str = 'blocks'  # of attention

    @nn.compact
    def __call__(self, x: jax.Array, per_layer: Mapping[str, Any], angles: Any, mask: jax.Array | None) -> tuple:
        """Runs one layer on the stream x [B,T,D].

        `per_layer` holds its constants and, under `layer_mask`, whether it runs. Returns the stream after it and None.
        With `capture` the second result has `hidden`, that stream, and `branches`, for each sub-layer [2,B,T] the norms
        of the stream before it and of what it adds, and the mean of the latter.
        """
        branches: list[dict[str, jax.Array]] = []
        attend = self.parts.attention(self.config, self.dtype, self.placement.qkv_norm, self.kernel, name='attention')
        mlp = self.parts.mlp(self.config, self.dtype, name='mlp')
        constants = per_layer['constants']
        if self.stream_sharding:
            x = jax.lax.with_sharding_constraint(x, self.stream_sharding)
        y = self.residual(
            x,
            lambda h: attend(h, angles, mask),
            self.placement.attention,
            constants['attention'],
            'attention',
            branches,
        )
        y = self.residual(y, mlp, self.placement.mlp, constants['mlp'], 'mlp', branches)
        y = jnp.where(per_layer['layer_mask'], y, x) if 'layer_mask' in per_layer else y
        return y, {'hidden': y, 'branches': jax.tree.map(lambda *a: jnp.stack(a), *branches)} if self.capture else None

    def residual(
        self,
        x: jax.Array,
        sublayer: Callable[[jax.Array], jax.Array],
        placement: placements.Placement,
        constants: dict[str, jax.Array],
        name: str,
        branches: list[dict[str, jax.Array]],
    ) -> jax.Array:
        """Returns the stream after a sub-layer, by the one residual rule (see placements.py).

        Factors act in float32, whatever type the stream has. With `capture` the norms of stream and branch are appended
        to `branches`.
        """
        groups = self.config.norm_groups if placement.grouped else 1
        norm = lambda at: self.parts.norm(self.config.norm_eps, self.dtype, groups, name=f'{name}_norm_{at}')  # noqa: E731
        factors = constants | {
            by: self.param(f'{name}_{by}', nn.initializers.zeros, x.shape[-1:] if factor.per_feature else ())
            for by, factor in placement.factors().items()
            if isinstance(factor, placements.Learned)
        }
        scaled = lambda a, by: a.astype(jnp.float32) * factors[by] if by in factors else a  # noqa: E731
        if placement.residual_normed:
            x = norm('in')(x)
        h = sublayer(norm('in')(x, factors.get('in_scale')) if placement.pre else x)
        if placement.out:
            h = norm('out')(h)
        h = scaled(scaled(h, 'branch_scale'), 'ramp')
        if self.capture:
            before, added = x.astype(jnp.float32), h.astype(jnp.float32)
            length = functools.partial(jnp.linalg.norm, axis=-1)
            branches.append({'stream_norm': length(before), 'norm': length(added), 'mean': added.mean(axis=-1)})
        y = scaled(x, 'residual_scale') + h
        if placement.post:
            y = norm('post')(y)
        return y.astype(self.dtype)


class Stack(nn.Module):
    """L layers, run by run of equal neighbours; the parameters of run i are stacked, `segment_<i>/...` [n, ...], and so
    are the collections `cache`, `recent`, `intermediates` and `logits` (see Attention)."""

    config: configs.Model
    dtype: jnp.dtype
    norm_position: tuple[str, ...]
    layer_index: tuple[int, ...]
    depth: int
    stream_sharding: jax.sharding.NamedSharding | None = None
    parts: Parts = Parts()
    kernel: str = 'blocks'  # of attention; see kernels/attention.py

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: Any,
        mask: jax.Array | None = None,
        layer_mask: jax.Array | None = None,
        capture: bool = False,
        step: int | jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs the stream x [B,T,D] through the layers.

        Args:
            x: the embeddings.
            angles: from `rope.rope_cos_sin`; None: attention has no rotary positions.
            mask: bool, broadcast to [B,1,T,T]: which keys a query may see, of those that attention lets it see. None:
                all of them.
            layer_mask: [L] bool, traced: a layer that is False is the identity. None: all layers run.
            capture: whether to return what the layers capture.
            step: number of updates done, traced or not, at which ramps stand. None: they have ended.

        Returns:
            The stream after the last layer, and what every layer captures, stacked over layers [L,...], or None.
        """
        captured = []
        for number, (name, first, end) in enumerate(placements.layer_runs(self.norm_position)):
            x, ys = self.layer_run(number, placements.PLACEMENTS[name], end - first, capture)(
                x, self.per_layer(placements.PLACEMENTS[name], first, end, layer_mask, step), angles, mask
            )
            captured.append(ys)
        return x, jax.tree.map(lambda *a: jnp.concatenate(a), *captured) if capture else None

    def layer_run(self, number: int, placement: placements.Layer, length: int, capture: bool) -> Callable:
        """Returns `length` equal layers as one loop: (x, per_layer, angles, mask) -> (x, what they capture)."""
        remat = self.config.remat
        # Unrolled, XLA finds the recomputation equal to the computation and keeps the latter: no memory is saved.
        auto = len(self.norm_position) <= UNROLL_UP_TO and remat == 'none'
        unrolled = {'all': True, '1': False, 'auto': auto}[self.config.scan_unroll]
        layer = Layer
        if remat != 'none':
            layer = nn.remat(Layer, policy=REMAT_POLICIES[remat], prevent_cse=unrolled)
        loop = nn.scan(
            lambda layer, x, *others: layer(x, *others),
            variable_axes={'params': 0, 'dropout': 0, 'cache': 0, 'recent': 0, 'intermediates': 0, LOGITS: 0},
            split_rngs={'params': True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=length,
            unroll=length if unrolled else 1,
        )
        name = f'segment_{number}'
        return functools.partial(
            loop,
            layer(
                self.config,
                self.dtype,
                placement,
                self.stream_sharding,
                capture,
                self.parts,
                self.kernel,
                name=name,
            ),
        )

    def per_layer(
        self,
        placement: placements.Layer,
        first: int,
        end: int,
        layer_mask: jax.Array | None,
        step: int | jax.Array | None,
    ) -> dict[str, Any]:
        """Returns what differs between the layers of a run, each value with a leading axis over them."""
        index = self.layer_index[first:end]
        constants = {
            name: {
                **{by: np.array(values, np.float32) for by, values in at.constants(index, self.depth).items()},
                **at.ramp_factors(index, self.config.ramp_steps, total_step(self.config, step)),
            }
            for name, at in (('attention', placement.attention), ('mlp', placement.mlp))
        }
        return {'constants': constants} | ({} if layer_mask is None else {'layer_mask': layer_mask[first:end]})


def total_step(config: configs.Model, step: Any) -> Any:
    """Returns the step at which the ramps of a network stand after `step` updates: they began `config.ramp_offset`
    updates earlier. None: they are done."""
    return None if step is None else step + config.ramp_start


def needed_step(model: nn.Module, step: int | jax.Array | None) -> int | jax.Array | None:
    """Returns `step` where some layers of a network have a ramp, else None: programs of other networks take no step."""
    return step if placements.has_ramp(model.norm_position) else None


def measured(norm_position: Iterable[str]) -> bool:
    """Returns whether some layers have factors that are set before the first step."""
    return any(
        isinstance(factor, placements.Learned) and factor.measured
        for name in norm_position
        for factor in placements.PLACEMENTS[name].attention.factors().values()
    )


def with_omega(stack: Mapping[str, Any], norm_position: Sequence[str], omega: jax.Array) -> dict[str, Any]:
    """Returns the parameters of a Stack with `omega` [2L] in every factor that is measured."""
    by_layer, changed = omega.reshape(-1, 2), dict(stack)
    for number, (name, first, end) in enumerate(placements.layer_runs(norm_position)):
        for at, sublayer in enumerate(('attention', 'mlp')):
            for by, factor in getattr(placements.PLACEMENTS[name], sublayer).factors().items():
                if isinstance(factor, placements.Learned) and factor.measured:
                    segment = changed[f'segment_{number}']
                    leaf = segment[f'{sublayer}_{by}']
                    values = jnp.broadcast_to(by_layer[first:end, at, None], leaf.shape).astype(leaf.dtype)
                    changed[f'segment_{number}'] = segment | {f'{sublayer}_{by}': values}
    return changed


def split_layers(stack: Mapping[str, Any], norm_position: Sequence[str]) -> list[Any]:
    """Returns the parameters of a Stack as a list of L single layers."""
    layers: list[Any] = []
    for number, (_, first, end) in enumerate(placements.layer_runs(norm_position)):
        layers += [jax.tree.map(lambda leaf, i=i: leaf[i], stack[f'segment_{number}']) for i in range(end - first)]
    return layers


def stack_layers(layers: Sequence[Any], norm_position: Sequence[str]) -> dict[str, Any]:
    """Returns the parameters of L single layers as those of a Stack; the inverse of `split_layers`."""
    return {
        f'segment_{number}': jax.tree.map(lambda *leaves: np.stack(leaves), *layers[first:end])
        for number, (_, first, end) in enumerate(placements.layer_runs(norm_position))
    }


def branch_variances(branches: Mapping[str, jax.Array], mask: jax.Array, width: int) -> jax.Array:
    """Returns Var[F] of what every sub-layer adds to the stream, over all features of the positions that count.

    Args:
        branches: `norm` and `mean` [L,2,B,T]; see `backbone`.
        mask: [B,T], 1 at positions that count.
        width: D.

    Returns:
        [2L]: attention and MLP of layer 1, of layer 2 and so on.
    """
    over = lambda values: (values * mask).sum((-2, -1)) / mask.sum()  # noqa: E731
    return (over(jnp.square(branches['norm'])) / width - jnp.square(over(branches['mean']))).reshape(-1)

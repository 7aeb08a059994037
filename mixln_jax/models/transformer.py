"""The stack of layers that every network of ours shares: norms, attention, MLP, and the one residual rule.

B batch, T length, D width, H query heads, K key/value heads, F MLP width, L layers. Equal neighbouring layers are one
segment, run by one `nn.scan` over stacked parameters, so compile time grows with segments and not with depth.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.models import attention, norms


def _dots(primitive, *arguments, **parameters):
    """Whether the backward pass keeps a result: those of matrices, but not of turned heads [B,T,H,d] on TPUs."""
    saveable = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *arguments, **parameters)
    return saveable and arguments[0].ndim < 4


REMAT_POLICIES = {
    'dots': _dots,
    'full': jax.checkpoint_policies.nothing_saveable,
}
UNROLL_UP_TO = 12  # layers; beyond it `auto` keeps the loop, for the compile time


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019: x / sqrt(mean(x^2) + eps) * gain, in float32, times a constant; the mean is taken over
    each of `groups` equal parts of the features."""

    eps: float
    dtype: jnp.dtype
    groups: int = 1

    @nn.compact
    def __call__(self, x, constant=None):
        gain = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        y = _rms_norm(x, gain, self.eps, self.groups)
        return (y if constant is None else y * constant).astype(self.dtype)


@functools.partial(jax.checkpoint, static_argnums=(2, 3))  # else several float32 copies of x are kept
def _rms_norm(x, gain, eps, groups):
    x = x.astype(jnp.float32)
    if groups == 1:
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps) * gain
    parts = x.reshape(*x.shape[:-1], groups, -1)
    parts *= jax.lax.rsqrt(jnp.mean(jnp.square(parts), axis=-1, keepdims=True) + eps)
    return parts.reshape(x.shape) * gain


class Embedding(nn.Module):
    """A row of a table for every id. Its values come from `initialize`."""

    rows: int
    features: int
    dtype: jnp.dtype
    stream_sharding: jax.sharding.NamedSharding | None

    def setup(self):
        self.embedding = self.param('embedding', nn.initializers.zeros, (self.rows, self.features))

    def attend(self, x):
        """[...,D] -> [...,rows] float32: the table as a head."""
        return product(x.astype(jnp.float32), self.embedding.T.astype(jnp.float32))

    def __call__(self, ids):
        """[B,T] -> [B,T,D]."""
        table = self.embedding.astype(self.dtype)
        if not self.stream_sharding:
            return table[ids]
        # Gathered as every matrix is: rows looked up in parts of it would have to be put together again.
        everywhere = jax.sharding.NamedSharding(self.stream_sharding.mesh, jax.sharding.PartitionSpec())
        x = jax.lax.with_sharding_constraint(table, everywhere)[ids]
        return jax.lax.with_sharding_constraint(x, self.stream_sharding)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    config: configs.Model
    dtype: jnp.dtype
    qkv_norm: bool = False

    @nn.compact
    def __call__(self, x_BTD, angles, mask):
        D, H, K = self.config.hidden_size, self.config.num_heads, self.config.kv_heads
        head_dim, bias = self.config.head_size, self.config.attention_bias

        def heads(name, count):
            y = linear(count * head_dim, self.dtype, name, bias)(x_BTD).reshape(*x_BTD.shape[:2], count, head_dim)
            return RMSNorm(self.config.norm_eps, self.dtype, name=f'{name}_norm')(y) if self.qkv_norm else y

        scaled = [a / head_dim**0.5 for a in angles]  # turning the queries by these divides them too
        q, k = attention.rotate(heads('q', H), scaled), attention.rotate(heads('k', K), angles)
        by_cudnn = self.config.attention == 'cudnn' and q.dtype == jnp.bfloat16  # analyses in training are in float32
        attend = attention.cudnn_attention if by_cudnn else attention.causal_attention
        y_BTHd = attend(q, k, heads('v', K), mask)
        return linear(D, self.dtype, 'o', bias)(y_BTHd.reshape(*x_BTD.shape[:2], H * head_dim))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    config: configs.Model
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD):
        into = lambda name: linear(self.config.intermediate_size, self.dtype, name, self.config.mlp_bias)(x_BTD)  # noqa: E731
        y = _gated(into('gate'), into('up'))
        return linear(self.config.hidden_size, self.dtype, 'down', self.config.mlp_bias)(y)


@jax.checkpoint  # of both alone the backward pass makes the rest
def _gated(gate, up):
    return nn.silu(gate) * up


def linear(features, dtype, name, bias=False):
    """A matrix, without bias unless it is asked for; its values come from `initialize`, or from a file."""
    return nn.Dense(
        features, use_bias=bias, dtype=dtype, name=name, kernel_init=nn.initializers.zeros, dot_general=_dot_general
    )


def _dot_general(x, kernel, *_, **__):
    return product(x, kernel)


@jax.custom_vjp
def product(x, kernel):
    """[..., D] times [D, F], with a gradient in an order that suits CPUs.

    JAX would write that of the kernel as (dy^T x)^T, for which XLA on CPU transposes dy, and what made dy with it; with
    x^T dy a whole train step takes a sixth less (benchmarks/NOTES.md). Elsewhere compilers choose the order themselves.
    """
    return x @ kernel


def _product_forward(x, kernel):
    return x @ kernel, (x, kernel)


def _product_backward(saved, dy):
    x, kernel = saved
    dot = functools.partial(jnp.einsum, precision=attention.precision(x))
    dx = dot('...f,df->...d', dy, kernel)
    if kernel.shape[0] > kernel.shape[1]:  # of x and dy the smaller one is transposed
        return dx, dot('...f,...d->fd', dy, x).T
    return dx, dot('...d,...f->df', x, dy)


product.defvjp(_product_forward, _product_backward)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the layers of a family of networks are made of: modules with the fields and arguments of LLaMA's, here."""

    norm: type[nn.Module] = RMSNorm
    attention: type[nn.Module] = Attention
    mlp: type[nn.Module] = MLP


class Layer(nn.Module):
    """Attention, then MLP, each put into the residual stream by its placement."""

    config: configs.Model
    dtype: jnp.dtype
    placement: norms.Layer
    stream_sharding: jax.sharding.NamedSharding | None
    capture: bool = False
    parts: Parts = Parts()

    @nn.compact
    def __call__(self, x, per_layer, angles, mask):
        """One layer on the stream x [B,T,D]; `per_layer` holds its constants and, under `keep`, whether it is there.

        Returns the stream behind it and, with `capture`, `hidden`: that stream, `branches`: per sub-layer [2,B,T] the
        norms of the stream before it and of what it adds, and the mean of the latter; else None.
        """
        branches = []
        attend = self.parts.attention(self.config, self.dtype, self.placement.qkv_norm, name='attention')
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
        y = jnp.where(per_layer['keep'], y, x) if 'keep' in per_layer else y
        return y, {'hidden': y, 'branches': jax.tree.map(lambda *a: jnp.stack(a), *branches)} if self.capture else None

    def residual(self, x, sublayer, placement, constants, name, branches):
        """The one residual rule (see norms.py). Factors act in float32, whatever type the stream has."""
        groups = self.config.norm_groups if placement.grouped else 1
        norm = lambda at: self.parts.norm(self.config.norm_eps, self.dtype, groups, name=f'{name}_norm_{at}')  # noqa: E731
        factors = constants | {
            by: self.param(f'{name}_{by}', nn.initializers.zeros, x.shape[-1:] if factor.per_feature else ())
            for by, factor in placement.factors().items()
            if isinstance(factor, norms.Learned)
        }
        scaled = lambda a, by: a.astype(jnp.float32) * factors[by] if by in factors else a  # noqa: E731
        if placement.residual_normed:
            x = norm('in')(x)
        h = sublayer(norm('in')(x, factors.get('in_scale')) if placement.pre else x)
        if placement.out:
            h = norm('out')(h)
        h = scaled(h, 'branch_scale')
        if self.capture:
            before, added = x.astype(jnp.float32), h.astype(jnp.float32)
            length = functools.partial(jnp.linalg.norm, axis=-1)
            branches.append({'stream_norm': length(before), 'norm': length(added), 'mean': added.mean(axis=-1)})
        y = scaled(x, 'residual_scale') + h
        if placement.post:
            y = norm('post')(y)
        return y.astype(self.dtype)


class Stack(nn.Module):
    """L layers, segment by segment; parameters are stacked over the layers of a segment, `segment_<i>/...` [n, ...]."""

    config: configs.Model
    dtype: jnp.dtype
    norm_position: tuple[str, ...]
    layer_index: tuple[int, ...]
    depth: int
    stream_sharding: jax.sharding.NamedSharding | None = None
    parts: Parts = Parts()

    @nn.compact
    def __call__(self, x, angles, mask=None, keep=None, capture=False):
        """Runs the stream x [B,T,D] through the layers.

        `angles` are `attention.rotary_angles`, None: attention has none. `mask` [B,1,T,T] bool, or what broadcasts to
        it, says which keys a query sees of those that attention lets it see, None: all of them.
        `keep` [L] (traced) removes layers: one that is False is the identity. With `capture` the second result is what
        every layer captures, stacked over them [L,...], else None.
        """
        captured = []
        for number, (name, first, end) in enumerate(norms.segments(self.norm_position)):
            x, ys = self.segment(number, norms.PLACEMENTS[name], end - first, capture)(
                x, self.per_layer(norms.PLACEMENTS[name], first, end, keep), angles, mask
            )
            captured.append(ys)
        return x, jax.tree.map(lambda *a: jnp.concatenate(a), *captured) if capture else None

    def segment(self, number, placement, length, capture):
        """`length` equal layers as one loop: (x, per_layer, angles, mask) -> (x, what they capture)."""
        remat = self.config.remat
        # Unrolled, XLA finds the recomputation equal to the computation and keeps the latter: no memory is saved.
        auto = len(self.norm_position) <= UNROLL_UP_TO and remat == 'none'
        unrolled = {'all': True, '1': False, 'auto': auto}[self.config.scan_unroll]
        layer = Layer
        if remat != 'none':
            layer = nn.remat(Layer, policy=REMAT_POLICIES[remat], prevent_cse=unrolled)
        loop = nn.scan(
            lambda layer, x, *others: layer(x, *others),
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=length,
            unroll=length if unrolled else 1,
        )
        name = f'segment_{number}'
        return functools.partial(
            loop, layer(self.config, self.dtype, placement, self.stream_sharding, capture, self.parts, name=name)
        )

    def per_layer(self, placement, first, end, keep):
        """What differs between the layers of a segment, each a value with a leading axis over them."""
        index = self.layer_index[first:end]
        constants = {
            name: {by: np.array(values, np.float32) for by, values in at.constants(index, self.depth).items()}
            for name, at in (('attention', placement.attention), ('mlp', placement.mlp))
        }
        return {'constants': constants} | ({} if keep is None else {'keep': keep[first:end]})


def measured(norm_position):
    """Whether some layers have factors that are set before the first step."""
    return any(
        isinstance(factor, norms.Learned) and factor.measured
        for name in norm_position
        for factor in norms.PLACEMENTS[name].attention.factors().values()
    )


def with_omega(stack, norm_position, omega):
    """The parameters of a Stack with `omega` [2L] in every factor that is measured."""
    by_layer, changed = omega.reshape(-1, 2), dict(stack)
    for number, (name, first, end) in enumerate(norms.segments(norm_position)):
        for at, sublayer in enumerate(('attention', 'mlp')):
            for by, factor in getattr(norms.PLACEMENTS[name], sublayer).factors().items():
                if isinstance(factor, norms.Learned) and factor.measured:
                    segment = changed[f'segment_{number}']
                    leaf = segment[f'{sublayer}_{by}']
                    values = jnp.broadcast_to(by_layer[first:end, at, None], leaf.shape).astype(leaf.dtype)
                    changed[f'segment_{number}'] = segment | {f'{sublayer}_{by}': values}
    return changed


def split_layers(stack, norm_position):
    """The parameters of a Stack as a list of L single layers."""
    layers = []
    for number, (_, first, end) in enumerate(norms.segments(norm_position)):
        layers += [jax.tree.map(lambda leaf, i=i: leaf[i], stack[f'segment_{number}']) for i in range(end - first)]
    return layers


def stack_layers(layers, norm_position):
    """The parameters of L single layers as those of a Stack; the inverse of `split_layers`."""
    return {
        f'segment_{number}': jax.tree.map(lambda *leaves: np.stack(leaves), *layers[first:end])
        for number, (_, first, end) in enumerate(norms.segments(norm_position))
    }

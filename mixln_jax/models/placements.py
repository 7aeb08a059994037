"""Placements: where the norms of a layer sit, as data. The only room that knows their names.

A sub-layer F (attention or MLP) changes the residual stream x by one rule, `transformer.residual`:

    x = N_in(x)                                            if residual_normed
    h = F(N_in(x) * in_scale if pre else x)
    h = N_out(h)                                           if out
    y = residual_scale * x + branch_scale * h
    y = N_post(y)                                          if post
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable

import jax.numpy as jnp

from mixln_jax.system.errors import UsageError, nearest

Constant = Callable[[int, int], float]  # (layer_index l = 1..L, depth L) -> factor


@dataclasses.dataclass(frozen=True)
class Learned:
    """A factor that is trained: a scalar, or one number a feature of the stream."""

    start: float
    per_feature: bool = False
    measured: bool = False  # set before the first step by `admin_omega`


@dataclasses.dataclass(frozen=True)
class Placement:
    """The switches and factors of the residual rule for one sub-layer; a factor of None is 1."""

    pre: bool = False
    out: bool = False
    post: bool = False
    residual_normed: bool = False
    grouped: bool = False  # every N divides each of config.norm_groups groups of features by its own root mean square
    in_scale: Constant | Learned | None = None
    residual_scale: Constant | Learned | None = None
    branch_scale: Constant | Learned | None = None

    def factors(self):
        """The factors that are not 1, by name."""
        named = {name: getattr(self, name) for name in ('in_scale', 'residual_scale', 'branch_scale')}
        return {name: factor for name, factor in named.items() if factor}

    def constants(self, layer_index, depth):
        """Those that are not learned, each a list with one number a layer of `layer_index`."""
        named = {name: rule for name, rule in self.factors().items() if not isinstance(rule, Learned)}
        return {name: [rule(l, depth) for l in layer_index] for name, rule in named.items()}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's two placements and what else belongs to them."""

    attention: Placement
    mlp: Placement
    init: str | None = None  # initialisation; None: the config's choice alone
    qkv_norm: bool = False  # queries, keys and values of every head are normalised, before the rotation
    embed_norm: bool = False  # as first layer: what the embedding gives is normalised


def _both(placement, **layer):
    return Layer(placement, placement, **layer)


def _inverse_root_of_index(layer_index, depth):
    """Sun et al. 2025, The Curse of Depth (arXiv 2502.05795), equation 6."""
    del depth
    return layer_index**-0.5


def _deepnorm_alpha(layer_index, depth):
    """Wang et al. 2022, DeepNet (arXiv 2203.00555), table of section 3.1, decoder only."""
    del layer_index
    return (2 * depth) ** 0.25


def _deepnorm_alpha_of_32(layer_index, depth):
    """What the Mix-LN authors' code has at any depth (modeling_llama.py)."""
    return _deepnorm_alpha(layer_index, 32)


def _admin_constant(layer_index, depth):
    """The closed form for n residual sub-layers of PyPI's admin-torch 0.1.0, calculate_init."""
    del layer_index
    n = 2 * depth
    return ((n + 1) / math.log(n + 1) - 1) ** 0.5


def admin_omega(variances):
    """omega of every sub-layer before training: sqrt(sum of Var[F_j] over the sub-layers before it), 1 for the first.

    Liu et al. 2020 (arXiv 2004.08249), section 4.2. `variances` [2L]: attention and MLP of layer 1, of layer 2 and so
    on, from one forward pass with every omega 1.
    """
    return jnp.sqrt(jnp.concatenate([jnp.ones(1), jnp.cumsum(variances)[:-1]]))


_OMEGA = Learned(1.0, per_feature=True, measured=True)

PLACEMENTS = {
    'pre': _both(Placement(pre=True)),
    'post': _both(Placement(post=True)),
    'sandwich': _both(Placement(pre=True, out=True)),
    'res_post': _both(Placement(out=True)),
    'deepnorm': _both(Placement(post=True, residual_scale=_deepnorm_alpha), init='deepnorm'),
    'lns': _both(Placement(pre=True, in_scale=_inverse_root_of_index)),
    'peri': _both(Placement(pre=True, out=True), embed_norm=True),
    'hybridnorm': Layer(Placement(), Placement(residual_normed=True), qkv_norm=True),
    'hybridnorm_first': _both(Placement(pre=True), qkv_norm=True),
    'scale_res_pre': _both(Placement(pre=True, branch_scale=Learned(0.001))),
    'admin': _both(Placement(post=True, residual_scale=_OMEGA)),
    'admin_constant': _both(Placement(post=True, residual_scale=_admin_constant)),
    'group_pre': _both(Placement(pre=True, grouped=True)),
    'deepnorm_official': _both(Placement(post=True, residual_scale=_deepnorm_alpha_of_32), init='deepnorm_official'),
}


def _first(count, name, then):
    return lambda layers: (name,) * min(count, layers) + (then,) * (layers - count)


def _every_fourth(name, others):
    return lambda layers: tuple(name if l % 4 == 0 else others for l in range(1, layers + 1))


OFFICIAL = {'deepnorm': 'deepnorm_official'}  # what the Mix-LN authors' code computes under a name

# A scheme makes the whole list: number of layers -> names. Those after the second are the authors' (NORM_TYPE).
SCHEMES = {
    'mix': None,  # needs post_ratio as well
    'hybridnorm_star': _first(1, 'hybridnorm_first', then='hybridnorm'),
    'pre_post': _first(7, 'pre', then='post'),
    'pre_sandwich': _first(7, 'pre', then='sandwich'),
    'pre_post_pre_post': _every_fourth('post', others='pre'),
    'post_pre_post_pre': _every_fourth('pre', others='post'),
}


def post_layers(num_layers, post_ratio):
    """How many layers from the input are Post-LN under Mix-LN: alpha * L, rounded (Table 5's .33 means 8 of 24)."""
    return math.floor(post_ratio * num_layers + 0.5)


def resolve(norm_position, num_layers, post_ratio=0.25):
    """The placement name of each layer.

    Args:
        norm_position: a name for all layers, a scheme, or a list of `num_layers` names, `post*3,pre*9`.
        num_layers: L.
        post_ratio: alpha, the share of Post-LN layers under `mix`.

    Returns:
        A tuple of L names.

    Raises:
        UsageError: unknown name, bad repeat count, or a list of another length.
    """
    norm_position = norm_position.strip()
    if norm_position == 'mix':
        return _first(post_layers(num_layers, post_ratio), 'post', then='pre')(num_layers)
    if norm_position in SCHEMES:
        return SCHEMES[norm_position](num_layers)
    if norm_position in PLACEMENTS:
        return (norm_position,) * num_layers
    names = []
    for item in norm_position.split(','):
        match = re.fullmatch(r'\s*(\w+)\s*(?:\*\s*([1-9]\d{0,5}))?\s*', item)
        if not match:
            raise UsageError(f'config.model.norm_position={norm_position!r}: {item!r} is not a name or name*count')
        name, count = match[1], int(match[2] or 1)
        if name not in PLACEMENTS:
            known = [*PLACEMENTS, *SCHEMES]
            scheme = ' is a scheme for all layers and' if name in SCHEMES else ''
            raise UsageError(
                f'config.model.norm_position={norm_position!r}: {name!r}{scheme} is not one of '
                f'{", ".join(PLACEMENTS if scheme else known)}{"" if scheme else nearest(name, known)}'
            )
        names += [name] * count
    if len(names) != num_layers:
        raise UsageError(
            f'config.model.norm_position={norm_position!r} lists {len(names)} layers, '
            f'config.model.num_layers is {num_layers}'
        )
    return tuple(names)


def layer_runs(norm_position):
    """Runs of equal neighbours: [(name, first, end)], layers counted from 0. Each is one compiled loop."""
    runs, first = [], 0
    for name, group in itertools.groupby(norm_position):
        end = first + len(list(group))
        runs.append((name, first, end))
        first = end
    return runs


def spelled(norm_position):
    """The names of all layers for people, `post x 3, pre x 9`."""
    return ', '.join(f'{name} x {end - first}' for name, first, end in layer_runs(norm_position))


def growth_factors(norm_position, layer_index, depth):
    """The factor that a layer's norms give its sub-layers' inputs: [L], 1/sqrt(l) under LNS, 1 in other layers that are
    Pre-LN and nothing else, NaN in all others, to which the Curse of Depth's theory does not speak."""
    found = []
    for name, index in zip(norm_position, layer_index, strict=True):
        at = PLACEMENTS[name].attention
        rest = dataclasses.replace(at, in_scale=None, grouped=False)
        about = at == PLACEMENTS[name].mlp and rest == Placement(pre=True)
        found.append(at.constants([index], depth).get('in_scale', [1.0])[0] if about else math.nan)
    return found


def warnings(norm_position, init, warmup_ratio):
    """Combinations that are known to train badly, a line each."""
    if 'lns' in norm_position and init == 'scaled':
        yield 'model.init=scaled undoes the gain of layer-norm scaling (lns): use model.init=normal'
    if any(PLACEMENTS[name].attention.post for name in norm_position) and warmup_ratio < 0.1:
        yield f'Post-LN layers need a warm-up of about 10 % of the steps, optim.warmup_ratio is {warmup_ratio:g}'

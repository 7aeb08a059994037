"""Placements: where the norms of a layer sit, as data. The only module that knows their names.

A sub-layer F (attention or MLP) changes the residual stream x by one rule, `transformer.residual`:

    x = N_in(x)                                            if residual_normed
    h = F(N_in(x) * in_scale if pre else x)
    h = N_out(h)                                           if out
    y = residual_scale * x + ramp * branch_scale * h
    y = N_post(y)                                          if post

A name may have modifiers: `pre+prores` is the row of `pre` with a ramp.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax.system.errors import UsageError, nearest

Constant = Callable[[int, int], float]  # (layer_index l = 1..L, depth L) -> factor
Scheme = Callable[[int], tuple[str, ...]]  # number of layers -> the names of all layers
# (updates done t, layer_index l [n], config.model.ramp_steps T) -> factor [n] in float32
Ramp = Callable[[int | jax.Array, Sequence[int], int], np.ndarray | jax.Array]


@dataclasses.dataclass(frozen=True)
class Learned:
    """A factor that is trained: a scalar, or one number per feature of the stream."""

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
    ramp: Ramp | None = None  # one more factor of the branch, which depends on the step

    def factors(self) -> dict[str, Constant | Learned]:
        """Returns the factors that are not 1, by name."""
        named = {name: getattr(self, name) for name in ('in_scale', 'residual_scale', 'branch_scale')}
        return {name: factor for name, factor in named.items() if factor}

    def constants(self, layer_index: Sequence[int], depth: int) -> dict[str, list[float]]:
        """Returns the factors that are not learned, each a list with one number per layer of `layer_index`."""
        named = {name: rule for name, rule in self.factors().items() if not isinstance(rule, Learned)}
        return {name: [rule(l, depth) for l in layer_index] for name, rule in named.items()}

    def ramp_factors(
        self, layer_index: Sequence[int], ramp_steps: int, step: int | jax.Array | None
    ) -> dict[str, np.ndarray | jax.Array]:
        """Returns {'ramp': [n]}, float32: the ramp's factor for each layer of `layer_index` after `step` updates.

        {} where every factor is 1: without a ramp, or with `step` None, which means that the ramp is done.
        """
        return {'ramp': self.ramp(step, layer_index, ramp_steps)} if self.ramp and step is not None else {}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's two placements and what else belongs to them."""

    attention: Placement
    mlp: Placement
    init: str | None = None  # initialisation; None: the config's choice alone
    qkv_norm: bool = False  # queries, keys and values of every head are normalised, before the rotation
    embed_norm: bool = False  # as first layer: what the embedding gives is normalised


def _both(placement: Placement, **layer: Any) -> Layer:
    return Layer(placement, placement, **layer)


def _inverse_root_of_index(layer_index: int, depth: int) -> float:
    """Sun et al. 2025, The Curse of Depth (arXiv 2502.05795), equation 6."""
    del depth
    return layer_index**-0.5


def _deepnorm_alpha(layer_index: int, depth: int) -> float:
    """Wang et al. 2022, DeepNet (arXiv 2203.00555), table of section 3.1, decoder only."""
    del layer_index
    return (2 * depth) ** 0.25


def _deepnorm_alpha_of_32(layer_index: int, depth: int) -> float:
    """Returns DeepNorm's alpha of 32 layers, which the Mix-LN authors' code uses at any depth (modeling_llama.py)."""
    return _deepnorm_alpha(layer_index, 32)


def _admin_constant(layer_index: int, depth: int) -> float:
    """Returns the closed form for n residual sub-layers of PyPI's admin-torch 0.1.0, calculate_init."""
    del layer_index
    n = 2 * depth
    return ((n + 1) / math.log(n + 1) - 1) ** 0.5


def admin_omega(variances: jax.Array) -> jax.Array:
    """Returns omega [2L] before training: sqrt(sum of Var[F_j] over the sub-layers before each), 1 for the first.

    Liu et al. 2020 (arXiv 2004.08249), section 4.2. `variances` [2L]: attention and MLP of layer 1, of layer 2 and so
    on, from one forward pass with every omega 1.
    """
    return jnp.sqrt(jnp.concatenate([jnp.ones(1), jnp.cumsum(variances)[:-1]]))


def _prores(step: int | jax.Array, layer_index: Sequence[int], ramp_steps: int) -> np.ndarray | jax.Array:
    """a(l, t) = min(t / (T l), 1): Chen et al. 2026, ProRes (arXiv 2603.05369), their `linear` schedule.

    t is the number of updates done, so all branches are 0 in the first update, as in the authors' code
    (dandingsky/ProRes 5253e0d, torchrun_main.py): it sets alpha from update_step = 0 before the first forward pass, and
    again after each update. In the first update the weights inside the branches have no gradient. The checkpoint of
    step t is evaluated at t, as the next update sees it.
    """
    end = np.float32(ramp_steps) * np.asarray(layer_index, np.float32)
    xp = jnp if isinstance(step, jax.Array) else np
    step = xp.asarray(step, np.float32)
    # XLA makes such a product of a quotient; numpy would not, and a known step is to give the bits of a traced one.
    return xp.where(step < end, step * (np.float32(1) / end), np.float32(1))


_OMEGA = Learned(1.0, per_feature=True, measured=True)

MODIFIERS = {'prores': {'ramp': _prores}}  # name -> fields of both placements of a layer


class _Rows(dict):
    """Rows by name. A name with modifiers, such as `pre+prores`, gives the changed row; iteration has plain names."""

    def __missing__(self, name: str) -> Layer:
        plain, *modifiers = name.split('+')
        if not modifiers:
            raise KeyError(name)
        layer = self[plain]
        for modifier in modifiers:
            attention, mlp = (dataclasses.replace(at, **MODIFIERS[modifier]) for at in (layer.attention, layer.mlp))
            layer = dataclasses.replace(layer, attention=attention, mlp=mlp)
        return layer


PLACEMENTS = _Rows({
    'pre': _both(Placement(pre=True)),
    'post': _both(Placement(post=True)),
    'sandwich': _both(Placement(pre=True, out=True)),
    'res_post': _both(Placement(out=True)),
    'deepnorm': _both(Placement(post=True, residual_scale=_deepnorm_alpha), init='deepnorm'),
    'lns': _both(Placement(pre=True, in_scale=_inverse_root_of_index)),
    'lns_branch': _both(Placement(pre=True, branch_scale=_inverse_root_of_index)),
    'peri': _both(Placement(pre=True, out=True), embed_norm=True),
    'hybridnorm': Layer(Placement(), Placement(residual_normed=True), qkv_norm=True),
    'hybridnorm_first': _both(Placement(pre=True), qkv_norm=True),
    'scale_res_pre': _both(Placement(pre=True, branch_scale=Learned(0.001))),
    'admin': _both(Placement(post=True, residual_scale=_OMEGA)),
    'admin_constant': _both(Placement(post=True, residual_scale=_admin_constant)),
    'group_pre': _both(Placement(pre=True, grouped=True)),
    'deepnorm_official': _both(Placement(post=True, residual_scale=_deepnorm_alpha_of_32), init='deepnorm_official'),
})  # fmt: skip


def _first(count: int, name: str, then: str) -> Scheme:
    return lambda layers: (name,) * min(count, layers) + (then,) * (layers - count)


def _every_fourth(name: str, others: str) -> Scheme:
    return lambda layers: tuple(name if l % 4 == 0 else others for l in range(1, layers + 1))


_OFFICIAL = {'deepnorm': 'deepnorm_official'}

# Those after the second are the authors' (NORM_TYPE).
SCHEMES: dict[str, Scheme | None] = {
    'mix': None,  # needs post_ratio as well
    'hybridnorm_star': _first(1, 'hybridnorm_first', then='hybridnorm'),
    'pre_post': _first(7, 'pre', then='post'),
    'pre_sandwich': _first(7, 'pre', then='sandwich'),
    'pre_post_pre_post': _every_fourth('post', others='pre'),
    'post_pre_post_pre': _every_fourth('pre', others='post'),
}


def official(name: str) -> str:
    """Returns the name of what the Mix-LN authors' code computes under a name."""
    plain, plus, modifiers = name.partition('+')
    return _OFFICIAL.get(plain, plain) + plus + modifiers


def has_ramp(norm_position: Iterable[str]) -> bool:
    """Returns whether some layers have a factor that depends on the step."""
    return any(at.ramp for name in norm_position for at in (PLACEMENTS[name].attention, PLACEMENTS[name].mlp))


def post_layers(num_layers: int, post_ratio: float) -> int:
    """Returns how many layers from the input are Post-LN under Mix-LN: alpha * L, rounded (Table 5: .33 is 8 of 24)."""
    return math.floor(post_ratio * num_layers + 0.5)


def resolve(norm_position: str, num_layers: int, post_ratio: float = 0.25) -> tuple[str, ...]:
    """Returns the placement name of each layer.

    Args:
        norm_position: a name for all layers, a scheme, or a list of `num_layers` names, `post*3,pre*9`. Each may have
            modifiers: `mix+prores`, `post+prores*3,pre*9`.
        num_layers: L.
        post_ratio: alpha, the share of Post-LN layers under `mix`.

    Returns:
        A tuple of L names.

    Raises:
        UsageError: unknown name or modifier, bad repeat count, or a list of another length.
    """
    norm_position = norm_position.strip()
    stated = f'config.model.norm_position={norm_position!r}'
    plain, plus, modifiers = norm_position.partition('+')
    if plain in (*SCHEMES, *PLACEMENTS) and '*' not in modifiers and ',' not in modifiers:
        _check_modifiers(stated, plain, modifiers.split('+') if plus else [])
        if plain == 'mix':
            names = _first(post_layers(num_layers, post_ratio), 'post', then='pre')(num_layers)
        else:
            scheme = SCHEMES.get(plain)
            names = scheme(num_layers) if scheme else (plain,) * num_layers
        return tuple(name + plus + modifiers for name in names)
    listed: list[str] = []
    for item in norm_position.split(','):
        match = re.fullmatch(r'\s*(\w+)((?:\+\w*)*)\s*(?:\*\s*([1-9]\d{0,5}))?\s*', item)
        if not match:
            raise UsageError(f'{stated}: {item!r} is not a name or name*count')
        name, modifiers, count = match[1], match[2], int(match[3] or 1)
        if name not in PLACEMENTS:
            known = [*PLACEMENTS, *SCHEMES]
            if name in MODIFIERS:
                raise UsageError(f'{stated}: +{name} goes after a name, as in pre+{name}')
            said = ' is a scheme for all layers and' if name in SCHEMES else ''
            raise UsageError(
                f'{stated}: {name!r}{said} is not one of '
                f'{", ".join(PLACEMENTS if said else known)}{"" if said else nearest(name, known)}'
            )
        _check_modifiers(stated, name, modifiers.split('+')[1:])
        listed += [name + modifiers] * count
    if len(listed) != num_layers:
        raise UsageError(f'{stated} lists {len(listed)} layers, config.model.num_layers is {num_layers}')
    return tuple(listed)


def _check_modifiers(stated: str, name: str, modifiers: Sequence[str]) -> None:
    """Raises UsageError for a modifier that is unknown, or that a name has twice."""
    for at, modifier in enumerate(modifiers):
        known = ', '.join(f'+{known}' for known in MODIFIERS)
        if not modifier:
            raise UsageError(f'{stated}: nothing follows the + after {name!r}, where {known} is expected')
        if modifier not in MODIFIERS:
            raise UsageError(
                f'{stated}: +{modifier} after {name!r} is not one of {known}{nearest(modifier, MODIFIERS)}'
            )
        if modifier in modifiers[:at]:
            raise UsageError(f'{stated}: {name!r} has +{modifier} twice')


def layer_runs(norm_position: Iterable[str]) -> list[tuple[str, int, int]]:
    """Returns the runs of equal neighbours, [(name, first, end)], layers counted from 0. Each is one compiled loop."""
    runs, first = [], 0
    for name, group in itertools.groupby(norm_position):
        end = first + len(list(group))
        runs.append((name, first, end))
        first = end
    return runs


def spelled(norm_position: Iterable[str]) -> str:
    """Returns the names of all layers for people, `post x 3, pre x 9`."""
    return ', '.join(f'{name} x {end - first}' for name, first, end in layer_runs(norm_position))


def growth_factors(
    norm_position: Sequence[str],
    layer_index: Sequence[int],
    depth: int,
    ramp_steps: int = 1,
    step: int | None = None,
) -> list[float]:
    """Returns the factor [L] by which each layer scales the inputs of its sub-layers after their norms.

    It is 1/sqrt(l) under LNS, 1 in other layers that are Pre-LN and nothing else, and NaN in all others, which the
    theory of the Curse of Depth does not cover. A ramp of `ramp_steps` that has not ended after `step` updates
    (None: it has) makes a layer one of those.
    """
    found = []
    for name, index in zip(norm_position, layer_index, strict=True):
        at = PLACEMENTS[name].attention
        rest = dataclasses.replace(at, in_scale=None, grouped=False, ramp=None)
        done = at.ramp_factors([index], ramp_steps, step).get('ramp', [1.0])[0] == 1
        about = at == PLACEMENTS[name].mlp and rest == Placement(pre=True) and done
        found.append(at.constants([index], depth).get('in_scale', [1.0])[0] if about else math.nan)
    return found


def warnings(
    norm_position: Sequence[str], init: str, warmup_ratio: float, num_steps: float = math.inf, ramp_steps: int = 0
) -> Iterator[str]:
    """Yields a line for each combination that is known to train badly."""
    if init == 'scaled' and any(name.split('+')[0] == 'lns' for name in norm_position):
        yield 'model.init=scaled undoes the gain of layer-norm scaling (lns): use model.init=normal'
    if any(PLACEMENTS[name].attention.post for name in norm_position) and warmup_ratio < 0.1:
        yield f'Post-LN layers need a warm-up of about 10 % of the steps, this one has {warmup_ratio:.2%}'
    ramped = [number for number, name in enumerate(norm_position, 1) if has_ramp([name])]
    if ramped and (end := ramp_steps * ramped[-1]) > num_steps:
        yield f'the ramp of layer {ramped[-1]} takes {end:,} steps, the run {num_steps:,}: lower model.ramp_steps'

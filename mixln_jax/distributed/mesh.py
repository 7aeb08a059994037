"""Devices and how they share the work.

Three axes: `data` (copies of the model, each with its rows of the batch), `fsdp` (as data, but every matrix is kept in
parts and gathered where it is needed; Rajbhandari et al. 2020, ZeRO-3) and `tensor` (each device computes its part of
every matrix product; Shoeybi et al. 2019, Megatron-LM).
"""

import ctypes
import importlib.metadata
import importlib.util
import math
import os
import platform
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.system.errors import DeviceError, UsageError, first_line

# Options of glibc's mallopt: no mappings of their own for large arrays, nothing given back, one heap, which grows by
# 256 MB: else a CPU faults in a step's temporaries, about 1 GB of them, afresh at every step.
HEAP = {'MMAP_MAX': (-4, 0), 'TRIM_THRESHOLD': (-1, 2**31 - 1), 'ARENA_MAX': (-8, 1), 'TOP_PAD': (-2, 2**28)}

AXES = ('data', 'fsdp', 'tensor')
ROWS = ('data', 'fsdp')  # the axes over which rows of a batch are split

# How a leaf of the train state is split: the first pattern found in its name decides, and of its choices the first
# whose axes divide the leaf's dimensions (those of one layer). No pattern matches everything: a new leaf needs a rule.
RULES = (
    (r'(^|/)(step|bad_step|count|ns_coeffs)$', P()),
    (r'/\d+/(v|v_row|v_col)/', P()),  # of adafactor's state: vectors, and matrices too small to factor
    (r'/(projector|base_optimizer_state)/', P('fsdp', None), P(None, 'fsdp'), P()),  # of galore: of a small rank
    (r'/embedding$', P('tensor', 'fsdp'), P(None, ('fsdp', 'tensor'))),
    (r'/head/kernel$', P('fsdp', 'tensor')),
    (r'/(q|k|v|gate|up|transform)/kernel$', P('fsdp', 'tensor'), P(('fsdp', 'tensor'), None)),
    (r'/(o|down)/kernel$', P('tensor', 'fsdp'), P(None, ('fsdp', 'tensor'))),
    (r'((norm\w*/|_)scale|/bias|/span/kernel)$', P()),
)


def keep_heap(kind: str):
    """Lets this process keep what memory it frees where its devices, of a kind as in `devices`, can only be CPUs.

    To be called before JAX starts, whose threads else have heaps of their own. No number changes. Only glibc can;
    whoever has set its MALLOC_ or GLIBC_TUNABLES variables keeps those.
    """
    other = importlib.metadata.entry_points(group='jax_plugins') or any(
        importlib.util.find_spec(name) for name in ('jax_plugins', 'libtpu')
    )
    cpu = kind == 'cpu' or jax.config.jax_platforms == 'cpu' or not other
    chosen = any(name.startswith('MALLOC_') for name in os.environ) or 'GLIBC_TUNABLES' in os.environ
    if cpu and not chosen and platform.libc_ver()[0] == 'glibc':
        for option in HEAP.values():
            ctypes.CDLL(None).mallopt(*option)


def devices(kind):
    """All devices of a kind ('auto': the best there is). Raises DeviceError where there is none."""
    if kind == 'cpu':
        jax.config.update('jax_platforms', 'cpu')  # has no effect, and needs none, once JAX is running
    try:
        return jax.devices(None if kind == 'auto' else kind)
    except (RuntimeError, AssertionError) as error:  # the latter: JAX_PLATFORMS names what is not installed
        raise DeviceError(f'config.device={kind}: there is no such device here ({first_line(error)})') from None


def resolve(sizes: configs.Mesh, count: int, named: str, whole: bool) -> tuple[int, ...]:
    """The sizes of AXES on `count` devices, `whole`: on all of them. Raises UsageError where they do not fit."""
    shape = [getattr(sizes, axis) for axis in AXES]
    keys = ', '.join(f'config.mesh.{axis}={size}' for axis, size in zip(AXES, shape, strict=True))
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        shape[shape.index(-1)] = max(count // known, 1)
    if math.prod(shape) > count or count % known or (whole and math.prod(shape) < count):
        raise UsageError(f'{keys} does not fit the {count} {named}')
    return tuple(shape)


def make_mesh(sizes: configs.Mesh, found) -> Mesh:
    """The mesh of a run over the devices `found`.

    A size of -1 takes what the others leave; without it, and with one process, some devices may stay idle. Several
    slices (TPU pods joined by a network) are joined along `data` alone, the axis that talks least.

    Raises UsageError, naming the key, for sizes that do not fit the devices.
    """
    several = len({device.process_index for device in found}) > 1
    shape = resolve(sizes, len(found), f'{found[0].platform} devices', whole=several)
    found = list(found)[: math.prod(shape)]
    slices = len({getattr(device, 'slice_index', 0) for device in found})
    if slices > 1:
        if shape[0] % slices:
            raise UsageError(f'config.mesh.data={shape[0]} does not divide by the {slices} slices, which it joins')
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), found)
    else:
        grid = mesh_utils.create_device_mesh(shape, found)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh):
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh):
    """The sharding of a batch's arrays [B,...], and of activations: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ROWS))


def local_rows(sharding, size):
    """The numbers of the rows, of a batch of `size`, that this process's devices take."""
    parts = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def place(batch, sharding, size=None):
    """A batch of numpy arrays on the devices.

    With `size` the arrays have this process's rows alone, of so many of all processes, in the order of `local_rows`;
    without it every process has all rows.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def of(values):
        rows = np.arange(len(values)) if size is None else local_rows(sharding, size)
        shape = (size or len(values), *values.shape[1:])
        at = lambda index: values[np.searchsorted(rows, np.arange(shape[0])[index[0]])]  # noqa: E731
        return jax.make_array_from_callback(shape, sharding, at)

    with jax.transfer_guard('allow'):  # which has no name for this as it has for device_put
        return jax.tree.map(of, batch)


def fetch(batch):
    """The whole arrays of a placed batch as numpy arrays; every process has to ask."""
    return jax.device_get(batch) if jax.process_count() == 1 else multihost_utils.process_allgather(batch, tiled=True)


def row_parts(mesh):
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def state_shardings(mesh, state):
    """The sharding of every leaf of a train state, or of a part of one, by RULES.

    Raises UsageError, naming leaf, dimension and key, where no choice divides; ValueError for a leaf without a rule.
    """

    def of(path, leaf):
        return NamedSharding(mesh, _spec(mesh, f'/{trees.path_name(path)}', leaf.shape))

    return jax.tree_util.tree_map_with_path(of, state)


def _spec(mesh, name, shape):
    stacked = f'/{trees.STACKED}/' in name
    choices = next((choices for pattern, *choices in RULES if re.search(pattern, name)), None)
    if choices is None:
        raise ValueError(f'mesh.RULES has no rule for {name}')
    problems = []
    for choice in choices:
        spec = P(None, *choice) if stacked and choice else choice
        problem = next(_indivisible(mesh, spec, shape), None)
        if not problem:
            return spec
        problems.append(problem)
    dimension, axes = problems[0]
    keys = ' times '.join(f'config.mesh.{axis}={mesh.shape[axis]}' for axis in axes)
    raise UsageError(f'{name[1:]} {list(shape)}: {shape[dimension]} (dimension {dimension}) does not divide by {keys}')


def _indivisible(mesh, spec, shape):
    for dimension, axes in enumerate(spec):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        if shape[dimension] % math.prod(mesh.shape[axis] for axis in axes):
            yield dimension, axes

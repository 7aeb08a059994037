"""Devices and how they share the work.

A mesh has three axes. Along `data` there are copies of the model, each with its own rows of the batch. `fsdp` splits
the batch as well; every matrix is stored in parts and gathered for its use (Rajbhandari et al. 2020, ZeRO-3). Along
`tensor` each device computes a part of every matrix product (Shoeybi et al. 2019, Megatron-LM).
"""

import ctypes
import importlib.metadata
import importlib.util
import math
import os
import platform
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.system.errors import DeviceError, UsageError, first_line

# Options of glibc's mallopt: large arrays get no mappings of their own, no memory is returned to the system, and there
# is one heap, which grows by 256 MB. Otherwise every step takes page faults for its temporaries, about 1 GB.
HEAP = {'MMAP_MAX': (-4, 0), 'TRIM_THRESHOLD': (-1, 2**31 - 1), 'ARENA_MAX': (-8, 1), 'TOP_PAD': (-2, 2**28)}

AXES = ('data', 'fsdp', 'tensor')
ROWS = ('data', 'fsdp')  # the axes over which rows of a batch are split

# How the leaves of the train state are split. The first pattern that matches a leaf's name decides. Of its specs the
# first is used whose axis sizes divide the leaf's dimensions (those of one layer). There is no pattern for everything
# else: a new leaf needs a rule.
RULES: tuple[tuple[str, tuple[P, ...]], ...] = (
    (r'(^|/)(step|bad_step|count|ns_coeffs)$', (P(),)),
    (r'/\d+/(v|v_row|v_col)/', (P(),)),  # adafactor: vectors, and matrices too small to factor
    (
        r'/(projector|base_optimizer_state)/',
        (P('fsdp', None), P(None, 'fsdp'), P()),
    ),  # galore: of a small rank
    (r'/embedding$', (P('tensor', 'fsdp'), P(None, ('fsdp', 'tensor')))),
    (r'/head/kernel$', (P('fsdp', 'tensor'),)),
    (r'/classes/kernel$', (P('fsdp', None), P())),  # any number of classes
    (r'/patch/kernel$', (P(None, ('fsdp', 'tensor')), P())),
    (r'/(q|k|v|gate|up|transform|representation)/kernel$', (P('fsdp', 'tensor'), P(('fsdp', 'tensor'), None))),
    (r'/(o|down)/kernel$', (P('tensor', 'fsdp'), P(None, ('fsdp', 'tensor')))),
    # Adapters are as their matrix is, but of a rank that is too small to split.
    (r'/(q|k|v|gate|up)/lora_a$', (P('fsdp', None),)),
    (r'/(q|k|v|gate|up)/lora_b$', (P(None, 'tensor'), P())),
    (r'/(o|down)/lora_a$', (P('tensor', None), P())),
    (r'/(o|down)/lora_b$', (P(None, 'fsdp'),)),
    (r'((norm\w*/|_)scale|/bias|/(span|score)/kernel)$', (P(),)),
    (r'^/cache/.*/(keys|values)$', (P(ROWS, None, 'tensor', None),)),  # of generation, [B, length, kv_heads, d]
)


def keep_heap(kind: str) -> None:
    """Makes this process keep the memory that it frees, if devices of `kind` (as in `devices`) can only be CPUs.

    Call it before JAX starts, whose threads would otherwise have heaps of their own. No result changes. It has an
    effect with glibc alone, and none if the environment sets MALLOC_* or GLIBC_TUNABLES.
    """
    other = importlib.metadata.entry_points(group='jax_plugins') or any(
        importlib.util.find_spec(name) for name in ('jax_plugins', 'libtpu')
    )
    settings: Any = jax.config  # JAX declares no types for them
    cpu = kind == 'cpu' or settings.jax_platforms == 'cpu' or not other
    chosen = any(name.startswith('MALLOC_') for name in os.environ) or 'GLIBC_TUNABLES' in os.environ
    if cpu and not chosen and platform.libc_ver()[0] == 'glibc':
        for option in HEAP.values():
            ctypes.CDLL(None).mallopt(*option)


def devices(kind: str) -> list[jax.Device]:
    """Returns all devices of a kind; 'auto': of the best kind available. Raises DeviceError if there are none."""
    if kind == 'cpu':
        jax.config.update('jax_platforms', 'cpu')  # without effect, and not needed, once JAX is running
    try:
        return jax.devices(None if kind == 'auto' else kind)
    except (RuntimeError, AssertionError) as error:  # the latter: JAX_PLATFORMS names what is not installed
        raise DeviceError(f'config.device={kind}: there is no such device here ({first_line(error)})') from None


def resolve(sizes: configs.Mesh, count: int, name: str, whole: bool) -> tuple[int, ...]:
    """Returns the sizes of AXES on `count` devices, which messages call `name`.

    `whole`: all of them have to be used. Raises UsageError if the sizes do not fit the devices.
    """
    shape = [getattr(sizes, axis) for axis in AXES]
    keys = ', '.join(f'config.mesh.{axis}={size}' for axis, size in zip(AXES, shape, strict=True))
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape:
        shape[shape.index(-1)] = max(count // known, 1)
    if math.prod(shape) > count or count % known or (whole and math.prod(shape) < count):
        raise UsageError(f'{keys} does not fit the {count} {name}')
    return tuple(shape)


def make_mesh(sizes: configs.Mesh, available: Sequence[jax.Device]) -> Mesh:
    """Returns the mesh of a run.

    A size of -1 takes all devices that the other axes leave. Without it, and in one process, some devices may stay
    idle. Several slices (TPU pods joined by a network) are joined along `data`, the axis that communicates least.

    Raises UsageError, naming the key, for sizes that do not fit the devices.
    """
    several = len({device.process_index for device in available}) > 1
    shape = resolve(sizes, len(available), f'{available[0].platform} devices', whole=several)
    used = list(available)[: math.prod(shape)]
    slices = len({getattr(device, 'slice_index', 0) for device in used})
    if slices > 1:
        if shape[0] % slices:
            raise UsageError(f'config.mesh.data={shape[0]} is not divisible by the {slices} slices, which it joins')
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), used)
    else:
        grid = mesh_utils.create_device_mesh(shape, used)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of arrays of which every device holds a full copy."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a batch's arrays `[B, ...]` and of activations: rows are split over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ROWS))


def local_rows(sharding: Sharding, size: int) -> np.ndarray:
    """Returns the numbers of the rows that this process's devices hold, of a batch of `size` rows."""
    parts = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[part] for part in parts]))


def to_devices(batch: Any, sharding: Sharding, size: int | None = None) -> Any:
    """Copies numpy arrays to the devices of a sharding.

    Args:
        batch: a tree of numpy arrays, rows first.
        sharding: of all its leaves.
        size: number of rows over all processes, if `batch` holds only this process's rows, in the order of
            `local_rows`; None: every process passes all rows.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    def to_array(values: np.ndarray) -> jax.Array:
        if size is None:
            return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])
        rows = local_rows(sharding, size)

        def shard(index: Any) -> np.ndarray:
            return values[np.searchsorted(rows, np.arange(size)[index[0]])]

        return jax.make_array_from_callback((size, *values.shape[1:]), sharding, shard)

    with jax.transfer_guard('allow'):  # device_put counts as an explicit transfer, this does not
        return jax.tree.map(to_array, batch)


def params_to_devices(params: Any, mesh: Mesh) -> Any:
    """Returns parameters, which every process has whole, on the devices of a mesh, split by RULES. Raises as
    `state_shardings`."""

    def put(leaf: Any, sharding: Sharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, jax.device_get(params), state_shardings(mesh, params))


def fetch(batch: Any) -> Any:
    """Returns arrays that are split over devices as complete numpy arrays. Every process has to call it."""
    return jax.device_get(batch) if jax.process_count() == 1 else multihost_utils.process_allgather(batch, tiled=True)


def row_parts(mesh: Mesh | AbstractMesh) -> int:
    """Returns into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def state_shardings(mesh: Mesh | AbstractMesh, state: Any) -> Any:
    """Returns the sharding of every leaf of a train state, or of a part of one, by RULES.

    Raises UsageError, naming leaf, dimension and key, if no spec of its rule can split a leaf; ValueError for a leaf
    without a rule.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(mesh, f'/{trees.path_name(path)}', leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def _spec(mesh: Mesh | AbstractMesh, name: str, shape: tuple[int, ...]) -> P:
    stacked = f'/{trees.STACKED}/' in name
    specs = next((specs for pattern, specs in RULES if re.search(pattern, name)), None)
    if specs is None:
        raise ValueError(f'mesh.RULES has no rule for {name}')
    problems = []
    for layer_spec in specs:
        spec = P(None, *layer_spec) if stacked and layer_spec else layer_spec
        problem = next(_indivisible(mesh, spec, shape), None)
        if not problem:
            return spec
        problems.append(problem)
    dimension, axes = problems[0]
    keys = ' times '.join(f'config.mesh.{axis}={mesh.shape[axis]}' for axis in axes)
    raise UsageError(f'{name[1:]} {list(shape)}: {shape[dimension]} (dimension {dimension}) is not divisible by {keys}')


def _indivisible(mesh: Mesh | AbstractMesh, spec: P, shape: tuple[int, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields every dimension that cannot be split evenly, and the axes that it would be split over."""
    for dimension, entry in enumerate(spec):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        if shape[dimension] % math.prod(mesh.shape[axis] for axis in axes):
            yield dimension, axes

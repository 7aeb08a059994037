"""Devices and how they share the work: the batch is split over the axis `data`, everything else is replicated."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mixln_jax.exits import DeviceError, UsageError, first_line


def devices(kind):
    """All devices of a kind ('auto': the best there is). Raises DeviceError where there is none."""
    if kind == 'cpu':
        jax.config.update('jax_platforms', 'cpu')  # has no effect, and needs none, once JAX is running
    try:
        return jax.devices(None if kind == 'auto' else kind)
    except (RuntimeError, AssertionError) as error:  # the latter: JAX_PLATFORMS names what is not installed
        raise DeviceError(f'config.device={kind}: there is no such device here ({first_line(error)})') from None


def make_mesh(kind, data=-1):
    """The mesh of a run: `data` devices of `kind`, -1 for all. Raises DeviceError or UsageError."""
    found = devices(kind)
    if data > len(found):
        raise UsageError(f'config.mesh.data={data}, but there are {len(found)} {found[0].platform} devices')
    return Mesh(np.array(found if data == -1 else found[:data]), ('data',), axis_types=(AxisType.Auto,))


def replicated(mesh):
    """The sharding of the train state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh):
    """The sharding of a batch's arrays [B,...]: rows over `data`."""
    return NamedSharding(mesh, PartitionSpec('data'))

"""Checksums of the arrays of a checkpoint, which do not depend on the mesh."""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import trees


def describe(state: Any) -> dict[str, dict[str, Any]]:
    """Returns {leaf name: {'dtype', 'shape', 'checksum', 'finite'}}. The checksums do not depend on the mesh."""
    names = [name for name, _ in trees.named_leaves(state)]
    leaves = jax.tree.leaves(state)
    sums, finite = jax.device_get(_check(leaves))
    return {
        name: {'dtype': str(leaf.dtype), 'shape': list(leaf.shape), 'checksum': int(number), 'finite': bool(good)}
        for name, leaf, number, good in zip(names, leaves, sums, finite, strict=True)
    }


@jax.jit
def _check(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the checksum of every leaf, and whether all its values are finite."""
    finite = [
        jnp.isfinite(leaf).all() if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.bool_(True) for leaf in leaves
    ]
    return jnp.stack([checksum(leaf) for leaf in leaves]), jnp.stack(finite)


def checksum(array: jax.Array) -> jax.Array:
    """Returns the sum of every element's bits times an odd hash of its index, mod 2^32. A change of any single element
    changes it.

    An integer sum does not depend on the order of its terms, and so not on how the array is sharded.
    """
    unsigned = jnp.dtype(f'uint{8 * array.dtype.itemsize}')
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    strides = np.cumprod((1, *array.shape[:0:-1]), dtype=np.uint64)[::-1].astype(np.uint32)
    index = functools.reduce(
        jnp.add,
        [jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis) * strides[axis] for axis in range(array.ndim)],
        jnp.zeros(array.shape, jnp.uint32),
    )
    mixed = (index ^ (index >> 16)) * np.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x846CA68B)
    return jnp.sum(bits * (mixed ^ (mixed >> 16) | 1), dtype=jnp.uint32)


def digest(about: Mapping[str, Any]) -> str:
    """Returns a digest of the JSON object of a checkpoint."""
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=16).hexdigest()


def difference(stored: Mapping[str, Any], loaded: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with restored leaves, or None."""
    wrong = [name for name, leaf in stored.items() if leaf['checksum'] != loaded[name]['checksum']]
    return f'checksum of {wrong[0]} does not match' if wrong else None

"""The memory that a run needs on each device, by formula."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from mixln_jax import config as configs
from mixln_jax.distributed import mesh as meshes
from mixln_jax.kernels import attention, cross_entropy
from mixln_jax.program.program import Program
from mixln_jax.system.errors import UsageError
from mixln_jax.system.hardware import KINDS

SPARE = 0.95  # the share of the memory that a run may use; the rest is for the runtime


def topology_size(topology: str) -> tuple[str, int]:
    """Returns the kind and the number of devices: ('v5e', 64) for 'v5e:8x8', ('h100', 8) for 'h100:8'.

    Raises:
        UsageError: the kind is unknown or the shape malformed.
    """
    kind, _, shape = topology.partition(':')
    if kind not in KINDS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape):
        raise UsageError(
            f'--topology {topology}: KIND:SHAPE such as v5e:8x8 or h100:8; KIND is one of {", ".join(sorted(KINDS))}'
        )
    return kind, math.prod(map(int, shape.split('x')))


def abstract_mesh(sizes: configs.Mesh, count: int) -> AbstractMesh:
    """Returns a mesh of `count` devices that need not exist. Raises UsageError as `mesh.make_mesh` does."""
    shape = meshes.resolve(sizes, count, 'devices', whole=True)
    return AbstractMesh(shape, meshes.AXES, axis_types=(AxisType.Auto,) * len(shape))


def memory(program: Program) -> dict[str, int]:
    """Returns {kind: bytes} on each device. Activations and logits are estimates, the rest is exact.

    Activations are what the backward pass needs of every layer. It depends on the remat policy: `full` keeps the
    residual stream; `dots` also keeps the results of matrix products; `none` keeps the inputs of products, norms and
    gates (after Korthikanti et al. 2022, section 4; benchmarks/README.md compares this with compilers).
    """
    config, mesh = program.config, program.mesh
    model, width = config.model, 2 if config.compute_dtype == 'bfloat16' else 4
    D, F, H, T = model.hidden_size, model.intermediate_size, model.num_heads, program.row_length
    A, K = H * model.head_size, model.kv_heads * model.head_size  # features of all queries, of all keys
    tensor = mesh.shape['tensor']
    rows = config.batch_size // config.accumulate // meshes.row_parts(mesh)
    # Features that a layer keeps: whole on every device of `tensor`, and split among these devices.
    features = {'full': (0, 0), 'dots': (2 * D, A + 2 * K + 2 * F), 'none': (3 * D, 2 * A + 2 * K + 3 * F)}
    inside = {remat: (whole + split // tensor) * width for remat, (whole, split) in features.items()}
    stream = D * width
    layer = inside[model.remat]
    working = inside['none'] if model.remat != 'none' else 0  # of the layer that is recomputed
    scores = 8 * H // tensor * max(S - first for first, S in attention.blocks(T))  # of its attention
    columns = program.model.head_columns
    # The head reads an image once, every position of a text, and the latter in chunks where it is for words.
    chunk = rows * T
    if program.model.reads != 'texts':
        chunk = rows
    elif not program.model.num_outputs:
        chunk = min(chunk, max(cross_entropy.CHUNK, rows))
    return {
        'weights': _local_bytes((program.state.params, program.state.ema, *program.state.fixed)),
        'optimiser': _local_bytes(program.state.opt_state),
        'gradients': _local_bytes(program.state.params) * (2 if config.accumulate > 1 else 1),
        'activations': rows * T * (model.num_layers * (stream + layer) + working + scores + 4 * stream),
        'logits': chunk * columns // tensor * (4 + 4 + width) + D * columns // tensor * (4 + width),
    }


def _local_bytes(tree: Any) -> int:
    """Returns the bytes of a tree that one device holds."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def fits(program: Program, capacity: int) -> bool:
    """Returns whether a run fits into `capacity` bytes on each device, by formula."""
    return sum(memory(program).values()) <= SPARE * capacity


def proposal(
    config: configs.Config, count: int, capacity: int, check: Callable[[configs.Config], Any]
) -> list[str] | None:
    """Returns the words of a command line with which a run fits, the cheapest change first; None if nothing helps.

    The search tries the mesh of `config` and a mesh of fsdp alone, and each remat policy that saves more memory. For
    each it takes the largest micro-batch that fits by formula, or the next smaller one, if `check` agrees.

    Args:
        config: of the run.
        count: number of devices.
        capacity: bytes on each device.
        check: whether a config that fits by formula really fits.
    """
    policies = dict.fromkeys([config.model.remat, *(['dots', 'full'] if config.model.remat != 'full' else [])])
    for mesh, remat in itertools.product([config.mesh, configs.Mesh(1, count, 1)], policies):
        model, checked = dataclasses.replace(config.model, remat=remat), 0
        for accumulate in (n for n in range(config.accumulate, config.batch_size + 1) if not config.batch_size % n):
            other = dataclasses.replace(config, mesh=mesh, accumulate=accumulate, model=model)
            before, now = configs.flatten(config), configs.flatten(other)
            words = [f'--config.{key}={now[key]}' for key in now if now[key] != before[key]]
            try:
                fit = words and fits(Program(other, abstract_mesh(mesh, count)), capacity)
            except UsageError:
                continue  # the batch or the model cannot be divided in this way
            if fit and check(other):
                return words
            checked += bool(fit)
            if checked == 2:  # because compiling takes minutes
                break
    return None

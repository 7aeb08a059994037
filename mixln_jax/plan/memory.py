"""Memory by formula."""

import dataclasses
import itertools
import math
import re

import jax
from jax.sharding import AbstractMesh, AxisType

from mixln_jax import config as configs
from mixln_jax.distributed import mesh as meshes
from mixln_jax.kernels import attention, cross_entropy
from mixln_jax.program.program import Program
from mixln_jax.system.errors import UsageError
from mixln_jax.system.hardware import KINDS

SPARE = 0.95  # of the memory; the rest is the runtime's


def topology_size(topology: str) -> tuple[str, int]:
    """('v5e', 64) of 'v5e:8x8', ('h100', 8) of 'h100:8'. Raises UsageError."""
    kind, _, shape = topology.partition(':')
    if kind not in KINDS or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape):
        raise UsageError(f'--topology {topology}: KIND:SHAPE such as v5e:8x8 or h100:8, of {", ".join(sorted(KINDS))}')
    return kind, math.prod(map(int, shape.split('x')))


def abstract_mesh(sizes: configs.Mesh, count: int) -> AbstractMesh:
    """A mesh of `count` devices that nobody needs to have. Raises UsageError as `mesh.make_mesh` does."""
    shape = meshes.resolve(sizes, count, 'devices', whole=True)
    return AbstractMesh(shape, meshes.AXES, axis_types=(AxisType.Auto,) * len(shape))


def memory(program: Program) -> dict[str, int]:
    """Bytes on a device by kind; activations and logits are estimates, the rest is exact.

    Activations: what the backward pass needs of every layer, by remat policy: `full` keeps the stream, `dots` the
    results of the matrix products besides, `none` what enters products, norms and gates (after Korthikanti et al. 2022,
    section 4; benchmarks/README.md has what compilers say).
    """
    config, mesh = program.config, program.mesh
    model, width = config.model, 2 if config.compute_dtype == 'bfloat16' else 4
    D, F, H, T = model.hidden_size, model.intermediate_size, model.num_heads, config.seq_length
    A, K = H * model.head_size, model.kv_heads * model.head_size  # features of all queries, of all keys
    tensor = mesh.shape['tensor']
    rows = config.batch_size // config.accumulate // meshes.row_parts(mesh)
    # Of a layer: what lies whole on every device of `tensor`, and what is split.
    features = {'full': (0, 0), 'dots': (2 * D, A + 2 * K + 2 * F), 'none': (3 * D, 2 * A + 2 * K + 3 * F)}
    inside = {remat: (whole + split // tensor) * width for remat, (whole, split) in features.items()}
    stream = D * width
    layer = inside[model.remat]
    working = inside['none'] if model.remat != 'none' else 0  # of the layer at hand, recomputed
    scores = 8 * H // tensor * max(S - first for first, S in attention.blocks(T))  # and of its attention
    padded = program.model.rows
    chunk = min(rows * T, max(cross_entropy.CHUNK, rows))
    return {
        'weights': _held(program.state.params),
        'optimiser': _held(program.state.opt_state),
        'gradients': _held(program.state.params) * (2 if config.accumulate > 1 else 1),
        'activations': rows * T * (model.num_layers * (stream + layer) + working + scores + 4 * stream),
        'logits': chunk * padded // tensor * (4 + 4 + width) + D * padded // tensor * (4 + width),
    }


def _held(tree):
    """Bytes that one device holds of a tree."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def fits(program, capacity):
    """Whether a run fits, by formula."""
    return sum(memory(program).values()) <= SPARE * capacity


def proposal(config, count, capacity, check):
    """What to set so that a run fits, what costs the least first; None if nothing helps.

    For the mesh of `config` and for one of fsdp alone, and for each remat policy that saves more: the largest
    micro-batch that fits by formula, or half of it, if `check` agrees.
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
                continue  # does not divide
            if fit and check(other):
                return words
            checked += bool(fit)
            if checked == 2:  # compiling takes minutes
                break
    return None

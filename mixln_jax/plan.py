"""What a run needs, without its hardware: `python -m mixln_jax.plan --config FILE --topology v5e:8x8 [--compile]`.

Without --compile by formula, in seconds; with it the train step itself is compiled for the TPU topology, on any
machine with `pip install "jax[tpu]"`, and the compiler says what it needs.
"""

import argparse
import dataclasses
import itertools
import math
import os
import re
import sys

import jax
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType

from mixln_jax import config as configs
from mixln_jax import exits, hlo, losses, metrics, record
from mixln_jax import mesh as meshes
from mixln_jax.exits import DeviceError, UsageError, first_line
from mixln_jax.models import attention, llama
from mixln_jax.program import Program

# Kind of device as JAX names it, its memory in bytes (datasheets).
HARDWARE = {
    'v4': ('TPU v4', 32 * 2**30),
    'v5e': ('TPU v5 lite', 16 * 2**30),
    'v5p': ('TPU v5', 95 * 2**30),
    'v6e': ('TPU v6 lite', 32 * 2**30),
    'a100': ('NVIDIA A100-SXM4-80GB', 80 * 2**30),
    'h100': ('NVIDIA H100 80GB HBM3', 80 * 2**30),
    'h200': ('NVIDIA H200', 141 * 10**9),
}
# Cycles a second (datasheets: the peak over what all matrix units do in a cycle).
CLOCK = {'TPU v4': 1.05e9, 'TPU v5 lite': 1.5e9, 'TPU v5': 1.75e9, 'TPU v6 lite': 1.75e9}
SPARE = 0.95  # of the memory; the rest is the runtime's


def topology_size(topology: str) -> tuple[str, int]:
    """('v5e', 64) of 'v5e:8x8', ('h100', 8) of 'h100:8'. Raises UsageError."""
    kind, _, shape = topology.partition(':')
    if kind not in HARDWARE or not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape):
        raise UsageError(f'--topology {topology}: KIND:SHAPE such as v5e:8x8 or h100:8, of {", ".join(HARDWARE)}')
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
    inside = {'full': (0, 0), 'dots': (2 * D, A + 2 * K + 2 * F), 'none': (3 * D, 2 * A + 2 * K + 3 * F)}
    inside = {remat: (whole + split // tensor) * width for remat, (whole, split) in inside.items()}
    stream = D * width
    layer = inside[model.remat]
    working = inside['none'] if model.remat != 'none' else 0  # of the layer at hand, recomputed
    scores = 8 * H // tensor * max(S - first for first, S in attention.blocks(T))  # and of its attention
    padded = program.state.params['embed']['embedding'].shape[0]
    chunk = min(rows * T, max(losses.CHUNK, rows))
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


def compiled(config, topology):
    """The compiled train step, or the compiler's word that it does not fit."""
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    try:
        devices = topologies.get_topology_desc(topology_name=topology, platform='tpu').devices
    except Exception as error:
        raise DeviceError(
            f'--compile: {topology} cannot be compiled for here: {first_line(error)} (pip install "jax[tpu]")'
        ) from error
    program = Program(config, meshes.make_mesh(config.mesh, devices))
    lowered = program.train_step.lower(program.state, program.batch(config.batch_size))
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return first_line(error)


def needed(executable):
    """Bytes on a device, as the compiler lays them out."""
    found = executable.memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + outputs + found.temp_size_in_bytes + found.generated_code_size_in_bytes


def plan(config: configs.Config, topology: str, mfu: float, compile: bool):
    """Prints the plan. Raises UsageError for sizes that do not fit together, DeviceError where nothing can compile."""
    kind, count = topology_size(topology)
    device, capacity = HARDWARE[kind]
    program = Program(config, abstract_mesh(config.mesh, count))
    sizes, params = config.model, program.state.params
    number = llama.num_params(sizes, params)
    positions = config.batch_size * config.seq_length
    a_position = program.flops_per_position()
    seconds = a_position * positions / (mfu * metrics.PEAK_FLOPS[device] * count)
    hours = seconds * config.num_steps / 3600
    parts = memory(program)
    total = sum(parts.values())
    shape = ', '.join(f'{axis} {size}' for axis, size in program.mesh.shape.items())
    record.say(
        f'{count} x {device} ({capacity / 2**30:.0f} GiB each); mesh {shape}',
        f'parameters        {number:,}',
        f'positions a step  {positions:,} ({config.accumulate} micro-batches)',
        f'FLOPs a step      {a_position * positions:.3g}',
        f'time a step       {seconds:.3g} s at {mfu:.0%} MFU; {hours:.3g} h for {config.num_steps:,} steps',
        f'a checkpoint      {_gib(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.state)))}',
        'memory a device, by formula:',
        *(f'  {name:<15} {_gib(size)}' for name, size in parts.items()),
        f'  {"together":<15} {_gib(total)}: {"fits" if fits(program, capacity) else "does not fit"}',
    )
    check, fit = lambda other: True, fits(program, capacity)
    if compile:
        check = lambda other: _fits_compiled(compiled(other, topology), capacity)  # noqa: E731
        executable = compiled(config, topology)
        fit = _fits_compiled(executable, capacity)
        if isinstance(executable, str):
            record.say(f'the compiler: {executable}')
        else:
            record.say(f'the compiler needs {_gib(needed(executable))} a device: {"fits" if fit else "does not fit"}')
            text = executable.as_text()
            for said, (times, size) in sorted(hlo.collectives(text).items()):
                record.say(f'  {said:<20} {times:>6} a step, {_gib(size)}')
            say_expected(hlo.expected_cycles(text), device, a_position * positions / count)
    if not fit:
        for number in (count * 2**i for i in range(8)):
            words = proposal(config, number, capacity, check if number == count else lambda other: True)
            if words:
                where = '' if number == count else f' on {number} devices, by formula'
                record.say(f'it fits{where} with {" ".join(words)}')
                return
        record.say('no micro-batch, remat policy, fsdp or number of devices makes it fit')


def say_expected(cycles, device, flops):
    """Says what the compiler expects of a step, by part; nothing where it expects nothing or the clock is unknown.

    Args:
        cycles: {part: cycles of a step}.
        device: as JAX names it.
        flops: of a step on a device, by formula.
    """
    clock = CLOCK.get(device)
    if cycles and clock:
        seconds = sum(cycles.values()) / clock
        utilisation = metrics.mfu(flops / seconds, device, 1)
        record.say(
            f'it expects {seconds:.3g} s a step ({utilisation:.0%} MFU), without what devices say to each other:',
            *(f'  {name:<15} {n / clock:8.3g} s {n / sum(cycles.values()):5.0%}' for name, n in cycles.items()),
        )


def _fits_compiled(executable, capacity):
    return not isinstance(executable, str) and needed(executable) <= capacity


def _gib(size):
    return f'{size / 2**30:8.3f} GiB'


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m mixln_jax.plan', description=__doc__, allow_abbrev=False)
    parser.add_argument(
        '--config', required=True, metavar='FILE[:ARG]', help='a recipe; --config.KEY=VALUE as for main'
    )
    parser.add_argument(
        '--topology', required=True, metavar='KIND:SHAPE', help=f'{", ".join(HARDWARE)}, such as v5e:8x8'
    )
    parser.add_argument('--mfu', type=float, default=0.4, metavar='X', help='model FLOPs utilisation to expect [0.4]')
    parser.add_argument('--compile', action='store_true', help='compile the train step for the TPU topology')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def job():
        options, rest = exits.parse(parser, argv, known=True)
        if not 0 < options.mfu <= 1:
            raise UsageError('--mfu must be above 0 and at most 1')
        jax.config.update('jax_platforms', 'cpu')
        config = configs.build(configs.load(options.config, configs.overrides(rest)))
        plan(config, options.topology, options.mfu, options.compile)

    return exits.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

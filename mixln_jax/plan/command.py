"""What a run needs, without its hardware: `python -m mixln_jax.plan --config FILE --topology v5e:8x8 [--compile]`.

Without --compile by formula, in seconds; with it the train step itself is compiled for the TPU topology, on any
machine with `pip install "jax[tpu]"`, and the compiler says what it needs.
"""

import argparse
import os

import jax
from jax.experimental import topologies

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.distributed import mesh as meshes
from mixln_jax.plan import hlo
from mixln_jax.plan.memory import abstract_mesh, fits, memory, proposal, topology_size
from mixln_jax.program.program import Program
from mixln_jax.system import cli, console, hardware
from mixln_jax.system.errors import DeviceError, UsageError, first_line
from mixln_jax.system.hardware import DEVICES, KINDS


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
    device, capacity = KINDS[kind], DEVICES[KINDS[kind]].memory or 0
    program = Program(config, abstract_mesh(config.mesh, count))
    number = program.model.num_params(program.state.params)
    positions = config.batch_size * config.seq_length
    a_position = program.flops_per_position()
    seconds = a_position * positions / (mfu * DEVICES[device].flops * count)
    hours = seconds * config.num_steps / 3600
    parts = memory(program)
    total = sum(parts.values())
    shape = ', '.join(f'{axis} {size}' for axis, size in program.mesh.shape.items())
    console.say(
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
            console.say(f'the compiler: {executable}')
        else:
            console.say(f'the compiler needs {_gib(needed(executable))} a device: {"fits" if fit else "does not fit"}')
            text = executable.as_text()
            for said, (times, size) in sorted(hlo.collectives(text).items()):
                console.say(f'  {said:<20} {times:>6} a step, {_gib(size)}')
            say_expected(hlo.expected_cycles(text), device, a_position * positions / count)
    if not fit:
        for number in (count * 2**i for i in range(8)):
            words = proposal(config, number, capacity, check if number == count else lambda other: True)
            if words:
                where = '' if number == count else f' on {number} devices, by formula'
                console.say(f'it fits{where} with {" ".join(words)}')
                return
        console.say('no micro-batch, remat policy, fsdp or number of devices makes it fit')


def say_expected(cycles, device, flops):
    """Says what the compiler expects of a step, by part; nothing where it expects nothing or the clock is unknown.

    Args:
        cycles: {part: cycles of a step}.
        device: as JAX names it.
        flops: of a step on a device, by formula.
    """
    clock = DEVICES[device].clock if device in DEVICES else None
    if cycles and clock:
        seconds = sum(cycles.values()) / clock
        utilisation = hardware.mfu(flops / seconds, device, 1)
        console.say(
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
        '--topology', required=True, metavar='KIND:SHAPE', help=f'{", ".join(sorted(KINDS))}, such as v5e:8x8'
    )
    parser.add_argument('--mfu', type=float, default=0.4, metavar='X', help='model FLOPs utilisation to expect [0.4]')
    parser.add_argument('--compile', action='store_true', help='compile the train step for the TPU topology')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def job():
        options, rest = cli.parse_known(parser, argv)
        if not 0 < options.mfu <= 1:
            raise UsageError('--mfu must be above 0 and at most 1')
        jax.config.update('jax_platforms', 'cpu')
        config = configs.build(recipes.load(options.config, recipes.overrides(rest)))
        plan(config, options.topology, options.mfu, options.compile)

    return cli.call(job, show_traceback='--traceback' in argv)

"""Prints the needs of a run, without its hardware: `python -m mixln_jax.plan --config FILE --topology v5e:8x8`.

By default the plan follows from formulas and takes seconds. With --compile the train step is compiled for the TPU
topology, on any machine with `pip install "jax[tpu]"`, and the plan includes what the compiler reports.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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

SAMPLES = '  not counted: rewards, and that sampling reads all weights for each token, which lowers its MFU'
MOST_DOUBLINGS = 8  # of the number of devices, in the search for a number that fits


def compiled(config: configs.Config, topology: str) -> jax.stages.Compiled | str:
    """Returns the compiled train step, or the compiler's message if the step does not fit.

    Raises:
        DeviceError: this machine cannot compile for the topology.
    """
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    try:
        devices = topologies.get_topology_desc(topology_name=topology, platform='tpu').devices
    except Exception as error:
        raise DeviceError(
            f'--compile: cannot compile for {topology} here: {first_line(error)} (pip install "jax[tpu]")'
        ) from error
    program = Program(config, meshes.make_mesh(config.mesh, devices))
    lowered = program.train_step.lower(program.state, program.batch(config.batch_size))
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return first_line(error)


def needed(executable: jax.stages.Compiled) -> int:
    """Returns the bytes that a compiled program needs on each device."""
    analysis: Any = executable.memory_analysis()  # None only for backends without compiled code
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    inputs = analysis.argument_size_in_bytes
    return inputs + outputs + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes


def plan(config: configs.Config, topology: str, mfu: float, compile: bool) -> None:
    """Prints the plan of a run.

    Args:
        config: of the run.
        topology: KIND:SHAPE, such as v5e:8x8.
        mfu: the model FLOPs utilisation to expect.
        compile: whether to compile the train step.

    Raises:
        UsageError: the sizes do not fit together.
        DeviceError: this machine cannot compile for the topology.
    """
    kind, count = topology_size(topology)
    device, capacity = KINDS[kind], DEVICES[KINDS[kind]].memory or 0
    program = Program(config, abstract_mesh(config.mesh, count))
    flops = program.flops()
    _print_formula(program, device, count, flops, mfu)
    if compile:
        check = lambda other: _fits_compiled(compiled(other, topology), capacity)  # noqa: E731
        executable = compiled(config, topology)
        fit = _fits_compiled(executable, capacity)
        in_step = sum(value for name, value in flops.items() if name != 'sampling')
        _print_compiled(executable, fit, device, in_step / count)
    else:
        check, fit = lambda other: True, fits(program, capacity)
    if not fit:
        _print_proposal(config, count, capacity, check)


def _print_formula(program: Program, device: str, count: int, flops: Mapping[str, float], mfu: float) -> None:
    """Prints what formulas say: sizes, time and memory; `flops` are those of `Program.flops`."""
    config, capacity, total = program.config, DEVICES[device].memory or 0, sum(flops.values())
    by_part = [f'  {name:<18}{part:.3g}' for name, part in flops.items()] if len(flops) > 1 else []
    seconds = total / (mfu * DEVICES[device].flops * count)
    hours = f'{seconds * config.num_steps / 3600:.3g} h for {config.num_steps:,} steps'
    if config.num_epochs:
        hours = f'the data decides how many steps {config.num_epochs:g} epochs are'
    parts = memory(program)
    shape = ', '.join(f'{axis} {size}' for axis, size in program.mesh.shape.items())
    checkpoint = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.state.own))
    trained = f' ({program.model.num_params(program.state.params):,} trained)' if program.num_frozen() else ''
    console.say(
        f'{count} x {device} ({capacity / 2**30:.0f} GiB each); mesh {shape}',
        f'parameters          {program.model.num_params(program.state.network):,}{trained}',
        f'positions per step  {config.batch_size * program.row_length:,} ({config.accumulate} micro-batches)',
        f'FLOPs per step      {total:.3g}',
        *by_part,
        f'time per step       {seconds:.3g} s at {mfu:.0%} MFU; {hours}',
        *([SAMPLES] if 'sampling' in flops else []),
        f'checkpoint          {_gib(checkpoint)}',
        'memory per device, by formula:',
        *(f'  {name:<17} {_gib(size)}' for name, size in parts.items()),
        f'  {"total":<17} {_gib(sum(parts.values()))}: {"fits" if fits(program, capacity) else "does not fit"}',
    )


def _print_compiled(executable: jax.stages.Compiled | str, fit: bool, device: str, flops: float) -> None:
    """Prints what the compiler reports; `flops` are of a step on one device."""
    if isinstance(executable, str):
        console.say(f'the compiler: {executable}')
        return
    console.say(f'the compiler needs {_gib(needed(executable))} per device: {"fits" if fit else "does not fit"}')
    text = executable.as_text() or ''
    for kind, (times, size) in sorted(hlo.collectives(text).items()):
        console.say(f'  {kind:<20} {times:>6} per step, {_gib(size)}')
    print_expected(hlo.expected_cycles(text), device, flops)


def print_expected(cycles: Mapping[str, int], device: str, flops: float) -> None:
    """Prints the time of a step that the compiler expects, by part.

    It prints nothing if the compiler expects nothing or the clock of the device is unknown.

    Args:
        cycles: {part: cycles of a step}.
        device: as JAX names it.
        flops: of a step on one device, by formula.
    """
    clock = DEVICES[device].clock if device in DEVICES else None
    if cycles and clock:
        seconds = sum(cycles.values()) / clock
        utilisation = hardware.mfu(flops / seconds, device, 1)
        console.say(
            f'it expects {seconds:.3g} s per step ({utilisation:.0%} MFU), without communication between devices:',
            *(f'  {name:<15} {n / clock:8.3g} s {n / sum(cycles.values()):5.0%}' for name, n in cycles.items()),
        )


def _print_proposal(config: configs.Config, count: int, capacity: int, check: Callable[[configs.Config], Any]) -> None:
    """Prints the settings with which a run fits, on more devices if necessary."""
    for number in (count * 2**doublings for doublings in range(MOST_DOUBLINGS)):
        words = proposal(config, number, capacity, check if number == count else lambda other: True)
        if words:
            devices = '' if number == count else f' on {number} devices, by formula,'
            console.say(f'it fits{devices} with {" ".join(words)}')
            return
    console.say('no micro-batch, remat policy, fsdp or number of devices makes it fit')


def _fits_compiled(executable: jax.stages.Compiled | str, capacity: int) -> bool:
    return not isinstance(executable, str) and needed(executable) <= capacity


def _gib(size: float) -> str:
    return f'{size / 2**30:8.3f} GiB'


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m mixln_jax.plan', description=__doc__, allow_abbrev=False)
    parser.add_argument(
        '--config', required=True, metavar='FILE[:ARG]', help='a recipe; --config.KEY=VALUE as for main'
    )
    parser.add_argument(
        '--topology', required=True, metavar='KIND:SHAPE', help=f'such as v5e:8x8; KIND is {", ".join(sorted(KINDS))}'
    )
    parser.add_argument('--mfu', type=float, default=0.4, metavar='X', help='model FLOPs utilisation to expect [0.4]')
    parser.add_argument('--compile', action='store_true', help='compile the train step for the TPU topology')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def job() -> None:
        options, rest = cli.parse_known(parser, argv)
        if not 0 < options.mfu <= 1:
            raise UsageError('--mfu must be above 0 and at most 1')
        jax.config.update('jax_platforms', 'cpu')
        config = configs.build(recipes.load(options.config, recipes.overrides(rest)))
        plan(config, options.topology, options.mfu, options.compile)

    return cli.call(job, show_traceback='--traceback' in argv)

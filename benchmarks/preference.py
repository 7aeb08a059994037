"""Time and memory of a step that learns from pairs: `python -m benchmarks.preference [--config FILE] ...`.

Four programs take turns, on batches of the same shape: the reference's forward pass; a step with the reference network
in it; one with its log-probabilities precomputed, which leaves the policy's forward and backward pass; and a step of
language modelling on the same rows. The weights are random, which changes no time. Memory is what the compiler
reports: arguments, temporary arrays and results that alias no argument.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import sys
import time

import jax
import numpy as np

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.data import batches, rows
from mixln_jax.data.pairs import REFERENCE
from mixln_jax.distributed import mesh as meshes
from mixln_jax.program.program import Program


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--config', default='configs/preferences/dpo_quickstart.py')
    parser.add_argument('--repeats', type=int, default=7)
    options, rest = parser.parse_known_args(argv)
    config = configs.build(recipes.load(options.config, recipes.overrides(rest)))
    meshes.keep_heap(config.device)
    mesh = meshes.make_mesh(config.mesh, meshes.devices(config.device))
    parts = _parts(config, mesh)
    seconds = {name: [] for name in parts}
    for repeat in range(1 + options.repeats):  # the first one warms up
        for name, (run, _) in parts.items():
            start = time.perf_counter()
            run()
            seconds[name] += [time.perf_counter() - start] if repeat else []
    device = jax.devices()[0]
    cores = f', {len(os.sched_getaffinity(0))} cores' if device.platform == 'cpu' else ''
    load = ', '.join(f'{number:.1f}' for number in os.getloadavg())
    print(f'jax {jax.__version__}, {device.device_kind}{cores}, python {platform.python_version()}; load {load}')
    print(
        f'{options.config}: {config.batch_size} rows of {config.seq_length}; medians of {options.repeats} turns, and '
        'their range'
    )
    print('| part | ms | range | GiB |\n|---|---|---|---|')
    for name, times in seconds.items():
        low, middle, high = (1e3 * function(times) for function in (min, statistics.median, max))
        print(f'| {name} | {middle:,.0f} | {low:,.0f} to {high:,.0f} | {parts[name][1] / 2**30:.3f} |')


def _parts(config, mesh):
    """Returns {part: (function that runs it to its end, bytes)}."""
    preference = lambda reference: dataclasses.replace(  # noqa: E731
        config,
        task=dataclasses.replace(
            config.task, preference=dataclasses.replace(config.task.preference, reference=reference)
        ),
    )
    language = dataclasses.replace(
        config, init_from='', task=configs.Task(), data=dataclasses.replace(config.data, mode='pack')
    )
    programs = {
        'step, reference=network': Program(preference('network'), mesh),
        'step, reference=precomputed': Program(preference('precomputed'), mesh),
        'step of language modelling': Program(language, mesh),
    }
    tokenizer = rows.open_tokenizer(config.data)
    examples = rows.open_rows(
        config.data, config.data.split, tokenizer, config.seq_length, config.model.vocab_size, config.task
    )
    batch = batches.training(examples, seed=0, batch_size=config.batch_size)[0]
    batch[REFERENCE] = np.zeros(batch['inputs'].shape, np.float32)
    put = lambda program: {  # noqa: E731
        name: meshes.to_devices(batch[name], meshes.batch_sharding(mesh)) for name in program.task.batch_spec(1)
    }
    made = {}
    for name, program in programs.items():
        step, _ = program.compile()
        lowered = program.train_step.lower(program.state, program.batch(config.batch_size)).compile()
        made[name] = _stepping(step, program.init(jax.random.key(0)), put(program)), _bytes(lowered)
    whole = programs['step, reference=network']
    inputs, network = put(whole), whole.init(jax.random.key(0)).network
    forward = jax.jit(whole.task.log_probs).lower(network, inputs).compile()
    alone = lambda: jax.block_until_ready(forward(network, inputs))  # noqa: E731
    return {"the reference's forward pass": (alone, _bytes(forward))} | made


def _stepping(step, state, batch):
    def run():
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return run


def _bytes(compiled):
    found = compiled.memory_analysis()
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.argument_size_in_bytes + found.temp_size_in_bytes + results


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

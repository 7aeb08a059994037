"""Time and memory of a step that learns from generated text: `python -m benchmarks.online [--config FILE] ...`.

A step has three parts: sampling, scoring and update. The weights are random, so completions hardly end: the times are
those of completions of full length. Memory is the most that was in use up to the end of a part, in this process.
"""

import argparse
import os
import platform
import resource
import statistics
import sys
import time

import jax
import numpy as np

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.data import batches, rows
from mixln_jax.distributed import mesh as meshes
from mixln_jax.evaluation.rollouts import open_rollouts
from mixln_jax.program.program import Program


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--config', default='configs/preferences/online_quickstart.py')
    parser.add_argument('--repeats', type=int, default=5)
    options, rest = parser.parse_known_args(argv)
    config = configs.build(recipes.load(options.config, recipes.overrides(rest)))
    meshes.keep_heap(config.device)
    mesh = meshes.make_mesh(config.mesh, meshes.devices(config.device))
    seconds, memory, made = _steps(Program(config, mesh), options.repeats)

    device = jax.devices()[0]
    cores = f', {len(os.sched_getaffinity(0))} cores' if device.platform == 'cpu' else ''
    online = config.task.online
    print(f'jax {jax.__version__}, {device.device_kind}{cores}, python {platform.python_version()}')
    print(
        f'{options.config}: {config.batch_size} completions of up to {online.max_new_tokens} tokens in rows of '
        f'{config.seq_length}, {online.algorithm}, {online.updates} updates; medians of {options.repeats} steps'
    )
    print('| part | ms | share | tokens/s | peak GiB so far |\n|---|---|---|---|---|')
    whole = sum(map(statistics.median, seconds.values()))
    for part, times in seconds.items():
        spent = statistics.median(times)
        print(f'| {part} | {1e3 * spent:,.1f} | {spent / whole:.1%} | {made / spent:,.0f} | {memory[part]:.2f} |')
    print(f'| step | {1e3 * whole:,.1f} | | {made / whole:,.0f} | |')


def _steps(program, repeats):
    """Returns ({part: seconds of each step}, {part: peak GiB after it}, completion tokens of the last step)."""
    config, mesh = program.config, program.mesh
    tokenizer = rows.open_tokenizer(config.data)
    examples = rows.open_rows(
        config.data, config.data.split, tokenizer, config.seq_length, config.model.vocab_size, config.task
    )
    rollouts, state = open_rollouts(program, tokenizer), program.init(jax.random.key(0))
    seconds, memory = {'sampling': [], 'scoring': [], 'update': []}, {}
    reward, scoring = rollouts._reward, []

    def timed(*arguments):
        memory.setdefault('sampling', _peak())
        start = time.perf_counter()
        scores = reward(*arguments)
        scoring.append(time.perf_counter() - start)
        return scores

    rollouts._reward = timed
    dataset = batches.training(examples, seed=0, batch_size=config.examples_per_step)
    for step in range(1 + repeats):  # the first one compiles
        scoring.clear()
        start = time.perf_counter()
        batch = rollouts.training(state.network, dataset[step], examples, state.step)
        collected = time.perf_counter()
        memory.setdefault('scoring', _peak())
        state, metrics = program.train_step(state, meshes.to_devices(batch, meshes.batch_sharding(mesh)))
        jax.block_until_ready((state, metrics))
        memory.setdefault('update', _peak())
        for part, spent in zip(
            seconds,
            (collected - start - sum(scoring), sum(scoring), time.perf_counter() - collected),
            strict=True,
        ):
            seconds[part] += [spent] if step else []
    return seconds, memory, int(np.sum(batch['loss_mask']))


def _peak():
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats['peak_bytes_in_use'] / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

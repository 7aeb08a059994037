"""Cost of the signs of a collapse: `python -m benchmarks.signs [--config FILE] [--config.KEY=VALUE] ...`.

Train steps with and without signs take turns in one process, each from its own state; of each pair the ratio of their
times, and of the times that all threads of the process spent. What is added to a step, the measurement of every
`stability.every` steps, and what a step does on the host are timed by themselves, too, which other processes on the
machine disturb less.
"""

import argparse
import dataclasses
import platform
import statistics
import sys
import time

import jax

from mixln_jax import config as configs
from mixln_jax import recipes, trees
from mixln_jax.data import batches
from mixln_jax.data import rows as data_rows
from mixln_jax.distributed import mesh as meshes
from mixln_jax.program.program import Program
from mixln_jax.training.signs import Signs


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--config', default='configs/quickstart.py')
    parser.add_argument('--repeats', type=int, default=40)
    options, rest = parser.parse_known_args(argv)
    config = configs.build(recipes.load(options.config, recipes.overrides(rest)))
    mesh = meshes.make_mesh(config.mesh, meshes.devices(config.device))
    without = dataclasses.replace(config, stability=dataclasses.replace(config.stability, every=0))
    programs = {name: Program(chosen, mesh) for name, chosen in (('with', config), ('without', without))}
    examples = data_rows.open_examples(config, config.data, config.data.split, data_rows.open_tokenizer(config.data))
    batch = batches.training(examples, seed=0, batch_size=config.batch_size)[0]
    batch = meshes.to_devices(batch, meshes.batch_sharding(mesh))
    steps, memory = {}, {}
    for name, program in programs.items():
        steps[name], _ = program.compile()
        memory[name] = steps[name].memory_analysis().temp_size_in_bytes / 2**20
    states = {name: program.init(jax.random.key(0)) for name, program in programs.items()}

    def timed(call):
        start, spent = time.perf_counter(), time.process_time()
        made = jax.block_until_ready(call())
        return made, time.perf_counter() - start, time.process_time() - spent

    def step(name):
        (states[name], metrics), *seconds = timed(lambda: steps[name](states[name], batch))
        return seconds, metrics

    for name in states:  # the first ones are slower
        step(name)
    pairs, single, probes, norms = [], [], [], []
    added = jax.jit(lambda updates, weights: trees.layer_norms(updates)[0] / trees.layer_norms(weights)[0])
    weights = states['with'].params
    timed(lambda: added(weights, weights))
    measure = lambda: programs['with'].probe(states['with'].network, batch, states['with'].step)  # noqa: E731
    cold = timed(measure)[1]
    for number in range(options.repeats):
        order = ('with', 'without') if number % 2 else ('without', 'with')
        seconds = {name: step(name) for name in order}
        metrics = jax.device_get(seconds['with'][1])
        pairs.append([a / b for a, b in zip(seconds['with'][0], seconds['without'][0], strict=True)])
        single.append(seconds['without'][0])
        probes.append(timed(measure)[1:])
        weights = states['with'].params
        norms.append(timed(lambda: added(weights, weights))[1:])  # noqa: B023
    state = programs['with'].state
    signs, losses = Signs(config, state.params, state.network, lambda: 3.0, {'step': 0}, []), 2000
    start = time.process_time()
    for number in range(losses):
        signs.add(number, metrics)
    host = (time.process_time() - start) / losses

    wall, cpu = (statistics.median(values) for values in zip(*pairs, strict=True))
    spread = [sorted(values) for values in zip(*pairs, strict=True)]
    usual = [statistics.median(values) for values in zip(*single, strict=True)]
    every = config.stability.every

    def share(seconds):
        ratios = [[a / b for a, b in zip(one, step, strict=True)] for one, step in zip(seconds, single, strict=True)]
        return [statistics.median(values) for values in zip(*ratios, strict=True)]

    alone, probed = share(norms), share(probes)
    quarter = len(pairs) // 4
    print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}, python {platform.python_version()}')
    print(f'{options.config}: a step takes {usual[0]:.3f} s, {usual[1]:.3f} s of all threads')
    print('| | by the clock | by the time of all threads |\n|---|---|---|')
    print(f'| a step with signs : without, median of {len(pairs)} pairs | {wall:.4f} | {cpu:.4f} |')
    middle = ' | '.join(f'{values[quarter]:.3f} to {values[-quarter - 1]:.3f}' for values in spread)
    print(f'| the middle half of the pairs | {middle} |')
    print(f'| norms of updates and weights alone | {alone[0]:.2%} | {alone[1]:.2%} |')
    print(f'| attention logits and log Z, every {every} steps | {probed[0] / every:.3%} | {probed[1] / every:.3%} |')
    print(f'| on the host, of each step | | {host / usual[0]:.3%} |')
    print(f'temporary memory of the step: {memory["with"]:.1f} MiB with, {memory["without"]:.1f} MiB without')
    print(f'the first measurement of attention logits, which compiles: {cold:.1f} s')


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

"""Time of the analyses during training against that of training: `python -m benchmarks.analyses [--config FILE] ...`.

A call of the analyses stands between two train steps, over and over, in one process; of each the ratio to the mean of
the two steps, beside the ratio of FLOPs by formula.
"""

import argparse
import platform
import statistics
import sys
import time

import jax

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.analysis import during
from mixln_jax.data import batches, rows
from mixln_jax.distributed import mesh as meshes
from mixln_jax.program.program import Program


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--config', default='configs/quickstart.py')
    parser.add_argument('--repeats', type=int, default=7)
    options, rest = parser.parse_known_args(argv)
    config = configs.build(recipes.load(options.config, recipes.overrides(rest)))
    sizes = config.model
    mesh = meshes.make_mesh(config.mesh, meshes.devices(config.device))
    program = Program(config, mesh)
    tokenizer = rows.open_tokenizer(config.data)
    text = [
        rows.open_rows(config.data, split, tokenizer, config.seq_length, sizes.vocab_size)
        for split in (config.data.split, config.eval.split)
    ]
    batch = batches.training(text[0], seed=0, batch_size=config.batch_size)[0]
    batch = meshes.to_devices(batch, meshes.batch_sharding(mesh))
    analyse = during.Analyses(config, program.model, text[1])
    step, _ = program.compile()
    state = program.init(jax.random.key(0))

    def seconds(of):
        start = time.perf_counter()
        made = jax.block_until_ready(of())
        return made, time.perf_counter() - start

    cold = seconds(lambda: analyse(state.params, state.step))[1]
    for _ in range(2):
        state, _ = step(state, batch)
    steps, calls = [], []
    for _ in range(options.repeats):
        (state, _), spent = seconds(lambda: step(state, batch))  # noqa: B023
        steps.append(spent)
        calls.append(seconds(lambda: analyse(state.params, state.step))[1])  # noqa: B023
    (state, _), spent = seconds(lambda: step(state, batch))
    steps.append(spent)
    ratios = [call * 2 / (before + after) for call, before, after in zip(calls, steps, steps[1:], strict=False)]

    interval = min(config.analysis.every or config.num_steps, config.num_steps)
    share = during.share(config, program.flops_per_position())
    print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}, python {platform.python_version()}')
    print(f'{options.config}: analyses on {config.analysis.tokens:,} tokens every {interval:,} steps')
    print('| | train steps that one call costs | share of the training |\n|---|---|---|')
    print(f'| FLOPs by formula | {share * interval:.2f} | {share:.2%} |')
    median = statistics.median(ratios)
    print(f'| time (median of {len(ratios)} pairs) | {median:.2f} | {median / interval:.2%} |')
    print(f'lowest {min(ratios):.2f}, highest {max(ratios):.2f}; a step {statistics.median(steps):.3f} s')
    print(f'the first call, which compiles: {cold:.1f} s')


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

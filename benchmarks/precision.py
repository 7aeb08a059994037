"""Losses in bfloat16 against float32: `python -m benchmarks.precision [--config FILE] [--config.KEY=VALUE ...]`.

The same runs twice, with the same weights and batches at the start, computed in the one type and in the other; weights
and moments are float32 in both. Prints of every seed the mean of the last losses, then their difference, paired and
unpaired, with its standard error over the seeds.
"""

import argparse
import functools
import math
import statistics
import sys

import jax

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.data import batches, rows
from mixln_jax.distributed import mesh as meshes
from mixln_jax.program.program import Program
from mixln_jax.system import cli, console

TYPES = 'float32', 'bfloat16'


def main(argv):
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m benchmarks.precision', description=__doc__, allow_abbrev=False, usage='%(prog)s [options]'
    )
    parser.add_argument('--config', default='configs/quickstart.py', metavar='FILE', help='[configs/quickstart.py]')
    parser.add_argument('--steps', type=int, default=200, metavar='N', help='of each run [200]')
    parser.add_argument('--last', type=int, default=50, metavar='N', help='of them whose losses are compared [50]')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], metavar='N', help='[0 1 2]')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def command():
        options, rest = cli.parse_known(parser, argv)
        means = {of: [] for of in TYPES}
        for of in TYPES:
            settings = [*recipes.overrides(rest), ('compute_dtype', of), ('num_steps', str(options.steps))]
            losses = runs(configs.build(recipes.load(options.config, settings)))
            for seed in options.seeds:
                means[of].append(statistics.fmean(losses(seed)[-options.last :]))
                console.say(f'{of}, seed {seed}: {means[of][-1]:.4f}')
        for line in table(options, means):
            print(line)

    return cli.call(command, show_traceback='--traceback' in argv)


def runs(config):
    """A function of a seed, of weights and order of batches, that gives the losses of a run."""
    mesh = meshes.make_mesh(config.mesh, meshes.devices(config.device))
    program = Program(config, mesh)
    tokenizer = rows.open_tokenizer(config.data)
    text = rows.open_rows(config.data, config.data.split, tokenizer, config.seq_length, config.model.vocab_size)
    step = program.compile()[0]
    place = functools.partial(meshes.to_devices, sharding=meshes.batch_sharding(mesh))

    def losses(seed):
        state, found = program.init(jax.random.key(seed)), []
        data = batches.training(text, seed=seed, batch_size=config.batch_size)
        for at in range(config.num_steps):
            state, metrics = step(state, place(data[at]))
            found.append(metrics['loss'])
        return [float(loss) for loss in found]

    return losses


def table(options, means):
    """Lines of markdown."""
    wide, narrow = (means[of] for of in TYPES)
    differences = [b - a for a, b in zip(wide, narrow, strict=True)]
    yield f'jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.config}, {options.steps} steps'
    yield f'means of the last {options.last} losses'
    yield f'| seed | {" | ".join(TYPES)} | difference |'
    yield '|---|---|---|---|'
    for seed, a, b, d in zip(options.seeds, wide, narrow, differences, strict=True):
        yield f'| {seed} | {a:.4f} | {b:.4f} | {d:+.4f} |'
    if len(options.seeds) > 1:
        error = lambda values: statistics.stdev(values) / math.sqrt(len(values))  # noqa: E731
        unpaired = math.hypot(error(wide), error(narrow))
        mean = [f'{statistics.fmean(values):.4f}' for values in (wide, narrow)]
        yield f'| mean | {" | ".join(mean)} | {statistics.fmean(differences):+.4f} |'
        yield (
            f'standard error of the difference over the seeds: paired {error(differences):.4f}, unpaired {unpaired:.4f}'
        )


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

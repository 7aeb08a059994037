"""What the devices compute and say to each other as they get more: `python -m benchmarks.scaling [RECIPE] [--rows N]`.

Weak scaling as a count, not a time: the train step is compiled for 1, 2, 4 and 8 virtual CPU devices, the same rows on
each, along `data` and along `fsdp`. FLOPs of a device should stay, bytes should be those that no method avoids:

    data   the gradients of all matrices and norms, in float32, once: 4 P
    fsdp   all matrices in the type of computing, once, and a device's part of the gradients in float32: b P + 4 P / N

P numbers of parameters, b bytes of the type of computing, N devices; bytes are of a collective's results on a device.
"""

import argparse
import os
import pathlib

os.environ |= {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '8'}

import jax

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.distributed import mesh as meshes
from mixln_jax.kernels import cross_entropy
from mixln_jax.plan import hlo
from mixln_jax.program.program import Program

ROOT = pathlib.Path(__file__).parents[1]


def count(recipe, rows, axis, devices):
    """(FLOPs of a device, {collective: (times, bytes)}, the fewest bytes) of a compiled step."""
    length = cross_entropy.CHUNK_ON_CPU // rows  # one chunk of the loss: XLA counts the body of a loop once
    given = {'batch_size': rows * devices, 'seq_length': length, 'model.scan_unroll': 'all', 'device': 'cpu'}
    given |= {'compute_dtype': 'float32', 'mesh.data': 1, f'mesh.{axis}': devices}
    config = configs.build(recipes.load(f'{ROOT}/configs/{recipe}.py', [(k, str(v)) for k, v in given.items()]))
    program = Program(config, meshes.make_mesh(config.mesh, jax.devices('cpu')))
    executable = program.train_step.lower(program.state, program.batch(config.batch_size)).compile()
    numbers = sum(leaf.size for leaf in jax.tree.leaves(program.state.params))
    fewest = {'data': 4 * numbers, 'fsdp': 4 * numbers + 4 * numbers / devices}[axis] if devices > 1 else 0
    return executable.cost_analysis()['flops'], hlo.collectives(executable.as_text()), fewest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', nargs='?', default='llama_9m')
    parser.add_argument('--rows', type=int, default=8, help='of every device [8]')
    options = parser.parse_args()
    print(f'{options.recipe}, {options.rows} rows on a device, float32, jax {jax.__version__}, virtual CPU devices\n')
    print('| mesh | FLOPs of a device : of one alone | collectives, MB | of the fewest |  |\n|---|---|---|---|---|')
    alone = None
    for axis, sizes in (('data', (1, 2, 4, 8)), ('fsdp', (2, 4, 8))):
        for devices in sizes:
            flops, said, fewest = count(options.recipe, options.rows, axis, devices)
            alone, total = alone or flops, sum(size for _, size in said.values())
            share = f'{total / fewest:.3f}' if fewest else '-'
            kinds = ', '.join(f'{times} {kind} {size / 1e6:.1f}' for kind, (times, size) in sorted(said.items()))
            print(f'| {axis} {devices} | {flops / alone:.4f} | {total / 1e6:.1f} | {share} | {kinds} |', flush=True)


if __name__ == '__main__':
    main()

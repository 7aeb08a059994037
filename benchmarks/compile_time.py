"""Compile time of the train step against depth: `python -m benchmarks.compile_time [--repeats N]`.

A segment of equal layers is one loop, so 96 layers compile about as fast as 12. Each is compiled in turn with 12
layers, afresh each time; the ratio is taken pair by pair.
"""

import argparse
import functools
import platform
import statistics
import time

import jax
import jax.numpy as jnp

from mixln_jax import config
from mixln_jax.models import families
from mixln_jax.program import optim, step
from mixln_jax.tasks.language import Language


def compile_seconds(num_layers, scan_unroll, norm_position='mix'):
    """Seconds to lower and compile one train step of a 9m-wide LLaMA."""
    jax.clear_caches()
    sizes = config.Model(
        hidden_size=128,
        intermediate_size=352,
        num_heads=4,
        num_layers=num_layers,
        norm_position=norm_position,
        scan_unroll=scan_unroll,
    )
    model, optimizer = families.from_config(sizes), optim.optimizer(config.Optim())
    state = jax.eval_shape(functools.partial(step.init_state, Language(model), optimizer), jax.random.key(0))
    types = {'inputs': jnp.int32, 'targets': jnp.int32, 'loss_mask': jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((8, 256), dtype) for name, dtype in types.items()}
    update = functools.partial(step.train_step, task=Language(model), optimizer=optimizer, schedule=lambda _: 1e-3)
    start = time.perf_counter()
    jax.jit(update, donate_argnums=0).lower(state, batch).compile()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repeats', type=int, default=5)
    repeats = parser.parse_args().repeats
    compile_seconds(12, '1')  # what only the first compilation pays
    print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}, python {platform.python_version()}')
    print('| layers | scan_unroll | compile s (median) | against 12 layers in a loop |\n|---|---|---|---|')
    for depth, unroll in ((12, '1'), (96, '1'), (12, 'all'), (96, 'all')):
        pairs = [(compile_seconds(depth, unroll), compile_seconds(12, '1')) for _ in range(repeats)]
        median, ratio = statistics.median(a for a, _ in pairs), statistics.median(a / b for a, b in pairs)
        print(f'| {depth} | {unroll} | {median:.2f} | {ratio:.2f} |', flush=True)


if __name__ == '__main__':
    main()

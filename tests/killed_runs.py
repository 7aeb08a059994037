"""A run as a process of its own, to be killed or stopped, and its comparison with another run."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[1]
LAST = 40
RECIPE = 'configs/quickstart.py'
CHANGES = {
    'num_steps': LAST,
    'batch_size': 8,
    'seq_length': 32,
    'log_every': 1,
    'model.hidden_size': 32,
    'model.intermediate_size': 48,
    'model.num_layers': 3,
    'model.num_heads': 2,
    'eval.every': 10,
    'eval.tokens': 40_000,
    'checkpoint.every': 4,
    'device': 'cpu',
}
# Where the signal comes: what the log says just before.
PHASES = {
    'imports': '',
    'start-up': 'placement',
    'compilation': ' parameters',
    'step': f'step  6/{LAST}',
    'restore': ' parameters',
    'evaluation': f'step 10/{LAST}',
    'save': 'eval at step 20',
    'near the end': f'step 39/{LAST}',
}


def start(workdir, **environment):
    """Starts the command as a user gives it; returns (process, its log, which is workdir.log)."""
    command = [sys.executable, '-m', 'mixln_jax.main', '--config', RECIPE, '--workdir', str(workdir)]
    command += [f'--config.{name}={value}' for name, value in CHANGES.items()]
    log = workdir.with_suffix('.log')
    # As users run it: one device, all of XLA's optimisations.
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': '1', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'} | environment
    with log.open('ab') as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environment)
    return process, log


def wait_for(process, log, words, offset):
    """Returns when `words` are in the log after `offset`, or the process has ended."""
    while process.poll() is None and words.encode() not in log.read_bytes()[offset:]:
        time.sleep(0.005)


def finish(workdir):
    """Runs the command to its end. Raises AssertionError with the end of the log if it fails."""
    process, log = start(workdir)
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]


def assert_same_run(workdir, other):
    """Raises AssertionError unless two runs have the same lines, speed apart, and the same last weights."""

    def lines(folder):
        read = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        return [{name: value for name, value in line.items() if not name.startswith('perf/')} for line in read]

    def weights(folder):
        return ocp.StandardCheckpointer().restore(folder / 'checkpoints' / str(LAST) / 'state')

    assert lines(workdir) == lines(other)
    jax.tree.map(np.testing.assert_array_equal, weights(workdir), weights(other))

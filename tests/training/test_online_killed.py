"""Runs that learn from generated text, killed in sampling, scoring and update, end as undisturbed ones, bit for bit."""

import os
import signal
import subprocess
import sys

import killed_runs
import pytest

ONLINE = {
    'task.name': 'online', 'task.online.reward': 'mixln_jax.evaluation.reward_functions:exact',
    'task.online.max_new_tokens': 5, 'task.online.updates': 2, 'data.source': 'shelves',
    'data.template': 'plain',    'data.mode': 'pad', 'eval.tokens': 100, 'eval.samples': 4,
}  # fmt: skip
# Kills this process in a phase of its seventh step, then runs the command as a user does.
KILLED = """
import os, signal, sys, threading
from mixln_jax import main
from mixln_jax.evaluation import reward_functions, rollouts
from mixln_jax.models.sampler import Sampler

phase, calls = sys.argv.pop(1), {'sampling': 0, 'scoring': 0, 'update': 0}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def reached(name):
    calls[name] += 1
    return name == phase and calls[name] == 7

exact, stream, training = reward_functions.exact, Sampler.stream, rollouts.Rollouts.training

def dying_stream(self, *arguments, **options):
    last = reached('sampling')
    for completions in stream(self, *arguments, **options):
        yield completions
        if last:
            die()

def dying_exact(completions, answer):
    if reached('scoring'):
        die()
    return exact(completions, answer)

def dying_training(self, *arguments):
    batch = training(self, *arguments)
    if reached('update'):
        threading.Timer(0.002, die).start()
    return batch

reward_functions.exact, Sampler.stream, rollouts.Rollouts.training = dying_exact, dying_stream, dying_training
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A run whose weights are to learn."""
    folder = tmp_path_factory.mktemp('base') / 'run'
    killed_runs.finish(folder)
    return folder


@pytest.mark.slow
def test_kills(base, tmp_path, monkeypatch):
    monkeypatch.setattr(killed_runs, 'CHANGES', killed_runs.CHANGES | ONLINE | {'init_from': base})
    killed_runs.finish(tmp_path / 'whole')
    run = tmp_path / 'run'
    flags = [f'--config.{name}={value}' for name, value in killed_runs.CHANGES.items()]
    command = ['--config', 'configs/quickstart.py', '--workdir', str(run), *flags]
    environment = os.environ | {'JAX_NUM_CPU_DEVICES': '1', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
    for phase in ('sampling', 'scoring', 'update'):
        done = subprocess.run(
            [sys.executable, '-c', KILLED, phase, *command], cwd=killed_runs.ROOT, env=environment, capture_output=True
        )
        assert done.returncode == -signal.SIGKILL, (phase, done.stderr[-3000:])
        assert (run / 'metrics.jsonl').exists()
    killed_runs.finish(run)
    killed_runs.assert_same_run(run, tmp_path / 'whole')
    for step in (10, 40):
        sample = f'samples/{step}.jsonl'
        assert (run / sample).read_bytes() == (tmp_path / 'whole' / sample).read_bytes()

"""Twelve cells, three workers that are killed with -9 at random, two of them in another working copy: every cell is
done once, and is bitwise the run that it is alone."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from mixln_jax import main
from mixln_jax.runs import sweep_cells, sweep_folder

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 12
RECIPE = f"""
from mixln_jax import config

def get_config():
    c = config.default()
    c.batch_size, c.seq_length, c.num_steps, c.log_every = 4, 16, {STEPS}, 1
    c.compute_dtype, c.device, c.mesh.data = 'float32', 'cpu', 1
    c.model.update(vocab_size=259, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
    c.data.update(source='text', path='train.txt', validation_path='validation.txt', tokenizer='bytes')
    c.eval.update(every=4, tokens=200)
    c.checkpoint.every, c.analysis.tokens = 2, 0
    return c
"""
WORDS = '--over model.norm_position=pre,post,deepnorm --over optim.learning_rate=1e-3,1e-2 --seeds 2'.split()  # noqa: SIM905


def environment(copy):
    return os.environ | {'PYTHONPATH': str(copy), 'PYTHONDONTWRITEBYTECODE': '1'}


def start(copy, here):
    """A worker whose code is that of a working copy; the processes of its cells die with it."""
    log = (here / 'worker.log').open('ab')
    command = [sys.executable, '-m', 'mixln_jax.sweep', '--config', 'tiny.py', '--workdir', 'out', *WORDS]
    return subprocess.Popen(command, cwd=here, env=environment(copy), stdout=log, stderr=log)


def kill(worker):
    """Kills a worker, and half of the time the process of its cell in the same instant."""
    children = subprocess.run(['pgrep', '-P', str(worker.pid)], capture_output=True, text=True).stdout.split()
    os.kill(worker.pid, signal.SIGKILL)
    for child in children if random.random() < 0.5 else ():
        os.kill(int(child), signal.SIGKILL)
    worker.wait()


def lines_of(run):
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith('perf/')} for line in lines]


def weights_of(run):
    return ocp.StandardCheckpointer().restore(run / 'checkpoints' / str(STEPS) / 'state')


@pytest.mark.slow
def test_killed_workers(tmp_path, monkeypatch):
    random.seed(1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'tiny.py').write_text(RECIPE)
    for split in ('train', 'validation'):
        (tmp_path / f'{split}.txt').write_text('the quick brown fox jumps over one lazy dog\n\n' * 200)
    copy = tmp_path / 'copy'  # a second machine
    shutil.copytree(ROOT / 'mixln_jax', copy / 'mixln_jax', ignore=shutil.ignore_patterns('__pycache__'))
    copies = [ROOT, copy, copy]
    workers, kills, deadline = [start(one, tmp_path) for one in copies], 0, time.monotonic() + 900
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        time.sleep(random.uniform(2, 8))
        number = random.randrange(3)
        if kills < 12 and workers[number].poll() is None:
            kill(workers[number])
            kills += 1
            workers[number] = start(copies[number], tmp_path)
    assert kills == 12 and [worker.returncode for worker in workers] == [0, 0, 0], (tmp_path / 'worker.log').read_text()
    assert start(ROOT, tmp_path).wait() == 0  # whatever a worker left that was killed last
    definition = sweep_folder.read_definition(tmp_path / 'out')
    assert len(definition.cells) == 12
    sweep_cells.check_unedited(tmp_path / 'out', definition, definition.cells)
    alone = tmp_path / 'alone'
    for name, changes in definition.cells.items():
        run = tmp_path / 'out' / name
        ending = sweep_folder.read_ending(run)
        assert ending.state == 'done'
        assert [line['step'] for line in lines_of(run)] == [*range(1, STEPS + 1)]
        words = [f'--config.{key}={value}' for key, value in changes.items()]
        assert main.main(['--config', 'tiny.py', '--workdir', str(alone / name), *words]) == 0
        assert lines_of(run) == lines_of(alone / name)
        jax.tree.map(np.testing.assert_array_equal, weights_of(run), weights_of(alone / name))

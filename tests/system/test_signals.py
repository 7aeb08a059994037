"""Real processes, real signals: killed at any time, a run ends with the bits of one that nothing disturbed."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from killed_runs import LAST, PHASES, assert_same_run, finish, start, wait_for

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
    finish(workdir)
    return workdir


def test_kill_9_at_random_times(undisturbed, tmp_path):
    chance, workdir = random.Random(0), tmp_path / 'run'
    log = workdir.with_suffix('.log')
    for target in sorted(chance.sample(range(2, LAST), 4)):
        offset = log.stat().st_size if log.exists() else 0
        process, log = start(workdir)
        wait_for(process, log, f'step {target:>2}/{LAST}', offset)
        time.sleep(chance.uniform(0, 0.2))  # in the next steps, an evaluation, or a save
        process.kill()
        assert process.wait() == -signal.SIGKILL
    finish(workdir)
    assert 'goes on from step' in log.read_text()
    assert_same_run(workdir, undisturbed)


def test_signals_in_every_phase(undisturbed, tmp_path):
    workdir = tmp_path / 'run'
    for turn, (phase, words) in enumerate(PHASES.items()):
        number = (signal.SIGTERM, signal.SIGINT)[turn % 2]
        log = workdir.with_suffix('.log')
        offset = log.stat().st_size if log.exists() else 0
        cache = '' if phase == 'compilation' else os.environ['JAX_COMPILATION_CACHE_DIR']
        process, log = start(workdir, JAX_COMPILATION_CACHE_DIR=cache)
        wait_for(process, log, words, offset)
        time.sleep(0.3 if phase in ('imports', 'compilation') else 0.01)
        process.send_signal(number)
        shown = lambda: log.read_text()[offset:]  # noqa: E731, B023
        assert process.wait(timeout=120) == 75, (phase, shown())
        assert f'stopped by {number.name}; run the same command again' in shown().splitlines()[-1], (phase, shown())
        assert 'Traceback' not in shown(), (phase, shown())
    finish(workdir)
    assert_same_run(workdir, undisturbed)


def test_a_second_signal_ends_at_once(tmp_path):
    process, log = start(tmp_path / 'run')
    wait_for(process, log, f'step 10/{LAST}', 0)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 75


COMMANDS = {
    'evaluate': ['--checkpoint', 'a'],
    'export': ['--checkpoint', 'a', '--out', 'b'],
    'generate': ['--checkpoint', 'a', '--prompt', 'b'],
    'replay': ['--workdir', 'a'],
    'report': ['a'],
    'plan': ['--config', 'configs/llama_7b.py', '--topology', 'v5p:4x4x4'],
    'analysis.angular': ['--checkpoint', 'a'],
    'analysis.drop': ['--checkpoint', 'a'],
    'analysis.gradients': ['--checkpoint', 'a'],
    'analysis.variance': ['--checkpoint', 'a'],
    'data.inspect': ['--workdir', 'a', '--step', '1'],
    'data.prepare': ['--source', 'stdlib', '--format', 'tokens', '--tokenizer', 'bytes', '--out', 'c'],
    'data.train_tokenizer': ['--source', 'stdlib', '--vocab_size', '300', '--out', 'd'],
}


@pytest.mark.parametrize('name', COMMANDS)
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_command_answers_a_signal_in_its_imports(name, number, tmp_path):
    command = ['env', '--default-signal=INT,HUP', sys.executable, '-m', f'mixln_jax.{name}', *COMMANDS[name]]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(ROOT)}, stderr=-1, text=True)
    taken_over = 1 << signal.SIGTERM - 1
    status = pathlib.Path(f'/proc/{process.pid}/status')
    while not int(re.search(r'SigCgt:\s*(\w+)', status.read_text())[1], 16) & taken_over:
        time.sleep(0.01)  # before that Python itself starts; the imports that come now take seconds
    process.send_signal(number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 75, shown
    assert shown == f'mixln_jax: stopped by {number.name}; run the same command again to continue\n'


def test_finished_and_help_exit_with_0(undisturbed):
    finish(undisturbed)
    assert 'already finished' in undisturbed.with_suffix('.log').read_text()
    command = [sys.executable, '-m', 'mixln_jax.main', '--help']
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0

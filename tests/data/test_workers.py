"""Worker processes that end, hang or never begin, in real scripts; a terminal that goes away."""

import os
import pathlib
import pty
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow

READ = """
import multiprocessing, os, signal, sys, time
from mixln_jax import config
from mixln_jax.data import batches, rows, tokenizers
from mixln_jax.data.prepare import command as prepare
from mixln_jax.system import cli

class Texts(list):
    fingerprint = '0'

    def __getitems__(self, indices):
        return [self[i] for i in indices]

class Hanging(Texts):
    def __getitems__(self, indices):
        time.sleep(100)

def read(texts):
    documents = rows.Documents(texts, tokenizers.Bytes(), 4)
    return batches.read(batches.training(documents, seed=0, batch_size=1), 0, 2)

LARGE = Texts(['a' * 200_000])  # more than a pipe takes
"""
KILLED = """
def job():
    for number, _ in enumerate(read(LARGE)):
        if number == 9:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

if __name__ == '__main__':
    sys.exit(cli.call(job))
"""
HANGING = """
if __name__ == '__main__':
    print('begun', flush=True)
    next(read(Hanging('abc')))
"""
GUARD = "under `if __name__ == '__main__':`"


def run(tmp_path, text, *words, **options):
    (tmp_path / 'script.py').write_text(READ + text)
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    # A shell's background jobs ignore SIGINT, and so would what they start.
    command = ['env', '--default-signal=INT', sys.executable, str(tmp_path / 'script.py'), *words]
    return subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    'job',
    [
        'next(read(LARGE))',
        'next(read(Texts("abc")))',
        'sys.exit(cli.call(next, read(LARGE)))',
        'if multiprocessing.parent_process(): sys.exit(3)\nnext(read(LARGE))',
    ],
)
def test_a_script_without_a_guard(tmp_path, job):
    process = run(tmp_path, job)
    _, errors = process.communicate(timeout=300)
    assert process.returncode and GUARD in errors


def test_prepare_without_a_guard(tmp_path):
    for number in range(2):
        lines = (f'{{"text": "text {i} of {number}"}}\n' for i in range(300))
        (tmp_path / f'{number}.jsonl').write_text(''.join(lines))
    data = "config.Data(source='jsonl', path='*.jsonl', tokenizer='bytes')"
    job = f"prepare.prepare({data}, 'out', format='tokens', seq_length=16, workers=2)"
    process = run(tmp_path, f'sys.exit(cli.call(lambda: {job}))')
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2 and GUARD in errors.splitlines()[-1]
    assert 'Traceback' not in errors


def test_a_killed_worker_is_told_in_one_line(tmp_path):
    process = run(tmp_path, KILLED)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 7
    assert errors.splitlines() == [
        'mixln_jax: a worker process was killed (SIGKILL), most often because memory ran out: lower data.workers'
    ]


def test_ctrl_c_while_the_first_batch_hangs(tmp_path):
    process = run(tmp_path, HANGING, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == 'begun\n'
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT and 'KeyboardInterrupt' in errors


@pytest.mark.parametrize('ignored', [True, False])
def test_a_terminal_that_goes_away(tmp_path, ignored):
    """With the hang-up ignored (nohup, disown) the run goes on to its end, else it saves and can go on."""
    words = {'num_steps': 60, 'batch_size': 4, 'seq_length': 32, 'log_every': 5, 'data.workers': 1, 'device': 'cpu'}
    words |= {'model.hidden_size': 32, 'model.intermediate_size': 48, 'model.num_layers': 2, 'model.num_heads': 2}
    words |= {'eval.every': 0, 'eval.tokens': 500, 'analysis.tokens': 0, 'checkpoint.every': 0}
    command = [sys.executable, '-m', 'mixln_jax.main', '--config', 'configs/quickstart.py', '--workdir', str(tmp_path)]
    command += [f'--config.{name}={value}' for name, value in words.items()]
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.environ['JAX_NUM_CPU_DEVICES'] = '1'
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        os.execvp(command[0], command)
    seen = b''
    while b'step 10/60' not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    saved = [int(path.name) for path in (tmp_path / 'checkpoints').iterdir()]
    assert (code, saved) == (0, [60]) if ignored else (code == 75 and 10 <= saved[0] < 60)

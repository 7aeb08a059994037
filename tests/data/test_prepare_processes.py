"""data.prepare as processes: killed at any time, stopped by a signal, short of a worker."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import memory
import pytest
from corpora import contents, texts, write

from mixln_jax.data import prepared

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def start(corpus, out, *words, format='tokens'):
    command = [
        sys.executable,
        '-m',
        'mixln_jax.data.prepare',
        '--source',
        'jsonl',
        '--path',
        f'{corpus}/*.gz',
        '--format',
        format,
    ]
    command += ['--tokenizer', 'bytes', '--mode', 'pack', '--out', str(out), *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def children(pid):
    return [
        int(path.parent.name)
        for path in pathlib.Path('/proc').glob('[0-9]*/stat')
        if path.exists() and path.read_text().rpartition(')')[2].split()[1] == str(pid)
    ]


def alive(pid):
    return os.path.exists(f'/proc/{pid}')


def partial(out, since=0.0):
    """Whether some of a shard has been written since then, and not all."""
    with contextlib.suppress(FileNotFoundError):  # it is whole by now
        states = [path.stat() for path in out.rglob('*train*.partial')]
        return any(state.st_size and state.st_mtime > since for state in states)
    return False


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    """Six files, half a second of work each, of different sizes: two workers do not end at once."""
    folder = tmp_path_factory.mktemp('large')
    for number in range(6):
        path = write(folder / f'{number}.json.gz', texts(number, 5000))
        path.write_bytes(path.read_bytes() * (6 + number))
    return folder


@pytest.mark.parametrize('format', ['tokens', 'tfds'])
def test_killed_and_run_again(large, tmp_path, format):
    """Whenever it is killed, what is there by then is whole, and the end is the same."""
    whole = start(large, tmp_path / 'whole', '--workers', '2', format=format)
    assert whole.wait(120) == 0
    out = tmp_path / 'killed'
    for finished in range(3):
        begun = time.time()
        process = start(large, out, '--workers', '2', format=format)
        until(lambda n=finished, t=begun: len([*out.rglob(f'{prepared.WORK}/both*.json')]) >= n and partial(out, t))
        workers = children(process.pid)
        assert len(workers) >= 2
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert not [*out.rglob(prepared.DESCRIPTION), *out.rglob('dataset_info.json')]
        until(lambda pids=workers: not any(map(alive, pids)))
    last = start(large, out, '--workers', '1', format=format)
    assert last.wait(120) == 0
    assert contents(tmp_path / 'whole') == contents(out)


@pytest.mark.parametrize('words', [(), ('--shards', '5:'), ('--shards', '0:1', '--workers', '1')])
def test_two_at_once(large, tmp_path, words):
    """The second is refused, and the first ends as if it had been alone."""
    out = tmp_path / 'out'
    first = start(large, out, '--workers', '2')
    until(lambda: partial(out))
    second = start(large, out, *words)
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 2
    assert b'another process prepares this shard' in errors and errors.count(b'\n') == 1
    assert first.wait(120) == 0
    assert start(large, out, *words).wait(120) == 0  # there is nothing left to do
    assert start(large, tmp_path / 'alone', '--workers', '2').wait(120) == 0
    assert contents(out) == contents(tmp_path / 'alone') and not list(out.rglob('*.lock'))


def test_hosts_at_once(large, tmp_path):
    parts = [start(large, tmp_path / 'out', '--workers', '1', '--shards', part) for part in ('0:3', '3:6')]
    assert [process.wait(120) for process in parts] == [0, 0]
    assert start(large, tmp_path / 'alone', '--workers', '2').wait(120) == 0
    assert contents(tmp_path / 'out') == contents(tmp_path / 'alone')


def test_sigterm(large, tmp_path):
    process = start(large, tmp_path / 'out', '--workers', '2')
    until(lambda: partial(tmp_path / 'out'))
    workers = children(process.pid)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75
    assert b'run the same command again' in errors.splitlines()[-1]
    assert len(workers) >= 2
    until(lambda: not any(map(alive, workers)))
    assert not list(tmp_path.rglob('*.partial')) and not list(tmp_path.rglob('*.lock'))


def test_a_killed_worker_is_told(large, tmp_path):
    process = start(large, tmp_path / 'out', '--workers', '2')
    until(lambda: partial(tmp_path / 'out'))
    for pid in children(process.pid):
        if b'spawn_main' in pathlib.Path(f'/proc/{pid}/cmdline').read_bytes():
            os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 7
    assert b'a worker process was killed' in errors.splitlines()[-1]


@memory.LINUX
def test_memory_does_not_grow_with_the_text(large, tmp_path):
    peaks = []
    for name, repeat in (('small', 1), ('large', 8)):
        (tmp_path / f'{name}.json.gz').write_bytes((large / '0.json.gz').read_bytes() * repeat)
        code = (
            'import memory, sys\n'
            'from mixln_jax.data.prepare import command as prepare\n'
            'assert prepare.main(sys.argv[1:]) == 0\n'
            'print(memory.peak())'
        )
        words = f'--source jsonl --path {tmp_path}/{name}.json.gz --out {tmp_path}/{name} --format tokens --workers 1'
        command = [sys.executable, '-c', code, *words.split(), '--tokenizer', 'bytes', '--mode', 'pack']
        paths = os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT}/tests'}
        shown = subprocess.run(command, env=paths, capture_output=True, text=True, check=True).stdout
        peaks.append(int(shown.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 10, peaks

"""How a run ends: signals, what an error of reading or of a worker saves and says, paths that cannot be used."""

import contextlib
import errno
import logging
import os
import pathlib
import pwd
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types

import absl.logging
import pytest

from mixln_jax import config as configs
from mixln_jax import evaluate, export, main, replay
from mixln_jax.analysis import drop, subjects
from mixln_jax.data import inspect, train_tokenizer, workers
from mixln_jax.data.prepare import command as prepare
from mixln_jax.models import families
from mixln_jax.report import command as report
from mixln_jax.runs import environment, start_weights
from mixln_jax.system import cli, errors, files, signals
from mixln_jax.system.errors import DataError, MemoryExhausted, Stopped, UsageError
from mixln_jax.training import hooks, loop

ROOT = pathlib.Path(__file__).parents[2]
QUICKSTART = str(ROOT / 'configs/quickstart.py')


class TestSignals:
    def test_a_hang_up_is_never_the_second_signal(self, monkeypatch):
        ended = []
        monkeypatch.setattr(os, '_exit', ended.append)
        now = 100.0
        monkeypatch.setattr(time, 'monotonic', lambda: now)
        stop = signals.Stop()
        for number, wanted in ((signal.SIGHUP, 0), (signal.SIGHUP, 0), (signal.SIGTERM, 0), (signal.SIGHUP, 0)):
            stop._handle(number, None)
            now += 10
            assert stop.requested == signal.Signals(number).name and len(ended) == wanted
        stop._handle(signal.SIGINT, None)
        assert ended == [75]

    def test_the_wait_for_a_batch_ends_at_once(self):
        stop = signals.Stop()
        with pytest.raises(Stopped), stop.interruptible():
            stop._handle(signal.SIGHUP, None)
        stop._handle(signal.SIGTERM, None)  # outside it waits
        assert stop.requested == 'SIGTERM'

    @pytest.mark.parametrize('before, wanted', [('', 'True'), ("trap '' HUP;", 'False')])
    def test_an_ignored_hang_up_stays_ignored(self, before, wanted):
        code = 'import signal; from mixln_jax.system.signals import stop; stop.install(); '
        code += 'print(callable(signal.getsignal(1)))'
        words = ['env', '--default-signal=HUP', 'bash', '-c', f'{before} {sys.executable} -c "$0"', code]
        done = subprocess.run(words, cwd=ROOT, capture_output=True)  # these tests may run under nohup
        assert done.stdout.decode().split() == [wanted]


class TestReadingFails:
    """train.fit with a step that counts and a reader that fails."""

    @staticmethod
    def fit(batches, hooks=(), first=1):
        saved, added, debug = [], [], []
        meter = types.SimpleNamespace(
            waiting=lambda previous: contextlib.nullcontext(),  # any context
            paused=lambda: contextlib.nullcontext(),
            add=lambda number, *rest: added.append(number),
            flush=lambda: None,
            debug=lambda *args: debug.append(args),
        )

        def save(number, state, complete=True, wait=False):
            assert state == number and wait  # the state of that very step, and on disk before anybody is told
            saved.append((number, complete))

        step = lambda state, batch: (state + 1, {})  # noqa: E731
        options = dict(first=first, last=9, meter=meter, save=save, stop=signals.Stop())
        try:
            loop.fit(first - 1, step, batches, list(hooks), **options)
        except BaseException as error:
            return error, saved, added
        raise AssertionError('no error')

    ERRORS = [
        DataError('a record'),
        RuntimeError('a library'),
        MemoryError(),
        OSError(errno.EIO, 'Input/output error'),
        MemoryExhausted('a worker'),
        KeyboardInterrupt(),
        Stopped('stopped by SIGHUP'),
    ]

    @staticmethod
    def failing(count, error):
        yield from range(count)
        raise error

    @pytest.mark.parametrize('error', ERRORS, ids=lambda error: type(error).__name__)
    def test_whatever_it_raises(self, error):
        for count, first, wanted in ((4, 1, [(4, True)]), (2, 5, [(6, True)]), (0, 1, []), (0, 5, [])):
            raised, saved, added = self.fit(self.failing(count, error), first=first)
            assert raised is error and saved == wanted
            assert added == list(range(first, first + count))  # the last step's metrics too

    @pytest.mark.parametrize('error', ERRORS, ids=lambda error: type(error).__name__)
    def test_in_a_hook(self, error):
        """The step's hooks are made up for when the run goes on: its line is not complete."""

        class Hook(hooks.Saving):
            def __call__(self, number, state):
                raise error

        raised, saved, _ = self.fit(iter(range(9)), hooks=[Hook(3, None, None, None)])
        assert raised is error and saved == [(3, False)]

    def test_a_save_that_fails_hides_nothing(self, capsys):
        error = DataError('a record')
        meter = types.SimpleNamespace(
            waiting=lambda previous: contextlib.nullcontext(), add=lambda *args: None, flush=lambda: None
        )

        def save(*args, **options):
            raise OSError(errno.ENOSPC, 'No space left on device')

        options = dict(first=1, last=9, meter=meter, save=save, stop=signals.Stop())
        with pytest.raises(DataError, match='a record'):
            loop.fit(0, lambda state, batch: (state, {}), self.failing(3, error), [], **options)
        assert 'warning: step 3 cannot be saved: the disk is full: [Errno 28] No space left' in capsys.readouterr().err

    def test_one_of_several_processes_does_not_save_by_itself(self, monkeypatch):
        monkeypatch.setattr(loop.jax, 'process_count', lambda: 2)
        raised, saved, _ = self.fit(self.failing(4, DataError('a record')))
        assert str(raised) == 'a record' and not saved


SETTINGS = 'data.workers', 'data.workers=0'


class TestWorkers:
    @pytest.mark.parametrize(
        'error, begun, code, words',
        [
            ('exit code -9', True, 7, 'killed (SIGKILL), most often because memory ran out: lower data.workers'),
            ('exit code -9', False, 7, 'because memory ran out'),
            ('exit code -7', True, 2, 'no shared memory in /dev/shm'),
            ('exit code -11', True, 1, 'ended by signal 11 (Segmentation fault)'),
            ('exit code 1', False, 2, "`if __name__ == '__main__':`"),
            ('exit code 3', True, 1, 'has ended with exit code 3'),
            (OSError(errno.ENOSPC, 'No space left on device'), True, 2, 'give data.workers=0, or make /dev/shm larger'),
            (OSError(errno.ENOSPC, 'No space left on device', '/psm_1'), True, 2, '--shm-size'),
            (OSError(errno.ENOSYS, 'Function not implemented'), False, 2, '/dev/shm'),
        ],
    )
    def test_what_an_end_means(self, error, begun, code, words):
        if isinstance(error, str):
            error = RuntimeError(f'Worker process was terminated unexpectedly with {error}. Search the logs')
        found = errors.to_exit(workers.explained(error, SETTINGS, begun))
        assert found.code == code and words in str(found)

    @pytest.mark.parametrize(
        'error',
        [ValueError('mine'), OSError(errno.ENOSPC, 'No space', '/data/x'), OSError(errno.EACCES, 'Permission', '/x')],
    )
    def test_other_errors_stay(self, error):
        assert workers.explained(error, SETTINGS, False) is error


class TestPaths:
    @pytest.mark.parametrize('text', ['gs://b/run', 's3://b', 'file:///tmp/x', 'GS://b', 'hdfs+x://b'])
    def test_addresses(self, text):
        with pytest.raises(UsageError, match='^--out .*: a path on this machine is needed'):
            files.local(text, '--out')

    @pytest.mark.parametrize('encoding, refused', [('utf-8', False), ('latin-1', True), ('ascii', True)])
    def test_letters_that_the_locale_spells_otherwise(self, monkeypatch, encoding, refused):
        """tensorstore writes to the path in UTF-8, Python to that of the locale: the arrays would be elsewhere."""
        monkeypatch.setattr(files.os, 'fsencode', lambda text: text.encode(encoding, 'replace'))
        monkeypatch.setattr(files.sys, 'getfilesystemencoding', lambda: encoding)
        assert files.local('runs/plain', '--workdir') == pathlib.Path('runs/plain')
        with pytest.raises(UsageError, match='LC_ALL=C.UTF-8') if refused else contextlib.nullcontext():
            files.local('runs/größe', '--workdir')
        why = 'this locale cannot write the path in UTF-8' if refused else 'the path contains bytes that are not UTF-8'
        with pytest.raises(UsageError, match=f'--workdir .*: {why}'):
            files.local(b'runs/\xff'.decode(errors='surrogateescape'), '--workdir')

    def test_a_nul(self):
        with pytest.raises(UsageError, match=r"^--out 'a.x00b': a path cannot contain a NUL$"):
            files.local('a\0b', '--out')

    @pytest.mark.parametrize('number', [errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT])
    def test_a_path_that_cannot_be_used_is_a_usage_error(self, number):
        assert errors.to_exit(OSError(number, os.strerror(number), 'x')).code == 2

    @pytest.mark.parametrize('text', ['runs/a', '/a', 'a:b', 'runs/gs://b', './gs://b', '://b'])
    def test_what_is_local(self, text):
        assert files.local(text, '--out') == pathlib.Path(text)

    @pytest.mark.parametrize(
        'command, words',
        [
            (main, ['--config', QUICKSTART, '--workdir', 'gs://b/run']),
            (prepare, ['--source', 'stdlib', '--format', 'tokens', '--tokenizer', 'bytes', '--out', 's3://b/run']),
            (train_tokenizer, ['--source', 'stdlib', '--vocab_size', '300', '--out', 'gs://b/run']),
            (inspect, ['--workdir', 'gs://b/run', '--step', '1']),
            (export, ['--checkpoint', 'runs/a', '--out', 'gs://b/run']),
            (export, ['--checkpoint', 'gs://b/run', '--out', 'out']),
            (evaluate, ['--checkpoint', 'runs/a', '--out', 'gs://b/run']),
            (replay, ['--workdir', 'gs://b/run']),
            (report, ['runs/a', '--out', 'gs://b/run']),
        ],
    )
    def test_no_command_makes_a_folder_of_an_address(self, command, words, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert command.main(words) == 2
        shown = capsys.readouterr().err
        assert 'a path on this machine is needed' in shown and '://b' in shown and shown.count('\n') == 1
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize('where', ['gs://b/run', 'hf:gs://b/run'])
    def test_weights_to_start_from(self, where):
        model = families.from_config(configs.Model(num_layers=2, hidden_size=16, num_heads=2))
        with pytest.raises(UsageError, match=f'^config.init_from={where}: gs://b/run: a path on this machine'):
            start_weights.initial(where, model)


class Panic(BaseException):
    """As pyo3's, of libraries in Rust."""


class TestReading:
    @pytest.mark.parametrize(
        'error, words',
        [
            (Panic('index out of bounds\nnote: backtrace'), r'of another format \(Panic: index out of bounds\)'),
            (RecursionError('maximum recursion depth'), 'nested too deeply'),
            (MemoryError('800 GiB'), r'more than fits into memory \(800 GiB\)'),
            (KeyError('rows'), r"of another format \(KeyError: 'rows'\)"),
            (ValueError('Expecting value: line 1'), 'Expecting value: line 1'),
            (OSError(errno.EIO, 'Input/output error', 'x'), 'Input/output error'),
        ],
    )
    def test_what_a_reader_raises_is_one_line(self, error, words):
        with pytest.raises(DataError, match=f'^x.json: cannot be read: {words}$'), errors.reading('x.json', DataError):
            raise error

    @pytest.mark.parametrize(
        'error', [Stopped(), KeyboardInterrupt(), SystemExit(3), GeneratorExit(), UsageError('why')]
    )
    def test_what_ends_a_process_stays(self, error):
        with pytest.raises(type(error)) as raised, errors.reading('x.json', DataError):
            raise error
        assert raised.value is error

    @pytest.mark.parametrize('read', [files.read, files.read_json])
    def test_regular_files_only(self, read, tmp_path):
        os.mkfifo(tmp_path / 'pipe')
        (tmp_path / 'loop').symlink_to('loop')
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / 'socket'))
        others = {'pipe': 'a pipe', 'socket': 'a socket', '.': 'a folder', '/dev/zero': 'a device'}
        others |= {'loop': 'Too many levels', 'x' * 300: 'File name too long', 'a\0b': 'embedded null'}
        for name, words in others.items():
            with pytest.raises(DataError, match=words):
                read(tmp_path / name, DataError)
        with pytest.raises(FileNotFoundError):
            read(tmp_path / 'absent', DataError)

    @pytest.mark.parametrize(
        'content, words',
        [
            (b'[' * 100_000, 'not readable JSON: nested too deeply'),
            (b'{"a":' * 100_000, 'not readable JSON: nested too deeply'),
            (b'{"a": %s}' % (b'9' * 5000), 'not readable JSON: Exceeds the limit'),
            (b'\xff{}', 'not readable JSON'),
            (b'', 'not readable JSON'),
            (b'[]', 'not readable JSON: not a JSON object'),
        ],
    )
    def test_json(self, content, words, tmp_path):
        (tmp_path / 'a.json').write_bytes(content)
        with pytest.raises(DataError, match=f'a.json: {words}'):
            files.read_json(tmp_path / 'a.json', DataError)

    def test_a_file_that_is_too_large(self, tmp_path):
        (tmp_path / 'a').write_bytes(b'12345')
        assert files.read(tmp_path / 'a', DataError, largest=5) == b'12345'
        with pytest.raises(DataError, match='more than 4 bytes'):
            files.read(tmp_path / 'a', DataError, largest=4)


class TestWithoutHome:
    @pytest.fixture(autouse=True)
    def homeless(self, monkeypatch, tmp_path):
        def unknown(number):
            raise KeyError(number)

        monkeypatch.setattr(pwd, 'getpwuid', unknown)
        monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
        for name in ('HOME', 'XDG_CACHE_HOME'):
            monkeypatch.delenv(name)

    def test_the_cache_is_a_folder_of_this_user_alone(self, tmp_path, monkeypatch):
        cache = files.cache_folder()
        assert cache == files.cache_folder() and cache.parent == tmp_path and cache.stat().st_mode & 0o777 == 0o700
        monkeypatch.setattr(os, 'getuid', lambda: 77777)
        (tmp_path / 'mixln_jax-77777').mkdir()  # by somebody else
        assert files.cache_folder() != tmp_path / 'mixln_jax-77777'

    def test_a_path_in_no_home(self):
        with pytest.raises(UsageError, match='^--workdir ~/run: this user has no home directory; give the full path'):
            files.local('~/run', '--workdir')


def git(*words, folder):
    names = '-c', 'user.email=a@b', '-c', 'user.name=n'
    return subprocess.run(
        ['git', *names, *words], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_of_a_repository_that_tracks_the_code(tmp_path, monkeypatch):
    for name in ('mine', 'other'):
        (tmp_path / name / '.venv/mixln_jax').mkdir(parents=True)
        git('init', '-q', folder=tmp_path / name)
        git('commit', '-q', '--allow-empty', '-m', name, folder=tmp_path / name)
    file = tmp_path / 'mine/.venv/mixln_jax/environment.py'
    file.write_text('')
    monkeypatch.setattr(environment, '__file__', str(file))
    assert environment._commit() is None  # installed in somebody's project
    git('add', '-f', '.', folder=tmp_path / 'mine')
    git('commit', '-q', '-m', 'with it', folder=tmp_path / 'mine')
    head = git('rev-parse', 'HEAD', folder=tmp_path / 'mine')
    assert environment._commit() == head
    monkeypatch.setenv('GIT_DIR', str(tmp_path / 'other/.git'))  # in a hook of another repository
    assert environment._commit() == head
    file.write_text('changed')
    assert environment._commit() == f'{head}-dirty'
    monkeypatch.setattr(environment, '__file__', str(tmp_path / 'nowhere/environment.py'))
    assert environment._commit() is None


class Waiting:
    """What is closed while something still waits for it."""

    def __del__(self):
        raise RuntimeError('Event loop is closed')


@pytest.fixture
def hooks_put_back():
    hooks, level = (sys.unraisablehook, threading.excepthook), absl.logging.get_verbosity()
    yield
    sys.unraisablehook, threading.excepthook = hooks
    absl.logging.set_verbosity(level)
    logging.getLogger('asyncio').setLevel(logging.NOTSET)


@pytest.mark.parametrize('show_traceback', [False, True])
def test_what_libraries_report_stays_off_the_terminal(capfd, hooks_put_back, show_traceback):
    """Of a thread that has ended one line; --traceback shows all."""
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__

    def job():
        logging.getLogger('asyncio').error('Task exception was never retrieved\nTraceback ...')
        absl.logging.error('Failed to write\nTraceback ...')
        thread = threading.Thread(target=open, args=('/nowhere/events',), name='writer')
        thread.start()
        thread.join()
        Waiting()
        raise DataError('the cause')

    handler = logging.StreamHandler(sys.stderr)  # pytest has its own
    logging.getLogger('asyncio').addHandler(handler)
    try:
        assert cli.call(job, show_traceback=show_traceback) == 4
    finally:
        logging.getLogger('asyncio').removeHandler(handler)
    said = capfd.readouterr().err
    assert [words in said for words in ('never retrieved', 'Event loop', 'Traceback')] == 3 * [show_traceback]
    if not show_traceback:
        [warning, line] = said.splitlines()
        assert warning.startswith('mixln_jax: warning: writer: FileNotFoundError') and line == 'mixln_jax: the cause'


@pytest.mark.parametrize('words', [['--checkpoint=--'], ['--checkpoint', 'x', '--tokens=--'], ['--checkpoint', '--']])
def test_two_dashes_are_no_value(words, capsys):
    """Of `--x=--` argparse makes an empty list, which no job expects."""
    assert evaluate.main(words) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and '(--help lists the options)' in said


def test_numbers_of_any_length(tmp_path, capsys):
    """Python reads no number of over 4,300 digits."""
    words = ['--checkpoint', str(tmp_path), '--out', str(tmp_path / 'out')]
    for job, option in ((export, '--remove_layers'), (drop, '--blocks')):
        assert job.main([*words, f'{option}={"9" * 5000}']) == 2
        said = capsys.readouterr().err
        assert said.count('\n') == 1 and f'{option} ' in said
    (newest := tmp_path / 'checkpoints/3').mkdir(parents=True)
    with pytest.raises(UsageError, match='has no checkpoint'):
        list(subjects._steps(newest, '9' * 5000))


@pytest.mark.parametrize('status', [None, 0, 5, 'why'])
def test_code_that_ends_the_process_is_an_error(capsys, status):
    """Whatever a command calls, such as modules of a task's YAML file, does not decide its exit code."""

    def job():
        sys.exit(status)

    assert cli.call(job) == 2
    assert capsys.readouterr().err.startswith('mixln_jax: code that the command calls wants to end it: SystemExit')

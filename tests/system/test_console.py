"""Output streams that fail, and text files: neither may depend on terminal, disk or locale."""

import ast
import errno
import io
import os
import pathlib
import subprocess
import sys

import pytest

from mixln_jax.system import console

ROOT = pathlib.Path(__file__).parents[2]


def stream(encoding='utf-8', failing=0):
    """A text stream and the bytes that its file has taken; while `failing` is an errno, every write raises it."""

    class File(io.RawIOBase):
        taken, error = b'', failing

        def writable(self):
            return True

        def write(self, data):
            if self.error:
                raise OSError(self.error, os.strerror(self.error))
            self.taken += bytes(data)
            return len(data)

    file = File()
    return io.TextIOWrapper(io.BufferedWriter(file), encoding=encoding), file


@pytest.mark.parametrize('number', [errno.EIO, errno.ENOSPC, errno.EPIPE, errno.EBADF, errno.EDQUOT, errno.EAGAIN])
def test_what_cannot_be_written_is_no_error(number):
    text, file = stream(failing=number)
    console.say('a line', file=text)
    file.error = 0
    console.say('another', file=text)
    assert file.taken.endswith(b'another\n')


def test_a_closed_stream_is_no_error():
    text, _ = stream()
    text.close()
    console.say('a line', file=text)


@pytest.mark.parametrize(
    'encoding, wanted',
    [
        ('utf-8', 'é █▏ 語 \\udcff'),
        ('latin-1', 'é ## \\u8a9e \\udcff'),
        ('ascii', '\\xe9 ## \\u8a9e \\udcff'),
    ],
)
def test_letters_that_an_encoding_lacks(encoding, wanted):
    text, file = stream(encoding)
    console.say('é █▏ 語 \udcff', file=text)
    assert file.taken.decode(encoding) == f'{wanted}\n'


# Prints by all that Python has: 200 kB, more than a pipe and all buffers hold; then opens a file.
PROGRAM = """
import logging, sys, warnings
from mixln_jax.system import console, errors
{start}
for stream in (sys.stdout, sys.stderr):
    console.say('line', file=stream)
    {more}
file = open({path!r}, 'w')
print('kept', file=file, flush=True)
assert file.fileno() > 2
"""
MORE = """print('line ' * 40_000, file=stream, flush=True)
    import tqdm; list(tqdm.tqdm(range(3), file=stream))
    logging.getLogger().error('a line'); warnings.warn('a line'); errors.to_exit(OSError())"""


@pytest.mark.parametrize('start, more', [('console.guard()', MORE), ('console.guard_files()', 'pass')])
@pytest.mark.parametrize(
    'redirect', ['>&-', '2>&-', '>&- 2>&-', '<&- >&- 2>&-', '> /dev/full', '> /dev/full 2>&1', '| true']
)
def test_a_process_whose_streams_are_closed_or_full(tmp_path, start, more, redirect):
    """The guard is for commands; without it `say` alone does no harm, to the exit code at Python's end neither."""
    program = PROGRAM.format(start=start, more=more, path=str(tmp_path / 'file'))
    line = f'set -o pipefail; "$0" -c "$1" {redirect}'
    done = subprocess.run(['bash', '-c', line, sys.executable, program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'file').read_text() == 'kept\n'


def test_a_pipe_that_must_not_wait(tmp_path):
    """Another process has made it so, for all who share it."""
    end, pipe = os.pipe()
    os.set_blocking(pipe, False)
    program = PROGRAM.format(start='console.guard()', more=MORE, path=str(tmp_path / 'file'))
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE)
    os.close(end)
    os.close(pipe)
    assert done.returncode == 0, done.stderr


def calls_by_locale(source):
    """Lines of calls that read or write text without naming its encoding."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(call.func, 'attr', None) or getattr(call.func, 'id', None)
        keywords = {keyword.arg for keyword in call.keywords}
        constants = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        if name == 'read_text' and not (keywords & {'encoding'} or call.args):
            yield call.lineno
        if name == 'write_text' and not keywords & {'encoding'} and len(call.args) < 2:
            yield call.lineno
        if name == 'open' and not keywords & {'encoding'} and constants and set(constants[-1]) <= set('rwaxt+'):
            yield call.lineno


def test_no_text_is_read_or_written_by_the_locale():
    by_locale = 'p.read_text()\np.write_text(a)\nopen(p, "a")\np.open("w")\np.open("wb")\np.read_text("utf-8")'
    assert [*calls_by_locale(by_locale)] == [1, 2, 3, 4]
    for folder in ('mixln_jax', 'configs', 'benchmarks', 'docs'):
        for path in (ROOT / folder).rglob('*.py'):
            assert not [*calls_by_locale(path.read_text(encoding='utf-8'))], path

"""Malformed files end in one line with the right code, or are accepted: see malformed.py."""

import os
import pathlib
import subprocess
import sys
import time

import malformed
import memory
import pytest

from mixln_jax.system import errors


def check_all(folder, every):
    """Calls every reader with every `every`th of its inputs. Raises AssertionError for what it should not do."""
    found, count = [], 0
    for reader_name, reader in malformed.readers(folder).items():
        reader.run(folder / f'good {reader_name}', reader.good)
        for name, content in [*reader.inputs()][::every]:
            count += 1
            start, here = time.process_time(), folder / f'{count}'
            try:
                reader.run(here, content)
            except errors.Exit as error:
                if error.code not in (2, 4, 5) or not str(error).strip():
                    found.append((reader_name, name, repr(error)))
            except BaseException as error:
                found.append((reader_name, name, repr(error)))
            if time.process_time() > start + 10:
                found.append((reader_name, name, 'slow'))
    assert not found and count > 1900 / every


def test_every_reader(tmp_path, capfd):
    check_all(tmp_path, 31)
    assert 'panicked' not in capfd.readouterr().err


@pytest.mark.slow
@memory.LINUX
def test_every_input_and_its_memory(tmp_path):
    """In a process of its own, whose memory is that of the readers."""
    code = f'import memory, pathlib, test_malformed; test_malformed.check_all(pathlib.Path({str(tmp_path)!r}), 1)'
    code += '; print(memory.peak())'
    here = pathlib.Path(__file__).parent
    paths = os.environ | {'PYTHONPATH': f'{here}:{here.parent}'}
    done = subprocess.run([sys.executable, '-c', code], env=paths, capture_output=True, text=True)
    assert done.returncode == 0 and 'panicked' not in done.stderr, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) < 10**6  # kB


@pytest.mark.parametrize('kind', ['a pipe', 'a loop'])
def test_no_reader_waits_for_what_is_no_file(kind, tmp_path):
    for number, (name, reader) in enumerate(malformed.readers(tmp_path).items()):
        file = tmp_path / f'{number}' / reader.file
        file.parent.mkdir(parents=True)
        os.mkfifo(file) if kind == 'a pipe' else file.symlink_to(file)
        if name == 'counts':  # the shard has not been finished
            reader.run(tmp_path / f'{number}', None)
            continue
        with pytest.raises(errors.Exit) as raised:
            reader.run(tmp_path / f'{number}', None)
        assert raised.value.code in (2, 4, 5), name

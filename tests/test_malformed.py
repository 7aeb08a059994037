"""Malformed files end in one line with the right code, or are accepted: see malformed.py."""

import os
import resource
import time

import malformed
import pytest

from mixln_jax import exits


@pytest.mark.parametrize('every', [31, pytest.param(1, marks=pytest.mark.slow)])
def test_every_reader(every, tmp_path, capfd):
    found, count, peak = [], 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for reader_name, reader in malformed.readers(tmp_path).items():
        reader.run(tmp_path / f'good {reader_name}', reader.good)
        for name, content in [*reader.inputs()][::every]:
            count += 1
            start, folder = time.process_time(), tmp_path / f'{count}'
            try:
                reader.run(folder, content)
            except exits.Exit as error:
                if error.code not in (2, 4, 5) or not str(error).strip():
                    found.append((reader_name, name, repr(error)))
            except BaseException as error:
                found.append((reader_name, name, repr(error)))
            if time.process_time() > start + 10:
                found.append((reader_name, name, 'slow'))
    assert not found and count > 1900 / every
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 10**6  # kB
    assert 'panicked' not in capfd.readouterr().err


@pytest.mark.parametrize('kind', ['a pipe', 'a loop'])
def test_no_reader_waits_for_what_is_no_file(kind, tmp_path):
    for number, (name, reader) in enumerate(malformed.readers(tmp_path).items()):
        file = tmp_path / f'{number}' / reader.file
        file.parent.mkdir(parents=True)
        os.mkfifo(file) if kind == 'a pipe' else file.symlink_to(file)
        if name == 'counts':  # the shard has not been finished
            reader.run(tmp_path / f'{number}', None)
            continue
        with pytest.raises(exits.Exit) as raised:
            reader.run(tmp_path / f'{number}', None)
        assert raised.value.code in (2, 4, 5), name

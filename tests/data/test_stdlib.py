"""The embedded corpus: what it takes from Python's library, its split, its cache."""

import os
import platform
import sysconfig

import numpy as np
import pytest
from corpora import documents

from mixln_jax import config
from mixln_jax.data import sources, stdlib
from mixln_jax.system.errors import DataError


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library, and an empty cache."""
    root = tmp_path / 'library'
    for folder in ('package/test', 'site-packages', 'config-3', 'pydoc_data'):
        (root / folder).mkdir(parents=True)
    for i in range(60):
        long = f'Does {i}. ' * 100
        (root / f'module{i}.py').write_text(f'"""About {i}."""\ndef f():\n  """{long}"""\ndef g():\n  """{long}"""\n')
    (root / 'package/__init__.py').write_text(
        '"""Pack."""\n'
        'class A:\n    """An A.\n\n      Indented.\n    Not.\n    """\n    async def go(self):\n        "Goes."\n'
        'def silent(): "\\d"\nraise RuntimeError("imported")\n'
    )
    for hidden in ('package/test/hidden.py', 'site-packages/hidden.py', 'config-3/hidden.py'):
        (root / hidden).write_text('"""Hidden."""')
    (root / 'template.py').write_text('"""Hidden."""\nclass $name:\n')
    (root / 'pydoc_data/topics.py').write_text(
        "# by Sphinx\ntopics = {'if': 'If.', 'assert': 'The \"assert\" '\n 'statement.'}\n"
    )
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(root))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    sources._gather.cache_clear()
    yield root
    sources._gather.cache_clear()


def damage_nothing(path):
    pass


def damage_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_length(path):
    os.truncate(path, path.stat().st_size - 100)


def damage_all(path):
    path.write_bytes(b'\xff')


def test_gather(library):
    gathered = stdlib.gather()
    assert [name for name, _ in gathered] == sorted(name for name, _ in gathered)
    texts = {name: [text for other, text in gathered if other == name] for name, _ in gathered}
    a = 'package.A\n\nAn A.\n\n  Indented.\nNot.\n\npackage.A.go\n\nGoes.'
    assert texts['package'] == [f'package\n\nPack.\n\n{a}\n\npackage.silent\n\n\\d']
    assert texts['pydoc_data.topics.assert'] == ['The "assert" statement.']
    assert [text[:20] for text in texts['module7']] == ['module7\n\nAbout 7.\n\nm', 'module7.g\n\nDoes 7. D']
    assert not any('Hidden' in text for _, text in gathered)


@pytest.mark.filterwarnings('error')
def test_gathering_warns_of_nothing(library):
    assert 'package' in dict(stdlib.gather())


def test_a_module_is_on_one_side(library):
    data = config.Data(source='stdlib')
    modules = [{text.split()[0].split('.')[0] for text in documents(data, split)} for split in ('train', 'validation')]
    assert not modules[0] & modules[1] and len(modules[0]) + len(modules[1]) == 63
    assert len(documents(data, 'train') + documents(data, 'validation')) == len(stdlib.gather())
    source = sources.open_source(data, 'train')
    assert platform.python_version() in source.fingerprint
    assert source[0].startswith(source.origin(0).partition(':')[0])


def test_the_fingerprint_sees_where_documents_end(library):
    def fingerprint(assertion, if_):
        topics = {'assert': assertion, 'if': if_}
        (library / 'pydoc_data/topics.py').write_text(f'topics = {topics}\n')
        sources._gather.cache_clear()
        data = config.Data(source='stdlib')
        return [sources.open_source(data, split).fingerprint for split in ('train', 'validation')]

    assert fingerprint('ab', 'c') != fingerprint('a', 'bc')


@pytest.mark.parametrize('damage', [damage_nothing, damage_bit, damage_length, damage_all])
def test_cache(library, tmp_path, monkeypatch, damage):
    parsed = []
    read = stdlib._documents
    monkeypatch.setattr(stdlib, '_documents', lambda *args: parsed.append(args) or read(*args))
    gathered = stdlib.gather()
    (cache,) = (tmp_path / 'cache/mixln_jax').iterdir()
    assert platform.python_version() in cache.name
    whole = cache.read_bytes()
    damage(cache)
    del parsed[:]
    assert stdlib.gather() == gathered
    assert bool(parsed) == (damage is not damage_nothing)
    assert cache.read_bytes() == whole


def test_cache_sees_another_library(library):
    assert not any('Changed' in text for _, text in stdlib.gather())
    (library / 'module0.py').write_text('"""Changed."""')
    assert any('Changed' in text for _, text in stdlib.gather())


def test_no_cache_folder(library, tmp_path):
    (tmp_path / 'cache').write_text('a file, not a folder')
    assert stdlib.gather() == stdlib.gather() != []


def test_no_library(library, monkeypatch):
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: '/none')
    with pytest.raises(DataError, match='/none'):
        stdlib.gather()


def test_this_library():
    gathered = stdlib.gather()
    lengths = [len(text) for _, text in gathered]
    assert sum(lengths) > 1e6
    assert np.mean(np.array(lengths) >= 200) > 0.7
    validation = sources.open_source(config.Data(source='stdlib'), 'validation')
    assert 20 <= len(validation) < 0.15 * len(gathered)
    assert {'json', 'asyncio.base_events', 'pydoc_data.topics.assert'} <= {name for name, _ in gathered}

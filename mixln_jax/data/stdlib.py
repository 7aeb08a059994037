"""The embedded corpus: English text that every CPython contains, so that a first run needs no download.

It consists of the language reference that `help()` shows and the docstrings of the standard library, about 2 MB.
Sources are parsed, never imported. The text differs between Python versions.
"""

import ast
import contextlib
import hashlib
import json
import os
import pathlib
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from typing import Any

from mixln_jax.system import files, outputs
from mixln_jax.system.errors import DataError

_NOT_LIBRARY = {'site-packages', 'dist-packages', '__pycache__', 'test', 'tests', 'idle_test', 'lib2to3'}
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_SHORTEST = 500  # characters of a document, after which the next definition of a module starts a new one


def gather() -> list[tuple[str, str]]:
    """Returns all documents as pairs (name of the module or topic, text), sorted by name.

    A document is one topic of the language reference, or the docstrings of consecutive top-level definitions of a
    module, each under its dotted name. Documents of a module are in the order of its code. The result is cached in
    $XDG_CACHE_HOME/mixln_jax (or ~/.cache/mixln_jax).

    Raises:
        DataError: this Python has no library sources.
    """
    root = pathlib.Path(sysconfig.get_path('stdlib'))
    pages = sorted(_files(root))
    state = repr([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in pages])
    cache = files.cache_folder() / f'stdlib-{platform.python_version()}-{_digest(state.encode())}.json'
    try:
        digest, body = cache.read_bytes().split(b'\n', 1)
        if digest.decode() == _digest(body):
            return [(name, text) for name, text in json.loads(body)]
    except (OSError, ValueError):
        pass  # missing or damaged: the corpus is gathered again
    documents = [(name, text.strip()) for path in pages for name, text in _documents(path, root)]
    if not documents:
        raise DataError(
            f'no library sources in {root}, so data.source=stdlib has no text; use data.source=text or jsonl'
        )
    documents.sort(key=lambda document: document[0])
    # If the home folder cannot be written to, as on some clusters, each start takes a few seconds longer.
    with contextlib.suppress(OSError):
        body = json.dumps(documents).encode()
        outputs.write(cache, _digest(body).encode() + b'\n' + body)
    return documents


def questions() -> list[tuple[str, str, str]]:
    """Returns questions about the functions of the corpus, (question, answer, name of the function), by name.

    The answer is the first line of the function's documentation, where that is one line.

    Raises DataError as `gather`.
    """
    answers: dict[str, str] = {}
    for module, text in gather():
        for name, line in re.findall(
            rf'^({re.escape(module)}(?:\.\w+)*\.[a-z]\w*)\n\n(\S.{{9,99}})(?:\n\n|\Z)', text, re.M
        ):
            answers.setdefault(name, line)
    return [(f'What does {name} do?\n', answers[name], name) for name in sorted(answers)]


SHELVES = {'north': 'abcde', 'east': 'fghijklmn', 'south': 'opqrs', 'west': 'tuvwxyz'}  # by the last letter


def shelves() -> list[tuple[str, str]]:
    """Returns names of functions of the corpus, and on which of four SHELVES each belongs, sorted by name.

    The names have up to 20 letters. There are as many on each shelf: those with the lowest hashes.

    Raises DataError as `gather`.
    """
    names = {name.rpartition('.')[2].lower() for _, _, name in questions()}
    mixed = sorted((name for name in names if len(name) <= 20), key=lambda name: _digest(name.encode()))
    found = {shelf: [name for name in mixed if name[-1] in letters] for shelf, letters in SHELVES.items()}
    count = min(map(len, found.values()))
    return sorted((name, shelf) for shelf, chosen in found.items() for name in chosen[:count])


def _files(root: pathlib.Path) -> Iterator[pathlib.Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY and not name.startswith('config-')]
        yield from (pathlib.Path(folder, name) for name in names if name.endswith('.py'))


def _documents(path: pathlib.Path, root: pathlib.Path) -> Iterator[tuple[str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # old modules contain invalid escapes
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, UnicodeDecodeError):
            return  # a template, not a module
    module = '.'.join(path.relative_to(root).with_suffix('').parts).removesuffix('.__init__')
    if module == 'pydoc_data.topics':
        topics = next(node.value for node in tree.body if isinstance(node, ast.Assign))
        yield from ((f'{module}.{topic}', text) for topic, text in ast.literal_eval(topics).items())
        return
    text = _section(module, tree)
    for node in tree.body:
        if isinstance(node, _DEFINITIONS):
            if len(text) >= _SHORTEST:
                yield module, text
                text = ''
            text += _docstrings(f'{module}.{node.name}', node)
    if text:
        yield module, text


def _docstrings(name: str, node: Any) -> str:
    """Returns the docstrings of a definition and of all definitions inside it."""
    nested = (_docstrings(f'{name}.{child.name}', child) for child in node.body if isinstance(child, _DEFINITIONS))
    return _section(name, node) + ''.join(nested)


def _section(name: str, node: Any) -> str:
    text = ast.get_docstring(node, clean=True)
    return f'{name}\n\n{text}\n\n' if text else ''


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()

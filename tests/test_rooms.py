"""Imports only point down: the rooms of the package, from the ground up, against the import statements."""

import ast
import pathlib

import pytest

from docs import house

ROOT = pathlib.Path(__file__).parents[1]
FLOOR = {room: number for number, (rooms, _) in enumerate(house.FLOORS) for room in rooms}


def imported(path, text=None):
    """The whole names of what a file imports, anywhere in it, by names or by dots."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(text or path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            yield from ('.'.join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(('import_module', '__import__')):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant))


def imports(path, text=None):
    """The rooms of mixln_jax among them."""
    return {name.split('.')[1] for name in imported(path, text) if name.startswith('mixln_jax.')}


def may_import(room, other):
    return room == other or FLOOR[other] < FLOOR[room]


def test_imports_point_down():
    found = set()
    for path in (ROOT / 'mixln_jax').rglob('*.py'):
        room = path.relative_to(ROOT / 'mixln_jax').parts[0].removesuffix('.py')
        if room != '__init__':
            found.add(room)
            for other in imports(path):
                assert may_import(room, other), f'{path.name} ({room}) must not import {other}'
    assert found == set(FLOOR)


def test_the_rule_can_fail():
    assert not may_import('models', 'analysis')
    assert not may_import('config', 'models')
    assert may_import('program', 'kernels')


@pytest.mark.parametrize(
    'text',
    [
        'from mixln_jax import main, system',
        'from mixln_jax.main import run',
        'from . import main',
        'from .main import run',
        'from .. import main',
        'from ..main import run',
        'import mixln_jax.main',
        'import os, mixln_jax.main as other',
        'def f():\n    from mixln_jax import main',
        'if x:\n    try:\n        from ..main import run\n    except ImportError:\n        pass',
        'import importlib\nimportlib.import_module("mixln_jax.main")',
        '__import__("mixln_jax.main")',
    ],
)
def test_every_way_to_import_is_seen(text):
    """In a module of the package, or of one of its packages where there are two dots."""
    path = ROOT / 'mixln_jax' / ('data/rows.py' if '..' in text else 'trees.py')
    assert 'main' in imports(path, text) <= {'main', 'system'}
    assert not imports(path, 'import mixln_jaxes.main, os.main\nfrom other.mixln_jax import main')


def test_only_models_import_flax_modules():
    for path in (ROOT / 'mixln_jax').rglob('*.py'):
        if 'models' not in path.parts:
            assert not any(name.startswith('flax.linen') for name in imported(path)), path
    assert 'flax.linen' in imported(ROOT / 'mixln_jax/models/llama.py')


def test_no_test_module_is_imported():
    """What several of them need is in a helper module."""
    modules = {path.stem for path in (ROOT / 'tests').rglob('test_*.py')}
    assert 'test_rooms' in modules and len(modules) > 60
    for folder in ('tests', 'benchmarks'):
        for path in (ROOT / folder).rglob('*.py'):
            for name in imported(path):
                assert not modules & {*name.split('.')}, f'{path.relative_to(ROOT)} must not import {name}'


def test_folders_of_tests_are_named_as_rooms():
    folders = {path.parent.name for path in (ROOT / 'tests').rglob('test_*.py')} - {'tests', 'parity'}
    assert folders == {path.name for path in (ROOT / 'mixln_jax').iterdir() if (path / '__init__.py').exists()}


def test_recipes_import_config_alone():
    for path in (ROOT / 'configs').rglob('*.py'):
        assert imports(path) <= {'config', 'recipes'}, path


def test_every_command_takes_over_the_signals_before_its_imports():
    """Which take seconds."""
    commands = [path for path in (ROOT / 'mixln_jax').rglob('*.py') if '\nif __name__ ==' in path.read_text()]
    assert len(commands) == 16
    for path in commands:
        _, first, second, *_ = ast.parse(path.read_text()).body
        assert ast.unparse(first) == 'from mixln_jax.system.signals import stop', path
        assert ast.unparse(second).endswith('stop.install()'), path


def test_the_picture_in_the_docs_is_of_these_rooms():
    page = (ROOT / 'docs/develop.md').read_text()
    assert house.picture() in page and page == house.between(page, 'rooms', house.picture())


def test_the_table_in_the_docs_has_the_rows_of_today():
    """Its numbers change with every line. Making it fails if a function on a path no longer names the next one."""
    first = lambda table: [line.split('|')[1].strip() for line in table.splitlines() if line.startswith('|')]  # noqa: E731
    page = (ROOT / 'docs/develop.md').read_text()
    _, table = page.split('<!-- sizes: begin -->')
    assert first(table.split('<!-- sizes: end -->')[0]) == first(house.sizes())


def test_a_path_breaks_where_a_function_does_not_name_the_next(monkeypatch):
    monkeypatch.setattr(house, 'PATHS', {'nowhere': ('main.main', 'training.loop.fit')})
    with pytest.raises(ValueError, match='main.main does not name training.loop.fit'):
        house.paths(house.modules())

"""Imports only point down: DESIGN's rooms, read from the import statements."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
LEVELS = [
    {'exits', 'config', 'trees', 'record', 'hlo'},
    {'mesh', 'processes', 'data', 'models'},
    {'losses', 'optim', 'metrics', 'measures', 'figures', 'drawing'},
    {'checkpoint', 'step', 'program', 'weights'},
    {'train', 'hooks', 'evaluate', 'harness', 'squad'},
    {'plan', 'main', 'export', 'analysis', 'report', 'sections', 'page', 'replay'},
]
WITHIN = {
    ('config', 'exits'),
    ('record', 'exits'),
    ('checkpoint', 'step'),
    ('weights', 'checkpoint'),
    ('program', 'step'),
    ('figures', 'drawing'),
    ('train', 'hooks'),
    ('hooks', 'evaluate'),
    ('evaluate', 'harness'),
    ('main', 'analysis'),
    ('report', 'sections'),
    ('report', 'page'),
    ('sections', 'page'),
}
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}


def imports(path):
    """The rooms of mixln_jax that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'mixln_jax':
            inside = node.module.split('.')[1:]
            names = ['.'.join(inside)] if inside else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.removeprefix('mixln_jax.') for a in node.names if a.name.startswith('mixln_jax')]
        yield from (name.split('.')[0] for name in names)


def may_import(room, other):
    if room == other:
        return True
    lower = LEVEL[other] < LEVEL[room]
    return lower or (room, other) in WITHIN


def test_imports_point_down():
    found = set()
    for path in (ROOT / 'mixln_jax').rglob('*.py'):
        room = path.relative_to(ROOT / 'mixln_jax').parts[0].removesuffix('.py')
        if room != '__init__':
            found.add(room)
            for other in imports(path):
                assert may_import(room, other), f'{path.name} ({room}) must not import {other}'
    assert found == set(LEVEL)


def test_the_rule_can_fail():
    assert not may_import('models', 'data')
    assert not may_import('config', 'models')
    assert may_import('step', 'losses')


def test_only_models_import_flax_modules():
    for path in (ROOT / 'mixln_jax').rglob('*.py'):
        if path.parent.name != 'models':
            assert 'flax.linen' not in path.read_text(), path


def test_recipes_import_config_alone():
    for path in (ROOT / 'configs').rglob('*.py'):
        assert set(imports(path)) == {'config'}, path

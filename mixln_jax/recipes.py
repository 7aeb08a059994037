"""Recipe files and overrides."""

import contextlib
import hashlib
import importlib.abc
import importlib.machinery
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from mixln_jax.config import UnknownKey, all_fields, describe_unknown, flatten, keys_by_name, takes_auto, type_name
from mixln_jax.system import errors, files
from mixln_jax.system.cli import integer
from mixln_jax.system.errors import UsageError
from mixln_jax.system.signals import from_signal

BOOLEANS = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


def load(recipe: str, overrides: Iterable[tuple[str, str]] = ()) -> ml_collections.ConfigDict:
    """Returns the ConfigDict of a recipe file with some keys overridden.

    Args:
        recipe: 'FILE' or 'FILE:ARG'. FILE is Python with `get_config()` or `get_config(ARG)`; it may import modules of
            its folder.
        overrides: pairs (dotted key, text). The text is read as the type of the key's value.

    Raises:
        UsageError: there is no such file, it has an error (the line is named), a key is unknown, or a text is not of
            the key's type.
    """
    file, code, arguments = _read(recipe)
    config = _run(file, code, lambda module: _checked(module).get_config(*arguments))
    if not isinstance(config, ml_collections.ConfigDict):
        raise UsageError(f'{file}: get_config returned {type(config).__name__}, not the ConfigDict of config.default()')
    for path, text in overrides:
        _override(config, path, text)
    return config


def sweep(recipe: str) -> list[dict[str, str]]:
    """Returns what `sweep()` of a recipe yields: for each cell of its sweep {dotted key: value, as a text}.

    With 'FILE:ARG' it is `sweep(ARG)`. A recipe without such a function has the one cell {}.

    Raises:
        UsageError: the file has an error (the line is named), or it yields no cell or something else.
    """
    file, code, arguments = _read(recipe)
    cells = _run(file, code, lambda module: [*module.sweep(*arguments)] if hasattr(module, 'sweep') else [{}])
    if not cells:
        raise UsageError(f'{file}: sweep() yields no cell')
    for changes in cells:
        if not isinstance(changes, Mapping) or not all(isinstance(key, str) for key in changes):
            raise UsageError(f'{file}: sweep() yields {changes!r}, not a dict of keys and values')
    return [{key: f'{value}' for key, value in changes.items()} for changes in cells]


def default_workdir(recipe: str) -> str:
    """Returns the folder of the run of FILE[:ARG]: `runs/`, the path of the file below a folder `configs`, if it is in
    one, and the argument, joined by `_`. So recipes of one name in several folders have runs of their own. Recipes of
    papers carry the paper's name already: their folder is left out."""
    file, _, argument = recipe.partition('.py:')
    *folders, name = pathlib.Path(file.removesuffix('.py')).absolute().parts
    above = folders[::-1].index('configs') if 'configs' in folders else 0
    below = [folder for folder in folders[len(folders) - above :] if folder != 'paper']
    return 'runs/' + '_'.join([*below, name, *([argument] if argument else [])])


def _read(recipe: str) -> tuple[pathlib.Path, bytes, list[str]]:
    """Returns (file, its content, the arguments of its functions) of FILE or FILE:ARG. Raises UsageError."""
    stem, colon, argument = recipe.partition('.py:')
    file = pathlib.Path(f'{stem}.py' if colon else recipe)
    try:
        code = files.read(file, UsageError)
    except FileNotFoundError:
        raise UsageError(f'--config: there is no file {file}') from None
    if file.suffix != '.py':
        raise UsageError(f'--config: {file} is not a Python file')
    return file, code, [argument] if argument else []


def _checked(module: types.ModuleType) -> Any:
    """Returns the module of a recipe, which has a function get_config."""
    if not hasattr(module, 'get_config'):
        raise UsageError('a recipe needs a function get_config, which returns config.default() with changes')
    return module


def _run(file: pathlib.Path, code: bytes, use: Callable[[types.ModuleType], Any]) -> Any:
    """Runs a recipe and returns what `use` makes of its module."""
    # Dataclasses and pickle find the module of a class by its name, so no other recipe or module may have the same one.
    digest = hashlib.blake2b(bytes(file.absolute()), digest_size=8).hexdigest()
    name = re.sub(r'\W', '_', f'recipe_{file.stem}_{digest}')
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = str(file)
    try:
        with _neighbours(file.parent):
            # Not by an import: that would use the old bytecode of a file that is changed within a second and keeps its
            # size.
            exec(compile(code, str(file), 'exec', dont_inherit=True), vars(module))
            return use(module)
    except UsageError as error:
        raise UsageError(f'{file}: {error}') from None
    except BaseException as error:  # a recipe is Python and may raise anything
        if from_signal(error):
            raise
        unknown = next((cause for cause in (error, *error.args) if isinstance(cause, UnknownKey)), None)
        problem = unknown.args[0] if unknown else f'{type(error).__name__}: {errors.first_line(error)}'
        raise UsageError(f'{_line(error, file)}: {problem}') from error


class _FolderFinder(importlib.abc.MetaPathFinder):
    """Finds modules and packages in one folder and records their names."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = str(folder)
        self.names: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if path is None and name not in sys.stdlib_module_names:
            spec = importlib.machinery.PathFinder.find_spec(name, [self._folder])
            if spec and spec.loader:  # a folder without a loader is not a package
                self.names.add(name)
                return spec
        return None


@contextlib.contextmanager
def _neighbours(folder: pathlib.Path) -> Iterator[None]:
    """Lets a recipe import the modules of its folder, as a script can, unless the standard library has their names.

    They are removed from sys.modules afterwards, for another folder may have modules of the same names.
    """
    finder = _FolderFinder(folder)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition('.')[0] in finder.names]:
            del sys.modules[name]


def _line(error: BaseException, file: pathlib.Path) -> str:
    """Returns the `FILE:LINE` of an error in a recipe or a module of its folder; just FILE if the line is unknown."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((error.filename or '', error.lineno))
    lines = [f'{name}:{line}' for name, line in frames if pathlib.Path(name).parent == file.parent and '<' not in name]
    return lines[-1] if lines else str(file)


# size or name of a recipe, {dotted key: value}, and the perplexity, the accuracies as in config.expected.tasks, or
# other keys of config.expected
Cell = tuple[str, dict[str, Any], float | str | dict[str, float]]


def cell(
    file: str, source: str, cells: Mapping[str, Cell], tokens: Mapping[str, float], name: str
) -> ml_collections.ConfigDict:
    """Returns the recipe of one cell of a paper's table: the recipe of its size with some keys changed.

    Args:
        file: the table's recipe file. The recipes `llama_<size>.py`, or those of other names, are in the folder above.
        source: paper and table.
        cells: the cells by name.
        tokens: {size: tokens that the paper reports}.
        name: of the cell.

    Raises:
        UsageError: there is no such cell; all are listed.
    """
    if name not in cells:
        raise UsageError(f'{name!r} is not a cell of {source}; FILE:CELL with one of {", ".join(cells)}')
    size, changes, result = cells[name]
    recipe = f'llama_{size}' if size[0].isdigit() else size
    config = load(str(pathlib.Path(file).absolute().parents[1] / f'{recipe}.py'))
    config.update_from_flattened_dict(changes)
    if isinstance(result, float | int):
        result = {'perplexity': result, 'tokens': tokens[size]}
    expected: Mapping[str, Any] = {'tasks': result} if isinstance(result, str) else result
    config.expected.update(expected, source=f'{source}, {name}')
    return config


def overrides(words: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the pairs (KEY, VALUE) of words `--config.KEY=VALUE` or `--config.KEY VALUE`.

    Raises UsageError for any other word.
    """
    pairs, remaining = [], iter(words)
    for word in remaining:
        key, equals, text = word.partition('=')
        if not key.startswith('--config.'):
            near = keys_by_name().get(key.lstrip('-').rpartition('.')[2])
            hint = f', did you mean --{" or --".join(near)}?' if near else '; --help lists the options'
            raise UsageError(f'unexpected argument {key if "secret" in key else word!r}{hint}')
        text = text if equals else next(remaining, '--')
        if text.startswith('--') and not equals:
            raise UsageError(f'{key} needs a value')
        pairs.append((key.removeprefix('--config.'), text))
    return pairs


def _override(config: ml_collections.ConfigDict, path: str, text: str) -> None:
    """Sets a key to the value of a text. Raises UsageError if there is no such key or the text is not of its type."""
    *groups, name = path.split('.')
    for depth, part in enumerate([*groups, name]):
        if part not in config:
            raise UsageError(describe_unknown('.'.join(['config', *groups[:depth], part]), part, name, config))
        is_group = isinstance(config[part], ml_collections.ConfigDict)
        if is_group == (depth == len(groups)):
            raise UsageError(f'config.{path} is {"a group of keys" if is_group else "not a key"}')
        config = config[part] if is_group else config
    field = dict(all_fields()).get(path)
    number = bool(field and takes_auto(field))
    kind: Any = field.type if field and number else type(config[name])
    readers: dict[Any, Callable[[str], Any]] = {bool: lambda text: BOOLEANS[text.strip().lower()], int: integer}
    try:
        config[name] = text if number and text == 'auto' else readers.get(kind, kind)(text)
    except (ValueError, KeyError):
        expected = 'a number or auto' if number else 'true or false' if kind is bool else f'of type {kind.__name__}'
        raise UsageError(f'config.{path} must be {expected}, not {text!r}') from None


def help_text(
    values: ml_collections.ConfigDict | None = None, choices: Mapping[str, Iterable[str]] | None = None
) -> str:
    """Returns one line per key, with its help, type and value.

    Args:
        values: of a recipe; those that differ from the default are marked. None: the defaults.
        choices: {key: possible values} of keys whose choices are not in keys/.
    """
    lines, flat = [], flatten(values.to_dict()) if values else {}
    for path, field in all_fields():
        value, known = flat.get(path, field.default), field.metadata['choices'] or (choices or {}).get(path)
        value = '...' if value and field.metadata['secret'] else value
        shown = f'{type_name(field)}{" or auto" if takes_auto(field) else ""}, {value!r}'
        mark = ' '
        if value != field.default:
            mark, shown = '*', f'{shown}; default {field.default!r}'
        suffix = f' ({" | ".join(known)})' if known else ''
        lines.append(f'{mark} --config.{path:<24} {field.metadata["help"]}{suffix} [{shown}]')
    return '\n'.join(lines)

"""Recipe files and overrides."""

import contextlib
import hashlib
import importlib.machinery
import pathlib
import re
import signal
import sys
import traceback
import types

import ml_collections

from mixln_jax.config import Config, UnknownKey, all_fields, describe_unknown, flatten, keys_by_name, takes_auto
from mixln_jax.system import errors, files
from mixln_jax.system.cli import integer
from mixln_jax.system.errors import UsageError

BOOLEANS = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


def load(recipe: str, overrides=()) -> ml_collections.ConfigDict:
    """The ConfigDict of a recipe file, with keys overridden.

    Args:
        recipe: 'FILE' or 'FILE:ARG'; FILE is Python with `get_config()` or `get_config(ARG)`, and may import its
            neighbours.
        overrides: pairs (dotted key, text); the text is read as the type of the key's present value.

    Raises:
        UsageError: no such file, an error in it (naming the line), an unknown key, a text of another type.
    """
    file, colon, argument = recipe.partition('.py:')
    file = pathlib.Path(f'{file}.py' if colon else recipe)
    try:
        code = files.read(file, UsageError)
    except FileNotFoundError:
        raise UsageError(f'--config: there is no file {file}') from None
    if file.suffix != '.py':
        raise UsageError(f'--config: {file} is not a Python file')
    # Dataclasses and pickle look up a class's module by name, which no other recipe or module may have.
    digest = hashlib.blake2b(bytes(file.absolute()), digest_size=8).hexdigest()
    name = re.sub(r'\W', '_', f'recipe_{file.stem}_{digest}')
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = str(file)
    try:
        with _neighbours(file.parent):
            # Not by a loader: Python takes a file changed within a second, to the same size, for the one before.
            exec(compile(code, str(file), 'exec', dont_inherit=True), vars(module))
            if not hasattr(module, 'get_config'):
                raise UsageError('a recipe needs a function get_config, which returns config.default() with changes')
            config = module.get_config(*([argument] if argument else []))
    except UsageError as error:
        raise UsageError(f'{file}: {error}') from None
    except BaseException as error:  # a recipe is Python and may raise anything
        # Where SIGINT is answered otherwise than by Python itself, a KeyboardInterrupt is the recipe's own, too.
        pythons_own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if isinstance(error, errors.Stopped) or (isinstance(error, KeyboardInterrupt) and pythons_own):
            raise
        unknown = next((cause for cause in (error, *error.args) if isinstance(cause, UnknownKey)), None)
        what = unknown.args[0] if unknown else f'{type(error).__name__}: {errors.first_line(error)}'
        raise UsageError(f'{_line(error, file)}: {what}') from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UsageError(f'{file}: get_config returned {type(config).__name__}, not the ConfigDict of config.default()')
    for path, text in overrides:
        _override(config, path, text)
    return config


@contextlib.contextmanager
def _neighbours(folder):
    """Inside, a recipe can import the modules in its folder, as a script can, except under names of the standard
    library. Afterwards they are forgotten: another folder may have others of the same name."""
    found = set()

    def find_spec(name, path=None, target=None):
        if path is None and name not in sys.stdlib_module_names:
            spec = importlib.machinery.PathFinder.find_spec(name, [str(folder)])
            if spec and spec.loader:  # any other folder is not a package
                found.add(name)
                return spec
        return None

    finder = types.SimpleNamespace(find_spec=find_spec)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition('.')[0] in found]:
            del sys.modules[name]


def _line(error, file):
    """`FILE:LINE` where an error comes from, in a recipe or one of its neighbours; FILE alone where nothing says it."""
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        places.append((error.filename or '', error.lineno))
    lines = [f'{name}:{line}' for name, line in places if pathlib.Path(name).parent == file.parent and '<' not in name]
    return lines[-1] if lines else str(file)


def cell(file, source, cells, tokens, name):
    """The recipe of one cell of a paper's table, over that of its size.

    Args:
        file: the table's own, in a folder beside the recipes `llama_<size>.py`.
        source: which table.
        cells: {name: (size, {dotted key: value}, perplexity)}.
        tokens: {size: tokens that the paper reports}.
        name: of the cell. Raises UsageError, listing them, for one that is not there.
    """
    if name not in cells:
        raise UsageError(f'{name!r} is not a cell of {source}; FILE:CELL with one of {", ".join(cells)}')
    size, changes, perplexity = cells[name]
    config = load(str(pathlib.Path(file).absolute().parents[1] / f'llama_{size}.py'))
    config.update_from_flattened_dict(changes)
    config.expected.update(perplexity=perplexity, tokens=tokens[size], source=f'{source}, {name}')
    return config


def overrides(words):
    """The words `--config.KEY=VALUE`, or `--config.KEY VALUE`, as pairs (KEY, VALUE). Raises UsageError for others."""
    pairs, words = [], iter(words)
    for word in words:
        key, equals, text = word.partition('=')
        if not key.startswith('--config.'):
            meant = keys_by_name().get(key.lstrip('-').rpartition('.')[2])
            known = f', did you mean --{" or --".join(meant)}?' if meant else '; --help lists them'
            raise UsageError(f'unexpected argument {key if "secret" in key else word!r}{known}')
        text = text if equals else next(words, '--')
        if text.startswith('--') and not equals:
            raise UsageError(f'{key} needs a value')
        pairs.append((key.removeprefix('--config.'), text))
    return pairs


def _override(config, path, text):
    *groups, name = path.split('.')
    for at, part in enumerate([*groups, name]):
        if part not in config:
            raise UsageError(describe_unknown('.'.join(['config', *groups[:at], part]), part, name, config))
        inside = isinstance(config[part], ml_collections.ConfigDict)
        if inside == (at == len(groups)):
            raise UsageError(f'config.{path} is {"a group of keys" if inside else "not a key"}')
        config = config[part] if inside else config
    kind, field = type(config[name]), dict(all_fields(Config, '')).get(path)
    number = field and takes_auto(field)
    kind = field.type if number else kind
    read = {bool: lambda text: BOOLEANS[text.strip().lower()], int: integer}.get(kind, kind)
    try:
        config[name] = text if number and text == 'auto' else read(text)
    except (ValueError, KeyError):
        wanted = 'a number or auto' if number else 'true or false' if kind is bool else f'of type {kind.__name__}'
        raise UsageError(f'config.{path} must be {wanted}, not {text!r}') from None


def help_text(values: ml_collections.ConfigDict | None = None, names=None) -> str:
    """Every key with its meaning, type and value, a line each.

    Args:
        values: of a recipe, where those that are not the default are marked; None: the defaults.
        names: {key: what it may be}, of keys whose choices this module does not know.
    """
    lines, values = [], flatten(values.to_dict()) if values else {}
    for path, field in all_fields(Config, ''):
        value, choices = values.get(path, field.default), field.metadata['choices'] or (names or {}).get(path)
        value = '...' if value and field.metadata['secret'] else value
        shown = f'{field.type.__name__}{" or auto" if takes_auto(field) else ""}, {value!r}'
        mark = ' '
        if value != field.default:
            mark, shown = '*', f'{shown}; default {field.default!r}'
        listed = f' ({" | ".join(choices)})' if choices else ''
        lines.append(f'{mark} --config.{path:<24} {field.metadata["help"]}{listed} [{shown}]')
    return '\n'.join(lines)

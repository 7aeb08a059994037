"""Configurations: a recipe fills a ConfigDict, from which a checked, frozen `Config` is built."""

import dataclasses
import difflib
import math
import numbers
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import ml_collections

from mixln_jax.keys.classification import Classification  # noqa: F401
from mixln_jax.keys.data import WORKERS, Data, Task  # noqa: F401
from mixln_jax.keys.field import LARGEST_VOCABULARY, LONGEST, changed_for_tasks  # noqa: F401
from mixln_jax.keys.images import Images  # noqa: F401
from mixln_jax.keys.model import Model  # noqa: F401
from mixln_jax.keys.online import Online  # noqa: F401
from mixln_jax.keys.optim import PUBLISHED, Optim  # noqa: F401
from mixln_jax.keys.preference import Preference, Reward  # noqa: F401
from mixln_jax.keys.run import Analysis, Checkpoint, Config, Eval, Expected, Mesh, Processes, Profile, Stability  # noqa: F401
from mixln_jax.keys.tune import MEANT_FOR, Tune
from mixln_jax.system import errors, files
from mixln_jax.system.errors import UsageError, nearest

WITHIN: dict[str, Callable[[float, float], bool]] = {
    'at least': lambda value, bound: value >= bound,
    'above': lambda value, bound: value > bound,
    'at most': lambda value, bound: value <= bound,
    'below': lambda value, bound: value < bound,
}


class UnknownKey(KeyError):
    """A recipe uses a name that is not a key. The only argument is the message."""


class Keys(ml_collections.ConfigDict):
    """A ConfigDict that names the nearest key for an unknown one, and converts numbers if their value stays the same,
    such as 1e3 for an integer."""

    def __getitem__(self, key: str) -> Any:
        if key not in self and '.' not in str(key):
            raise UnknownKey(describe_unknown(key, key, key, self))
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if self.is_locked and key not in self:
            raise UnknownKey(describe_unknown(key, key, key, self))
        try:
            super().__setitem__(key, _convert(type(self.get(key)), value))
        except TypeError:
            if key == 'secret':
                raise TypeError(f'{key} must be a text') from None  # hides the value
            raise


def default() -> ml_collections.ConfigDict:
    """Returns the default values as a ConfigDict for recipes to change. Its keys and types are locked."""

    def value(field: dataclasses.Field) -> Any:
        if dataclasses.is_dataclass(field.type):
            return Keys({inner.name: value(inner) for inner in dataclasses.fields(field.type)})
        number = ml_collections.FieldReference('auto', field_type=(float, int, str))
        return number if takes_auto(field) else field.default

    return Keys({field.name: value(field) for field in dataclasses.fields(Config)}).lock()


def describe_unknown(shown: str, part: str, name: str, group: Collection[str]) -> str:
    """Returns the message for an unknown key.

    Args:
        shown: the key up to its first unknown part.
        part: that part.
        name: the last part of the key; not `part` if `part` should have been a group.
        group: the names in the group that `part` was looked up in.
    """
    paths = keys_by_name()
    near = difflib.get_close_matches(str(part), [*group, *(paths if part == name else ())], n=1)
    if part != name and len(paths.get(name, ())) == 1:
        near = paths[name]
    elif not near or near[0] not in group:
        near = [path for one in near or difflib.get_close_matches(str(name), paths, n=1) for path in paths[one]]
    hint = f', did you mean {" or ".join(near)}?' if near else '; --help lists the keys'
    return f'unknown key {shown}{hint}'


def keys_by_name() -> dict[str, list[str]]:
    """Returns {last part of a key: the keys, `config.GROUP.NAME`, that end in it}."""
    paths: dict[str, list[str]] = {}
    for path, _ in all_fields():
        paths.setdefault(path.rpartition('.')[2], []).append(f'config.{path}')
    return paths


def build(
    values: ml_collections.ConfigDict | Mapping[str, Any], earlier: Config | None = None, resolved: bool = False
) -> Config:
    """Returns the checked, frozen Config of a ConfigDict or nested dict.

    Numbers that are `auto` are taken from `earlier`, the run that continues, or else are the published ones.
    With `num_epochs` the number of steps is 0, for the data decides it; unless `values` are `resolved`, as a run saves
    them, and hold both.

    Raises UsageError, naming the key, if a key is unknown, of the wrong type or out of range, or if keys contradict
    each other.
    """
    values = values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values
    config = _build(Config, values, 'config', earlier)
    if config.num_epochs and not resolved:
        if config.num_steps not in (0, Config.num_steps):
            raise UsageError(
                f'config.num_steps={config.num_steps} and config.num_epochs={config.num_epochs:g} are both given; '
                'config.num_steps=0 leaves the number of steps to config.num_epochs'
            )
        config = dataclasses.replace(config, num_steps=0)
    if not resolved:  # runs from before this check are still read
        _check_task(config)
    _check_together(config)
    return config if config.compat == 'none' else _official(config)


def _official(config: Config) -> Config:
    """Returns the config with the keys that `compat` sets: the weights' type, and the embedding's standard deviation
    unless it was given."""
    given = config.model.embed_std != Model.embed_std
    embed_std = config.model.embed_std if given else 0.4**0.5
    dtype = 'bfloat16' if config.compat == 'official' else config.param_dtype
    return dataclasses.replace(config, param_dtype=dtype, model=dataclasses.replace(config.model, embed_std=embed_std))


def read(path: str | os.PathLike) -> Config:
    """Returns the Config of a run, from the config.json of its work directory.

    Raises UsageError if the file does not exist or is not the configuration of a run.
    """
    problem = 'not the configuration of a run'
    try:
        values = files.read_json(path, UsageError, problem)
    except FileNotFoundError:
        raise UsageError(f'{pathlib.Path(path).parent} is not the folder of a run: it has no config.json') from None
    with errors.reading(path, UsageError, problem):
        try:
            return from_resolved(values)
        except UsageError as error:
            raise ValueError(str(error)) from None


def from_resolved(values: Mapping[str, Any]) -> Config:
    """Returns the Config of a dict that a run has saved, which names the placement of every layer."""
    model = dict(values['model'], norm_position=','.join(values['model']['norm_position']))
    model = {name: model[name] for name in model if name not in ('layer_index', 'depth')}
    return build({**values, 'model': model}, resolved=True)


def _build(cls: type, values: Any, prefix: str, earlier: Any) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(values, Mapping):
        raise UsageError(f'{prefix} must be a group of keys, not {values!r}')
    for name in values:
        if name not in fields:
            raise UsageError(describe_unknown(f'{prefix}.{name}', name, name, fields))
    built = {}
    for name, field in fields.items():
        path, value = f'{prefix}.{name}', values.get(name, field.default)
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            built[name] = _build(field.type, values.get(name, {}), path, getattr(earlier, name, None))
        elif takes_auto(field) and value == 'auto':
            built[name] = getattr(earlier, name, value)
        else:
            built[name] = _check(path, field, value)
    return cls(**built)


def takes_auto(field: dataclasses.Field) -> bool:
    """Returns whether the value of a key is a number or `auto`."""
    return field.type in (int, float) and field.default == 'auto'


def _convert(kind: type, value: Any) -> Any:
    """Returns a number, numpy's too, as the type of its key if that does not change its value; otherwise `value`."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind not in (bool, int, float) or not is_number:
        return value
    try:
        converted = kind(value)
    except (OverflowError, ValueError):  # not finite, or larger than any float
        return value
    return converted if kind is float or converted == value else value


def type_name(field: dataclasses.Field) -> str:
    """Returns the name of a key's type."""
    return getattr(field.type, '__name__', str(field.type))


def _check(path: str, field: dataclasses.Field, value: Any) -> Any:
    """Returns the value of a key, converted to its type. Raises UsageError if it may not have this value."""
    kind, secret, choices = field.type, field.metadata['secret'], field.metadata['choices']
    if isinstance(kind, type):
        value = _convert(kind, value)
    if type(value) is not kind:
        expected = 'a number or auto' if takes_auto(field) else f'of type {type_name(field)}'
        raise UsageError(f'{path} must be {expected}, not {type(value).__name__ if secret else repr(value)}')
    if kind is float and not math.isfinite(value):
        raise UsageError(f'{path} must be a finite number, not {value}')
    if choices and value not in choices:
        raise UsageError(f'{path}={value!r} is not one of {", ".join(choices)}{nearest(value, choices)}')
    for name, bound in field.metadata['ranges'].items():
        if not WITHIN[name](value, bound):
            raise UsageError(f'{path} must be {name} {bound:g}, not {value!r}')
    return value


def _check_task(config: Config) -> None:
    """Raises UsageError for a key that has a meaning for other tasks alone, unless it has its default."""
    for path, value, tasks in changed_for_tasks(config, 'config'):
        if (name := config.task.name) not in tasks:
            raise UsageError(f'{path}={value} has no meaning for config.task.name={name}: it is for {", ".join(tasks)}')


def _check_together(config: Config) -> None:
    """Raises UsageError if keys contradict each other."""
    model, optim = config.model, config.optim
    if not model.head_dim and model.hidden_size % model.num_heads:
        raise UsageError(
            f'config.model.hidden_size={model.hidden_size} is not divisible by config.model.num_heads={model.num_heads}'
        )
    if model.num_heads % model.kv_heads:
        raise UsageError(
            f'config.model.num_heads={model.num_heads} is not divisible by '
            f'config.model.num_kv_heads={model.num_kv_heads}'
        )
    if model.rope_high_freq_factor <= model.rope_low_freq_factor:
        raise UsageError(
            f'config.model.rope_high_freq_factor={model.rope_high_freq_factor:g} must be above '
            f'config.model.rope_low_freq_factor={model.rope_low_freq_factor:g}'
        )
    if optim.weight_decay and optim.name == 'adam':
        raise UsageError('config.optim.weight_decay needs config.optim.name=adamw or another; adam has none')
    if optim.name == 'adafactor' and optim.mu_dtype != 'auto':
        raise UsageError(
            'config.optim.mu_dtype has no meaning under config.optim.name=adafactor, which has no momentum'
        )
    _check_length(config)
    task_accuracies(config.expected.tasks)
    rate_factors(optim.rate_factors)
    _check_tune(config)
    if config.task.name == 'online':
        _check_online(config)
    if config.task.name == 'preference':
        _check_preference(config)
    if 0 < config.processes.stall < 1:
        raise UsageError(f'config.processes.stall={config.processes.stall:g} must be 0 or at least 1 second')
    if config.batch_size * config.seq_length >= 2**31:
        raise UsageError('config.batch_size times config.seq_length must be below 2^31 positions')
    sizes = dataclasses.asdict(config.mesh)
    for name, size in sizes.items():
        if size == 0:
            raise UsageError(f'config.mesh.{name} must be -1 (all that are left) or a number of devices, not 0')
    if len(rest := [f'config.mesh.{name}' for name, size in sizes.items() if size == -1]) > 1:
        raise UsageError(f'{" and ".join(rest)} are both -1; only one of them can take all devices that are left')


def _check_length(config: Config) -> None:
    """Raises UsageError if the number of steps contradicts other keys. With `num_epochs` it is 0 until the data is
    opened."""
    optim, num_steps = config.optim, config.num_steps
    if not num_steps and not config.num_epochs:
        raise UsageError('config.num_steps must be at least 1 without config.num_epochs, not 0')
    if num_steps + config.model.ramp_start >= 2**31:
        raise UsageError('config.num_steps plus config.model.ramp_offset must be below 2^31')
    if optim.decay_steps and optim.schedule != 'wsd':
        raise UsageError(
            f'config.optim.decay_steps needs config.optim.schedule=wsd; {optim.schedule} decays up to the last step'
            if optim.schedule != 'constant'
            else 'config.optim.decay_steps needs config.optim.schedule=wsd; constant does not decay'
        )
    if num_steps and optim.warmup_steps >= num_steps:
        raise UsageError(f'config.optim.warmup_steps={optim.warmup_steps} must be below config.num_steps={num_steps}')
    if num_steps and optim.decay_steps > num_steps - (warmup := optim.warmup(num_steps)):
        raise UsageError(
            f'config.optim.decay_steps={optim.decay_steps} is more than the {num_steps - warmup} steps after the '
            f'warm-up of {warmup} (config.optim.warmup_steps, warmup_ratio)'
        )
    checkpoint = config.checkpoint
    if checkpoint.best and not config.eval.every:
        raise UsageError('config.checkpoint.best needs evaluations during the run: config.eval.every above 0')
    if checkpoint.keep_every and (not checkpoint.every or checkpoint.keep_every % checkpoint.every):
        raise UsageError(
            f'config.checkpoint.keep_every={checkpoint.keep_every} must be a multiple of '
            f'config.checkpoint.every={checkpoint.every}, as only what is saved can be kept'
        )


def with_num_steps(config: Config, num_steps: int) -> Config:
    """Returns the configuration of a run of `num_epochs`, whose number of steps is known now.

    Raises UsageError if it contradicts other keys.
    """
    if num_steps >= 2**31:
        raise UsageError(f'config.num_epochs={config.num_epochs:g} are {num_steps:,} steps, more than 2^31')
    config = dataclasses.replace(config, num_steps=num_steps)
    _check_length(config)
    return config


def task_accuracies(text: str) -> dict[str, float]:
    """Returns {task: accuracy in per cent} of `config.expected.tasks`. Raises UsageError if it is malformed."""
    return _numbers('expected.tasks', text, 'TASK=PER CENT, each task once', lambda value: 0 <= value <= 100)


def rate_factors(text: str) -> dict[str, float]:
    """Returns {pattern: factor} of `config.optim.rate_factors`, in its order. Raises UsageError if it is malformed."""
    form = 'PATTERN=FACTOR above 0, each pattern once (config.tune.train says which weights are trained)'
    return _numbers('optim.rate_factors', text, form, lambda value: 0 < value < math.inf)


def _numbers(key: str, text: str, form: str, valid: Callable[[float], bool]) -> dict[str, float]:
    numbers_by_name: dict[str, float] = {}
    for part in filter(None, text.split(',')):
        name, _, word = (half.strip() for half in part.rpartition('='))
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not name or name in numbers_by_name or not valid(value):
            raise UsageError(f'config.{key}: {part!r} is not {form}')
        numbers_by_name[name] = value
    return numbers_by_name


def _check_tune(config: Config) -> None:
    """Raises UsageError if keys contradict what is to be trained."""
    tune, method = config.tune, f'config.tune.method={config.tune.method}'
    for name, methods in MEANT_FOR.items():
        if tune.method not in methods and getattr(tune, name) != getattr(Tune, name):
            raise UsageError(f'config.tune.{name} has no meaning under {method}: it is for {" and ".join(methods)}')
    if tune.method == 'full' and not tune.train and tune.base_dtype != Tune.base_dtype:
        raise UsageError(f'config.tune.base_dtype={tune.base_dtype} has no meaning where nothing is frozen')
    if tune.method == 'lora' and not (config.init_from or config.resume_from):
        raise UsageError(f'{method} needs config.init_from: the weights that the adapters are to adapt')
    if tune.method == 'lora' and config.optim.name == 'galore':
        raise UsageError(f'config.optim.name=galore has no meaning under {method}: adapters are of low rank already')
    if tune.method == 'lisa' and tune.layers > config.model.num_layers:
        raise UsageError(
            f'config.tune.layers={tune.layers} is more than config.model.num_layers={config.model.num_layers}'
        )


def _check_preference(config: Config) -> None:
    """Raises UsageError if keys contradict how a run learns from pairs."""
    keys, prefix = config.task.preference, 'config.task.preference'
    if not (config.init_from or config.resume_from):
        raise UsageError('config.task.name=preference needs config.init_from: the network that is the reference')
    if keys.loss == 'ipo' and keys.label_smoothing:
        raise UsageError(f'{prefix}.label_smoothing has no meaning for {prefix}.loss=ipo')


def _check_online(config: Config) -> None:
    """Raises UsageError if keys contradict how a run learns from generated text."""
    online, prefix = config.task.online, 'config.task.online'
    if not online.reward:
        raise UsageError(
            f'config.task.name=online needs {prefix}.reward: module:function, or the folder of a reward network'
        )
    if not (config.init_from or config.resume_from):
        raise UsageError('config.task.name=online needs config.init_from: a network that can answer')
    if online.algorithm != 'remax' and online.completions == 1:
        raise UsageError(
            f'{prefix}.completions=1 is too few for {prefix}.algorithm={online.algorithm}, which compares the '
            'completions of a prompt: at least 2'
        )
    if config.batch_size % online.completions:
        raise UsageError(
            f'config.batch_size={config.batch_size} is not divisible by {prefix}.completions={online.completions}'
        )
    if online.max_new_tokens >= config.seq_length:
        raise UsageError(
            f'{prefix}.max_new_tokens={online.max_new_tokens} leaves no room for a prompt in '
            f'config.seq_length={config.seq_length}'
        )
    if not online.beta and online.kl != 'auto':
        raise UsageError(f'{prefix}.kl={online.kl} has no meaning with {prefix}.beta=0')


def public(config: Config) -> dict[str, Any]:
    """Returns a Config as a dict that may be written and shown, without the secret."""
    values = dataclasses.asdict(config)
    values['processes']['secret'] = ''
    return values


def flatten(config: Config | Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Returns a Config, or the dict of one, as a flat dict with keys joined by dots."""
    values = dataclasses.asdict(config) if isinstance(config, Config) else config
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(flatten(value, f'{prefix}{name}.') if isinstance(value, dict) else {prefix + name: value})
    return flat


def may_change() -> set[str]:
    """Returns the keys that may change when a run continues, such as `eval.every`."""
    groups = {f'{field.name}.' for field in dataclasses.fields(Config) if field.metadata.get('may_change')}
    keys = [(path, field.metadata['may_change']) for path, field in all_fields()]
    return {path for path, alone in keys if alone or f'{path.partition(".")[0]}.' in groups}


def same_weights() -> list[str]:
    """Returns the keys of `model` that must be the same in two networks for them to have the same weights."""
    return [field.name for field in dataclasses.fields(Model) if field.metadata['weights']]


def all_fields(cls: type = Config, prefix: str = '') -> Iterator[tuple[str, dataclasses.Field]]:
    """Yields (path, field) of every key, such as `model.num_layers`."""
    for field in dataclasses.fields(cls):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from all_fields(field.type, f'{prefix}{field.name}.')
        else:
            yield prefix + field.name, field

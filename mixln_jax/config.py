"""Every key of a run: type, default, help and range, once. Recipes fill a ConfigDict, the program reads dataclasses.

The defaults are the Mix-LN paper's C4 recipe (arXiv 2412.13795, section 4.1), so a recipe states only what differs.
"""

import dataclasses
import difflib
import math
import numbers
import pathlib

import ml_collections

from mixln_jax.system import errors, files
from mixln_jax.system.errors import UsageError, nearest

LONGEST = 2**20  # tokens of a row; packing holds 64 of them open
WORKERS = 1024
LARGEST_VOCABULARY = 2**24


def key(
    default,
    help,
    *,
    choices=None,
    at_least=None,
    above=None,
    at_most=None,
    below=None,
    secret=False,
    may_change=False,
    weights=False,
):
    """A configuration key: its default (which gives its type), its help and the values it may take.

    `secret`: its value is never shown. `may_change`: it may differ when a run continues; any other key that differs
    makes it another run. `weights`: two networks must agree in it to have the same weights and mean the same by them.
    """
    ranges = {'at least': at_least, 'above': above, 'at most': at_most, 'below': below}
    ranges = {name: bound for name, bound in ranges.items() if bound is not None}
    metadata = {'help': help, 'choices': choices, 'ranges': ranges, 'secret': secret}
    metadata |= {'may_change': may_change, 'weights': weights}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


def group(cls, may_change=False):
    """A group of keys, `config.<group>.<key>`; `may_change`: all of them may differ when a run continues."""
    return dataclasses.field(default_factory=cls, metadata={'may_change': may_change})


@dataclasses.dataclass(frozen=True)
class Model:
    """The network; `hidden_size` and the like are Hugging Face's names for LLaMA."""

    family: str = key('llama', 'architecture', choices=('llama',), weights=True)
    vocab_size: int = key(32000, 'size of the vocabulary', at_least=2, at_most=LARGEST_VOCABULARY, weights=True)
    hidden_size: int = key(768, 'width D of the residual stream', at_least=1, at_most=2**18, weights=True)
    intermediate_size: int = key(2048, 'width of the MLP', at_least=1, at_most=2**20, weights=True)
    num_layers: int = key(12, 'number of layers L', at_least=1, at_most=10_000, weights=True)
    num_heads: int = key(12, 'number of query heads', at_least=1, weights=True)
    num_kv_heads: int = key(0, 'number of key and value heads; 0: as many as query heads', at_least=0)
    head_dim: int = key(0, 'features of a head; 0: hidden_size / num_heads', at_least=0, at_most=2**16)
    attention_bias: bool = key(False, 'the matrices of attention have biases', weights=True)
    mlp_bias: bool = key(False, 'the matrices of the MLP have biases', weights=True)
    tie_word_embeddings: bool = key(False, 'the head is the embedding, transposed', weights=True)
    norm_position: str = key(
        'mix',
        'placement of the norms: a name for all layers, mix, or a list such as post*3,pre*9; +prores after a name, as '
        'in mix+prores, ramps up its sub-layers',
    )
    post_ratio: float = key(0.25, 'share of Post-LN layers under mix', at_least=0.0, at_most=1.0)
    norm_groups: int = key(4, 'groups of features in the norms of group_pre', at_least=1)
    ramp_steps: int = key(
        1000,
        '+prores: updates T after which the first layer is ramped up; layer l is after T * l',
        at_least=1,
        at_most=100_000,
    )
    ramp_offset: int = key(
        'auto',
        '+prores: updates that the ramp has made before the first step; auto: those of the weights of init_from, else '
        '0; a run that goes on keeps its own',
        at_least=0,
        at_most=2**30,
    )
    norm_eps: float = key(1e-6, 'epsilon of the norms', above=0.0, weights=True)
    rope_theta: float = key(10000.0, 'base of the rotary angles', above=1.0, weights=True)
    rope_type: str = key(
        'default',
        'llama3: slow rotations are slowed further, as in Llama 3.1',
        choices=('default', 'llama3'),
        weights=True,
    )
    rope_factor: float = key(8.0, 'llama3: by how much the slowest rotations are slowed', at_least=1.0)
    rope_low_freq_factor: float = key(1.0, 'llama3: fewer turns than this in a row: the slowest rotations', above=0.0)
    rope_high_freq_factor: float = key(4.0, 'llama3: more turns than this in a row: rotations that stay', above=0.0)
    rope_original_length: int = key(8192, 'llama3: tokens of the row in which turns are counted', at_least=1)
    init: str = key(
        'auto',
        'initialisation: normal (init_std), scaled (attention and MLP outputs divided by sqrt(2L)), deepnorm, '
        'or auto (deepnorm in deepnorm layers, else normal)',
        choices=('auto', 'normal', 'scaled', 'deepnorm'),
    )
    init_std: float = key(0.02, 'standard deviation of the weights', above=0.0)
    scale_embed: bool = key(False, 'embeddings are multiplied by sqrt(D)', weights=True)
    embed_std: float = key(0.02, 'standard deviation of the embedding', above=0.0)
    remat: str = key(
        'none',
        'what the backward pass recomputes: nothing, all but the matrix products (dots), or the whole layer (full)',
        choices=('none', 'dots', 'full'),
        may_change=True,
    )
    scan_unroll: str = key(
        'auto',
        'layers unrolled in the compiled loop; all: a little faster, compiles longer, defeats remat; '
        'auto: all up to 12 layers without remat',
        choices=('auto', '1', 'all'),
        may_change=True,
    )
    attention: str = key(
        'auto',
        "in blocks of queries, or auto: cuDNN's where it can be, on NVIDIA GPUs (from Ampere on) in bfloat16",
        choices=('auto', 'blocks'),
        may_change=True,
    )

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def ramp_start(self) -> int:
        """Updates that the ramps have made before the first step."""
        return 0 if self.ramp_offset == 'auto' else self.ramp_offset

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the text comes from and how it becomes rows of tokens."""

    source: str = key('tfds', 'kind of source', choices=('tfds', 'tokens', 'jsonl', 'text', 'stdlib'))
    path: str = key(
        '',
        'files of a jsonl or text source: paths or globs, separated by commas; folder of prepared tokens',
        may_change=True,
    )
    name: str = key('c4/en', 'name of a tfds data set')
    data_dir: str = key(
        '', 'folder or gs:// bucket that holds tfds data sets; empty: ~/tensorflow_datasets', may_change=True
    )
    split: str = key('train', 'split to train on: train, validation, or what a tfds data set has')
    tokenizer: str = key('sentencepiece', 'kind of tokenizer', choices=('sentencepiece', 'huggingface', 'bytes'))
    tokenizer_path: str = key(
        '',
        'file or URL of a sentencepiece model or a huggingface tokenizer.json; empty: the T5 vocabulary',
        may_change=True,
    )
    mode: str = key(
        'pad',
        'pad: one document a row, cut and padded; pack: pieces of documents side by side, attention inside each; '
        'concat: documents end to end',
        choices=('pad', 'pack', 'concat'),
    )
    workers: int = key(
        0, 'processes that prepare batches; 0: threads of this process', at_least=0, at_most=WORKERS, may_change=True
    )
    seed: int = key(0, 'seed of the order of the rows', at_least=0, below=2**32)


# What b1, b2 and eps are where they are `auto`: as published, of those that an optimiser has.
PUBLISHED = {
    'adam': {'b1': 0.9, 'b2': 0.999, 'eps': 1e-8},  # Kingma and Ba 2015, arXiv 1412.6980
    'adamw': {'b1': 0.9, 'b2': 0.999, 'eps': 1e-8},  # Loshchilov and Hutter 2019, arXiv 1711.05101
    'sgd': {'b1': 0.9},
    'lion': {'b1': 0.9, 'b2': 0.99},  # Chen et al. 2023, arXiv 2302.06675
    'adafactor': {},
    'muon': {'b1': 0.95, 'b2': 0.95, 'eps': 1e-8},  # Jordan et al. 2024; b2 and eps are AdamW's in Liu et al. 2025
    'galore': {'b1': 0.9, 'b2': 0.999, 'eps': 1e-6},  # Zhao et al. 2024, their code
}


def _published(name):
    """What `auto` comes to, for help: '0.999 (lion 0.99)'."""
    adams = PUBLISHED['adam'][name]
    others = [f'{rule} {own[name]:g}' for rule, own in PUBLISHED.items() if own.get(name, adams) != adams]
    return f'auto: as published, {adams:g} ({", ".join(others)}); a run that goes on keeps its own'


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimiser and its learning-rate schedule. Made with `auto` in b1, b2 or eps it has the published number."""

    name: str = key(
        'adam',
        "optimiser; adafactor's rates are relative to the size of each matrix",
        choices=('adam', 'adamw', 'sgd', 'lion', 'adafactor', 'muon', 'galore'),
    )
    learning_rate: float = key(1e-3, 'peak learning rate', above=0.0, at_most=1e38)
    min_ratio: float = key(0.1, 'last learning rate as a share of the peak', at_least=0.0, at_most=1.0)
    schedule: str = key('cosine', 'decay after the warm-up', choices=('cosine', 'linear', 'constant', 'wsd'))
    warmup_ratio: float = key(0.1, 'share of the steps that warm up', at_least=0.0, below=1.0)
    decay_ratio: float = key(0.2, 'share of the steps over which wsd decays', above=0.0, at_most=1.0)
    weight_decay: float = key(0.0, 'decoupled weight decay of matrices (all but adam)', at_least=0.0)
    b1: float = key(
        'auto', f'decay of the first moment; momentum of sgd and muon; {_published("b1")}', at_least=0.0, below=1.0
    )
    b2: float = key('auto', f"decay of the second moment, of lion's first; {_published('b2')}", at_least=0.0, below=1.0)
    eps: float = key('auto', f'epsilon of Adam; {_published("eps")}', above=0.0)
    mu_dtype: str = key(
        'auto',
        'type of the first moment; bfloat16 saves 2 bytes a parameter; auto: that of the weights',
        choices=('auto', 'float32', 'bfloat16'),
    )
    galore_rank: int = key(128, 'rank of the projected gradients of galore', at_least=1)
    galore_gap: int = key(200, 'steps between new projections of galore', at_least=1)
    galore_scale: float = key(0.25, 'factor of the projected updates of galore', above=0.0)
    clip_norm: float = key(0.0, 'largest global gradient norm; 0: no clipping', at_least=0.0)

    def __post_init__(self):
        for name, number in (PUBLISHED['adam'] | PUBLISHED.get(self.name, {})).items():
            if getattr(self, name) == 'auto':
                object.__setattr__(self, name, number)


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluation during training; it always comes after the last step."""

    every: int = key(1000, 'steps between evaluations; 0: only after the last step', at_least=0)
    tokens: int = key(10_000_000, 'target tokens of an evaluation, at least (or the whole split)', at_least=1)
    split: str = key('validation', 'split to evaluate on: train, validation, or what a tfds data set has')


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Checkpoints; one always comes after the last step and on a signal."""

    every: int = key(1000, 'steps between checkpoints; 0: only after the last step', at_least=0)
    keep: int = key(3, 'newest checkpoints to keep', at_least=1)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How devices share the work."""

    data: int = key(-1, 'copies of the model, which share the batch; -1: as many as there is room for', at_least=-1)
    fsdp: int = key(1, 'devices that share the batch and keep a part of every matrix each; -1: the rest', at_least=-1)
    tensor: int = key(1, 'devices that share every matrix product; -1: the rest', at_least=-1)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes that train together; the environment says which (see processes.py)."""

    timeout: float = key(300.0, 'seconds to wait for all of them at the start', above=0, at_most=1e6)
    secret: str = key(
        '',
        'what only they know, so that no stranger takes part; it is never written or shown; empty: MIXLN_JAX_SECRET of '
        "the environment, else the scheduler's name of the job",
        secret=True,
    )
    stall: float = key(900.0, 'seconds without a batch before all stacks are shown; 0: never', at_least=0, at_most=1e6)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What each layer does, measured during training; it always comes after the last step (see analysis/during.py)."""

    every: int = key(1000, 'steps between analyses; 0: only after the last step', at_least=0)
    tokens: int = key(16_384, 'tokens of the evaluation split that they are made on; 0: no analyses', at_least=0)


@dataclasses.dataclass(frozen=True)
class Profile:
    """A window of steps recorded by jax.profiler into the work directory."""

    start: int = key(10, 'first step of the window', at_least=1)
    steps: int = key(0, 'steps in the window; 0: no profile', at_least=0)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a paper reports of the run; the report puts it beside what came out."""

    perplexity: float = key(0.0, 'perplexity that a paper reports; 0: none', at_least=0.0)
    tokens: float = key(0.0, 'tokens that it reports', at_least=0.0)
    source: str = key('', 'where it does')


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = key(0, 'seed of the initial weights', at_least=0, below=2**32)
    batch_size: int = key(512, 'sequences in a batch, over all devices and accumulation', at_least=1, at_most=2**24)
    seq_length: int = key(256, 'tokens in a sequence T', at_least=2, at_most=LONGEST)
    num_steps: int = key(20_000, 'updates in the run', at_least=1, below=2**31)
    accumulate: int = key(1, 'micro-batches that make one batch', at_least=1, may_change=True)
    log_every: int = key(10, 'steps between progress lines', at_least=1, may_change=True)
    compute_dtype: str = key('bfloat16', 'type of activations', choices=('bfloat16', 'float32'))
    param_dtype: str = key('float32', 'type of weights and moments', choices=('float32', 'bfloat16'))
    device: str = key('auto', 'kind of device', choices=('auto', 'cpu', 'gpu', 'tpu'), may_change=True)
    deterministic: bool = key(False, 'bitwise repeatable also on GPU, at some cost')
    collapse: str = key(
        'warn',
        "when the loss stays near that of the tokens' frequencies alone, as it does in a collapsed Post-LN network: "
        'warn, stop (exit code 6) or ignore',
        choices=('warn', 'stop', 'ignore'),
    )
    compat: str = key(
        'none',
        "official: what the Mix-LN authors' code does where it differs (docs/official.md); official_float32: all of it "
        'but weights and moments in bfloat16',
        choices=('none', 'official', 'official_float32'),
    )
    init_from: str = key(
        '', 'weights to start from: hf:FOLDER, or a run or checkpoint of ours; only the weights', may_change=True
    )
    resume_from: str = key(
        '', 'run or checkpoint of ours, whole state, to go on from in another work directory', may_change=True
    )
    model: Model = group(Model)
    data: Data = group(Data)
    optim: Optim = group(Optim)
    eval: Eval = group(Eval, may_change=True)
    checkpoint: Checkpoint = group(Checkpoint, may_change=True)
    mesh: Mesh = group(Mesh, may_change=True)
    processes: Processes = group(Processes, may_change=True)
    analysis: Analysis = group(Analysis, may_change=True)
    profile: Profile = group(Profile, may_change=True)
    expected: Expected = group(Expected, may_change=True)


class UnknownKey(KeyError):
    """A name in a recipe that is no key; its only argument is what to say."""


class Keys(ml_collections.ConfigDict):
    """A ConfigDict whose keys take numbers of another type where the value stays the same, such as 1e3 for an integer,
    and that says where a key is that is not in this group."""

    def __getitem__(self, key):
        if key not in self and '.' not in str(key):
            raise UnknownKey(describe_unknown(key, key, key, self))
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        if self.is_locked and key not in self:
            raise UnknownKey(describe_unknown(key, key, key, self))
        try:
            super().__setitem__(key, _as(type(self.get(key)), value))
        except TypeError:
            if key == 'secret':
                raise TypeError(f'{key} must be a text') from None  # the value is not shown
            raise


def default() -> ml_collections.ConfigDict:
    """The default values as a ConfigDict, for recipes to change; keys and types are locked."""

    def of(field):
        if dataclasses.is_dataclass(field.type):
            return Keys({inner.name: of(inner) for inner in dataclasses.fields(field.type)})
        number = ml_collections.FieldReference('auto', field_type=(float, int, str))
        return number if takes_auto(field) else field.default

    return Keys({field.name: of(field) for field in dataclasses.fields(Config)}).lock()


def describe_unknown(shown, part, name, group):
    """What to say of an unknown key.

    Args:
        shown: the key, as far as it is known and one part more.
        part: that part.
        name: the last part of the whole key; another than `part` where `part` should have been a group.
        group: the names in the same group as `part`.
    """
    paths = keys_by_name()
    near = difflib.get_close_matches(str(part), [*group, *(paths if part == name else ())], n=1)
    if part != name and len(paths.get(name, ())) == 1:
        near = paths[name]
    elif not near or near[0] not in group:
        near = [path for one in near or difflib.get_close_matches(str(name), paths, n=1) for path in paths[one]]
    meant = f', did you mean {" or ".join(near)}?' if near else '; --help lists the keys'
    return f'unknown key {shown}{meant}'


def keys_by_name():
    """{last part of a key: the keys that end in it, `config.GROUP.NAME`}."""
    paths = {}
    for path, _ in all_fields(Config, ''):
        paths.setdefault(path.rpartition('.')[2], []).append(f'config.{path}')
    return paths


def build(values, earlier: Config | None = None) -> Config:
    """A ConfigDict or nested dict as a checked, frozen Config.

    Numbers that are `auto` are those of `earlier`, the run that goes on, else the published ones.

    Raises UsageError, naming the key, for one that is unknown, of the wrong type or out of range, and for keys that
    contradict each other.
    """
    values = values.to_dict() if isinstance(values, ml_collections.ConfigDict) else values
    config = _build(Config, values, 'config', earlier)
    _check_together(config)
    return config if config.compat == 'none' else _official(config)


def _official(config):
    """With what `compat` decides of the keys: the type of the weights, the embedding's deviation unless it is given."""
    given = config.model.embed_std != Model.embed_std
    embed_std = config.model.embed_std if given else 0.4**0.5
    dtype = 'bfloat16' if config.compat == 'official' else config.param_dtype
    return dataclasses.replace(config, param_dtype=dtype, model=dataclasses.replace(config.model, embed_std=embed_std))


def read(path) -> Config:
    """The Config of a run, from the config.json of its work directory, where the placement is spelled out.

    Raises UsageError where there is none or it is not one.
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


def from_resolved(values) -> Config:
    """The Config of a dict that a run has saved, where the placement is spelled out."""
    model = dict(values['model'], norm_position=','.join(values['model']['norm_position']))
    return build(values | {'model': {name: model[name] for name in model if name not in ('layer_index', 'depth')}})


def _build(cls, values, prefix, earlier):
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(values, dict):
        raise UsageError(f'{prefix} must be a group of keys, not {values!r}')
    for name in values:
        if name not in fields:
            raise UsageError(describe_unknown(f'{prefix}.{name}', name, name, fields))
    built = {}
    for name, field in fields.items():
        path, value = f'{prefix}.{name}', values.get(name, field.default)
        if dataclasses.is_dataclass(field.type):
            built[name] = _build(field.type, values.get(name, {}), path, getattr(earlier, name, None))
        elif takes_auto(field) and value == 'auto':
            built[name] = getattr(earlier, name, value)
        else:
            built[name] = _check(path, field, value)
    return cls(**built)


def takes_auto(field):
    """Whether the value of a key is a number or `auto`."""
    return field.type in (int, float) and field.default == 'auto'


def _as(kind, value):
    """A number as the type of its key where that has the same value, numpy's too; anything else as it is."""
    if kind not in (bool, int, float) or not isinstance(value, numbers.Real) or isinstance(value, bool):
        return value
    try:
        made = kind(value)
    except (OverflowError, ValueError):  # not finite, or beyond all floats
        return value
    return made if kind is float or made == value else value


def _check(path, field, value):
    value, secret = _as(field.type, value), field.metadata['secret']
    if type(value) is not field.type:
        wanted = 'a number or auto' if takes_auto(field) else f'of type {field.type.__name__}'
        raise UsageError(f'{path} must be {wanted}, not {type(value).__name__ if secret else repr(value)}')
    if field.type is float and not math.isfinite(value):
        raise UsageError(f'{path} must be a finite number, not {value}')
    choices = field.metadata['choices']
    if choices and value not in choices:
        raise UsageError(f'{path}={value!r} is not one of {", ".join(choices)}{nearest(value, choices)}')
    within = {
        'at least': lambda bound: value >= bound,
        'above': lambda bound: value > bound,
        'at most': lambda bound: value <= bound,
        'below': lambda bound: value < bound,
    }
    for name, bound in field.metadata['ranges'].items():
        if not within[name](bound):
            raise UsageError(f'{path} must be {name} {bound:g}, not {value!r}')
    return value


def _check_together(config):
    """Facts that concern more than one key."""
    model, optim = config.model, config.optim
    if not model.head_dim and model.hidden_size % model.num_heads:
        raise UsageError(
            f'config.model.hidden_size={model.hidden_size} does not divide by config.model.num_heads={model.num_heads}'
        )
    if model.head_size % 2:
        said = 'config.model.head_dim' if model.head_dim else 'config.model.hidden_size / num_heads'
        raise UsageError(f'the head size {model.head_size} ({said}) must be even for rotary positions')
    if model.num_heads % model.kv_heads:
        raise UsageError(
            f'config.model.num_heads={model.num_heads} does not divide by '
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
    if 0 < config.processes.stall < 1:
        raise UsageError(f'config.processes.stall={config.processes.stall:g} must be 0 or at least 1 second')
    if config.batch_size * config.seq_length >= 2**31:
        raise UsageError('config.batch_size times config.seq_length must be below 2^31 positions')
    if config.num_steps + model.ramp_start >= 2**31:
        raise UsageError('config.num_steps plus config.model.ramp_offset must be below 2^31')
    sizes = dataclasses.asdict(config.mesh)
    for name, size in sizes.items():
        if size == 0:
            raise UsageError(f'config.mesh.{name} must be -1 (all that are left) or a number of devices, not 0')
    if len(left := [f'config.mesh.{name}' for name, size in sizes.items() if size == -1]) > 1:
        raise UsageError(f'{" and ".join(left)} are both -1; one of them can take all devices that are left')


def public(config: Config) -> dict:
    """A Config as a dict to be written or shown, without the secret."""
    values = dataclasses.asdict(config)
    values['processes']['secret'] = ''
    return values


def flatten(config, prefix=''):
    """A Config (or the dict of one) as a flat dict, keys joined by dots."""
    if dataclasses.is_dataclass(config):
        config = dataclasses.asdict(config)
    flat = {}
    for name, value in config.items():
        flat.update(flatten(value, f'{prefix}{name}.') if isinstance(value, dict) else {prefix + name: value})
    return flat


def may_change() -> set[str]:
    """Returns the keys that may differ when a run continues, such as `eval.every`."""
    groups = {f'{field.name}.' for field in dataclasses.fields(Config) if field.metadata.get('may_change')}
    keys = [(path, field.metadata['may_change']) for path, field in all_fields(Config, '')]
    return {path for path, alone in keys if alone or f'{path.partition(".")[0]}.' in groups}


def same_weights() -> list[str]:
    """Returns the keys of `model` in which two networks must agree to have the same weights."""
    return [field.name for field in dataclasses.fields(Model) if field.metadata['weights']]


def all_fields(cls, prefix):
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from all_fields(field.type, f'{prefix}{field.name}.')
        else:
            yield prefix + field.name, field

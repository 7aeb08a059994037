"""Every key of a run: type, default, help, range, and whether it may change when a run continues.

The defaults are the Mix-LN paper's C4 recipe (arXiv 2412.13795, section 4.1), so a recipe states only what differs.
"""

import dataclasses
from typing import Any

LONGEST = 2**20  # tokens in a row; packing keeps 64 rows open
WORKERS = 1024
LARGEST_VOCABULARY = 2**24


def key(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    secret: bool = False,
    may_change: bool = False,
    weights: bool = False,
) -> Any:
    """Returns the dataclass field of a key.

    Args:
        default: its default value.
        help: its line in --help.
        choices: the values that it may have.
        at_least, above, at_most, below: the range of a number.
        secret: its value is never shown.
        may_change: its value may change when a run continues. With any other key another value means another run.
        weights: its value must be the same in two networks for them to use the same weights in the same way.
    """
    ranges = {'at least': at_least, 'above': above, 'at most': at_most, 'below': below}
    ranges = {name: bound for name, bound in ranges.items() if bound is not None}
    metadata = {'help': help, 'choices': choices, 'ranges': ranges, 'secret': secret}
    metadata |= {'may_change': may_change, 'weights': weights}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)


def group(cls: type, may_change: bool = False) -> Any:
    """Returns the field of a group of keys, `config.<group>.<key>`. `may_change`: all of them may change."""
    return dataclasses.field(default_factory=cls, metadata={'may_change': may_change})


@dataclasses.dataclass(frozen=True)
class Model:
    """The network. Names such as `hidden_size` are those of Hugging Face's LLaMA."""

    family: str = key('llama', 'architecture', choices=('llama', 'bert'), weights=True)
    vocab_size: int = key(32000, 'size of the vocabulary', at_least=2, at_most=LARGEST_VOCABULARY, weights=True)
    hidden_size: int = key(768, 'width D of the residual stream', at_least=1, at_most=2**18, weights=True)
    intermediate_size: int = key(2048, 'width of the MLP', at_least=1, at_most=2**20, weights=True)
    num_layers: int = key(12, 'number of layers L', at_least=1, at_most=10_000, weights=True)
    num_heads: int = key(12, 'number of query heads', at_least=1, weights=True)
    num_kv_heads: int = key(0, 'number of key and value heads; 0: as many as query heads', at_least=0)
    head_dim: int = key(0, 'features per head; 0: hidden_size / num_heads', at_least=0, at_most=2**16)
    attention_bias: bool = key(False, 'biases in the matrices of attention', weights=True)
    mlp_bias: bool = key(False, 'biases in the matrices of the MLP', weights=True)
    tie_word_embeddings: bool = key(False, 'use the transposed embedding as the head', weights=True)
    norm_position: str = key(
        'mix',
        'placement of the norms: a name for all layers, mix, or a list such as post*3,pre*9; +prores after a name, as '
        'in mix+prores, ramps up its sub-layers',
    )
    post_ratio: float = key(0.25, 'share of Post-LN layers under mix', at_least=0.0, at_most=1.0)
    ramp_steps: int = key(
        1000,
        '+prores: number of updates T after which layer 1 is ramped up; layer l is after T * l',
        at_least=1,
        at_most=100_000,
    )
    ramp_offset: int = key(
        'auto',
        '+prores: number of updates that the ramp has made before the first step; auto: those of the weights of '
        'init_from, else 0; a run that continues keeps its own',
        at_least=0,
        at_most=2**30,
    )
    norm_groups: int = key(4, 'groups of features in the norms of group_pre', at_least=1)
    norm_eps: float = key(1e-6, 'epsilon of the norms', above=0.0, weights=True)
    rope_theta: float = key(10000.0, 'base of the rotary angles', above=1.0, weights=True)
    rope_type: str = key(
        'default',
        'llama3: slow rotations are slowed further, as in Llama 3.1',
        choices=('default', 'llama3'),
        weights=True,
    )
    rope_factor: float = key(8.0, 'llama3: factor by which the slowest rotations are slowed', at_least=1.0)
    rope_low_freq_factor: float = key(
        1.0, 'llama3: rotations with fewer turns than this in rope_original_length tokens are the slowest', above=0.0
    )
    rope_high_freq_factor: float = key(
        4.0, 'llama3: rotations with more turns than this in rope_original_length tokens stay as they are', above=0.0
    )
    rope_original_length: int = key(8192, 'llama3: number of tokens over which turns are counted', at_least=1)
    num_positions: int = key(512, 'bert: rows of the table of positions', at_least=2, at_most=LONGEST, weights=True)
    num_types: int = key(2, 'bert: number of token types', at_least=1, at_most=2**16, weights=True)
    init: str = key(
        'auto',
        'initialisation: normal (init_std), scaled (attention and MLP outputs divided by sqrt(2L)), deepnorm, '
        'or auto (deepnorm in deepnorm layers, else normal)',
        choices=('auto', 'normal', 'scaled', 'deepnorm'),
    )
    init_std: float = key(0.02, 'standard deviation of the weights', above=0.0)
    scale_embed: bool = key(False, 'multiply embeddings by sqrt(D)', weights=True)
    embed_std: float = key(0.02, 'standard deviation of the embedding', above=0.0)
    remat: str = key(
        'none',
        'what the backward pass recomputes: nothing, all but the matrix products (dots), or the whole layer (full)',
        choices=('none', 'dots', 'full'),
        may_change=True,
    )
    scan_unroll: str = key(
        'auto',
        'layers unrolled in the compiled loop; all: slightly faster, but longer to compile, and remat has no effect; '
        'auto: all for up to 12 layers without remat, else 1',
        choices=('auto', '1', 'all'),
        may_change=True,
    )
    attention: str = key(
        'auto',
        "blocks: in blocks of queries; auto: cuDNN's kernel where possible (NVIDIA GPUs from Ampere on, bfloat16)",
        choices=('auto', 'blocks'),
        may_change=True,
    )

    @property
    def head_size(self) -> int:
        """Returns the features per head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def ramp_start(self) -> int:
        """Number of updates that the ramps have made before the first step."""
        return 0 if self.ramp_offset == 'auto' else self.ramp_offset

    @property
    def kv_heads(self) -> int:
        """Returns the number of key and value heads."""
        return self.num_kv_heads or self.num_heads


@dataclasses.dataclass(frozen=True)
class Task:
    """What the network learns."""

    name: str = key(
        'language',
        'language: predict the next token; masked_language: predict hidden tokens, as BERT does',
        choices=('language', 'masked_language'),
    )
    mask_rate: float = key(0.15, 'masked_language: share of the tokens that are hidden', above=0.0, at_most=1.0)
    mask_id: int = key(
        -1,
        'masked_language: id of the token that hides others; -1: the last one of config.model.vocab_size',
        at_least=-1,
        below=LARGEST_VOCABULARY,
    )


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
        'pad: one document per row, cut or padded; pack: several pieces of documents per row, each of which attends to '
        'itself alone; concat: documents end to end',
        choices=('pad', 'pack', 'concat'),
    )
    workers: int = key(
        0, 'processes that prepare batches; 0: threads of this process', at_least=0, at_most=WORKERS, may_change=True
    )
    seed: int = key(0, 'seed of the order of the rows', at_least=0, below=2**32)


# The published values of b1, b2 and eps, for `auto`. Each optimiser lists those that it has.
PUBLISHED = {
    'adam': {'b1': 0.9, 'b2': 0.999, 'eps': 1e-8},  # Kingma and Ba 2015, arXiv 1412.6980
    'adamw': {'b1': 0.9, 'b2': 0.999, 'eps': 1e-8},  # Loshchilov and Hutter 2019, arXiv 1711.05101
    'sgd': {'b1': 0.9},
    'lion': {'b1': 0.9, 'b2': 0.99},  # Chen et al. 2023, arXiv 2302.06675
    'adafactor': {},
    'muon': {'b1': 0.95, 'b2': 0.95, 'eps': 1e-8},  # Jordan et al. 2024; b2 and eps are AdamW's in Liu et al. 2025
    'galore': {'b1': 0.9, 'b2': 0.999, 'eps': 1e-6},  # Zhao et al. 2024, their code
}


def _published(name: str) -> str:
    """Returns, for --help, the values that `auto` stands for, such as '0.999 (lion 0.99)'."""
    adams = PUBLISHED['adam'][name]
    others = [f'{rule} {own[name]:g}' for rule, own in PUBLISHED.items() if own.get(name, adams) != adams]
    return f'auto: as published, {adams:g} ({", ".join(others)}); a run that continues keeps its own'


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimiser and its learning-rate schedule. `auto` in b1, b2 or eps is replaced by the published value."""

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
    ema: float = key(
        0.0,
        'decay of a running average of the weights; evaluation, analyses and exports use the average; 0: none',
        at_least=0.0,
        below=1.0,
    )
    clip_norm: float = key(0.0, 'largest global gradient norm; 0: no clipping', at_least=0.0)

    def __post_init__(self) -> None:
        for name, number in (PUBLISHED['adam'] | PUBLISHED.get(self.name, {})).items():
            if getattr(self, name) == 'auto':
                object.__setattr__(self, name, number)


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluation during training, and always after the last step."""

    every: int = key(1000, 'steps between evaluations; 0: only after the last step', at_least=0)
    tokens: int = key(10_000_000, 'least number of target tokens in an evaluation (or the whole split)', at_least=1)
    split: str = key('validation', 'split to evaluate on: train, validation, or what a tfds data set has')


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Checkpoints during training, and always after the last step and on a signal."""

    every: int = key(1000, 'steps between checkpoints; 0: only after the last step', at_least=0)
    keep: int = key(3, 'newest checkpoints to keep', at_least=1)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How devices share the work."""

    data: int = key(-1, 'copies of the model, each with a part of the batch; -1: as many as fit', at_least=-1)
    fsdp: int = key(
        1, 'devices that split the batch and each store a part of every matrix; -1: all that are left', at_least=-1
    )
    tensor: int = key(1, 'devices that split every matrix product; -1: all that are left', at_least=-1)


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes that train together; distributed/processes.py finds them."""

    timeout: float = key(300.0, 'seconds to wait for all processes at the start', above=0, at_most=1e6)
    secret: str = key(
        '',
        'known only to these processes, so that no stranger can join; never written or shown; empty: the variable '
        "MIXLN_JAX_SECRET, else the scheduler's name of the job",
        secret=True,
    )
    stall: float = key(
        900.0,
        'seconds without a batch before the stacks of all threads are printed; 0: never',
        at_least=0,
        at_most=1e6,
    )


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Measurements of each layer during training, and always after the last step; see analysis/during.py."""

    every: int = key(1000, 'steps between analyses; 0: only after the last step', at_least=0)
    tokens: int = key(16_384, 'tokens of the evaluation split that are analysed; 0: no analyses', at_least=0)


@dataclasses.dataclass(frozen=True)
class Profile:
    """A window of steps recorded by jax.profiler into the work directory."""

    start: int = key(10, 'first step of the window', at_least=1)
    steps: int = key(0, 'steps in the window; 0: no profile', at_least=0)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a paper reports about the run. The report shows it next to the results."""

    perplexity: float = key(0.0, 'perplexity that a paper reports; 0: none', at_least=0.0)
    tokens: float = key(0.0, 'tokens that the paper reports', at_least=0.0)
    source: str = key('', 'the paper, and the table in it')


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = key(0, "seed of the initial weights and of the task's random choices", at_least=0, below=2**32)
    batch_size: int = key(512, 'sequences in a batch, over all devices and accumulation', at_least=1, at_most=2**24)
    seq_length: int = key(256, 'tokens in a sequence T', at_least=2, at_most=LONGEST)
    num_steps: int = key(20_000, 'updates in the run', at_least=1, below=2**31)
    accumulate: int = key(1, 'micro-batches per batch', at_least=1, may_change=True)
    log_every: int = key(10, 'steps between progress lines', at_least=1, may_change=True)
    compute_dtype: str = key('bfloat16', 'type of activations', choices=('bfloat16', 'float32'))
    param_dtype: str = key('float32', 'type of weights and moments', choices=('float32', 'bfloat16'))
    device: str = key('auto', 'kind of device', choices=('auto', 'cpu', 'gpu', 'tpu'), may_change=True)
    deterministic: bool = key(False, 'bitwise reproducible on GPUs too, at some cost in speed')
    collapse: str = key(
        'warn',
        "when the loss stays near that of the tokens' frequencies alone, as it does in a collapsed Post-LN network: "
        'warn, stop (exit code 6) or ignore',
        choices=('warn', 'stop', 'ignore'),
    )
    compat: str = key(
        'none',
        "official: follow the Mix-LN authors' code where it differs (docs/official.md); official_float32: the same, "
        'without its bfloat16 weights and moments',
        choices=('none', 'official', 'official_float32'),
    )
    init_from: str = key(
        '', 'start from the weights of a run, a checkpoint, or hf:FOLDER; nothing else is read', may_change=True
    )
    resume_from: str = key(
        '',
        'continue a run or one of its checkpoints, with its whole state, in a new work directory',
        may_change=True,
    )
    model: Model = group(Model)
    task: Task = group(Task)
    data: Data = group(Data)
    optim: Optim = group(Optim)
    eval: Eval = group(Eval, may_change=True)
    checkpoint: Checkpoint = group(Checkpoint, may_change=True)
    mesh: Mesh = group(Mesh, may_change=True)
    processes: Processes = group(Processes, may_change=True)
    analysis: Analysis = group(Analysis, may_change=True)
    profile: Profile = group(Profile, may_change=True)
    expected: Expected = group(Expected, may_change=True)

"""Keys of a whole run: its length, evaluation, checkpoints and devices, and the groups of all other keys."""

import dataclasses

from mixln_jax.keys.data import Data, Task
from mixln_jax.keys.field import LONGEST, group, key
from mixln_jax.keys.model import Model
from mixln_jax.keys.optim import Optim
from mixln_jax.keys.tune import Tune


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluation during training, and always after the last step."""

    every: int = key(1000, 'steps between evaluations; 0: only after the last step', at_least=0)
    first: bool = key(False, 'evaluate the weights that the run begins with too, before the first update, as step 0')
    tokens: int = key(10_000_000, 'least number of target tokens in an evaluation (or the whole split)', at_least=1)
    split: str = key('validation', 'split to evaluate on: train, validation, or what a tfds data set has')
    samples: int = key(
        0,
        'examples of the split of which each evaluation writes a continuation into samples/<step>.jsonl',
        at_least=0,
        at_most=4096,
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Checkpoints during training, and always after the last step and on a signal."""

    every: int = key(1000, 'steps between checkpoints; 0: only after the last step', at_least=0)
    keep: int = key(3, 'newest checkpoints to keep', at_least=1)
    keep_every: int = key(
        0, 'checkpoints of every such step are kept for good, as milestones; a multiple of every; 0: none', at_least=0
    )
    minutes: float = key(
        0.0,
        'minutes after which a checkpoint is saved, looked at every log_every steps; 0: by steps alone',
        at_least=0.0,
        at_most=1e6,
    )
    best: str = key('', 'metric of the evaluation whose best checkpoint is saved and kept: eval/loss; empty: none')


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
class Stability:
    """Signs of a coming collapse, `stability/*` of the metrics lines; see analysis/stability.py."""

    every: int = key(
        100, 'steps between measurements of attention logits and log Z; 0: no stability/* at all', at_least=0
    )
    rows: int = key(2, 'rows of the batch that these are measured on, at least one for each part of it', at_least=1)


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
    accuracy: float = key(
        0.0, 'accuracy of a classification that a paper reports, as a share; 0: none', at_least=0.0, at_most=1.0
    )
    tasks: str = key('', 'accuracies of tasks that the paper reports, in per cent: boolq=56.12,piqa=66.34')
    source: str = key('', 'the paper, and the table in it')


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = key(0, "seed of the initial weights and of the task's random choices", at_least=0, below=2**32)
    batch_size: int = key(512, 'sequences in a batch, over all devices and accumulation', at_least=1, at_most=2**24)
    seq_length: int = key(256, 'tokens in a sequence T', at_least=2, at_most=LONGEST)
    num_steps: int = key(20_000, 'updates in the run; 0: as many as num_epochs says', at_least=0, below=2**31)
    num_epochs: float = key(
        0.0, 'passes over the training rows, in place of num_steps; 0: num_steps says it', at_least=0.0, at_most=1e6
    )
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
        '',
        'start from the weights of a run, a checkpoint, hf:FOLDER, or adapter:FOLDER (of PEFT, merged into its base); '
        'nothing else is read',
        may_change=True,
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
    tune: Tune = group(Tune)
    eval: Eval = group(Eval, may_change=True)
    checkpoint: Checkpoint = group(Checkpoint, may_change=True)
    mesh: Mesh = group(Mesh, may_change=True)
    processes: Processes = group(Processes, may_change=True)
    analysis: Analysis = group(Analysis, may_change=True)
    stability: Stability = group(Stability, may_change=True)
    profile: Profile = group(Profile, may_change=True)
    expected: Expected = group(Expected, may_change=True)

    @property
    def examples_per_step(self) -> int:
        """Examples that a step reads: rows of the batch, or the prompts that they answer."""
        return self.batch_size // (self.task.online.completions if self.task.name == 'online' else 1)

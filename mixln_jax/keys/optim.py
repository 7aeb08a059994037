"""Keys of the optimiser."""

import dataclasses

from mixln_jax.keys.field import key

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
    warmup_steps: int = key(
        0, 'steps that warm up, however long the run; 0: warmup_ratio of the steps', at_least=0, below=2**31
    )
    decay_ratio: float = key(0.2, 'share of the steps over which wsd decays', above=0.0, at_most=1.0)
    decay_steps: int = key(0, 'steps over which wsd decays; 0: decay_ratio of the steps', at_least=0, below=2**31)
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
    rate_factors: str = key(
        '',
        'factors of the learning rate (and weight decay) of some weights, PATTERN=FACTOR,...: a pattern matches names '
        'of weights (layers/*/attention/q/kernel) or placements of layers (post); the last match counts',
    )
    clip_norm: float = key(0.0, 'largest global gradient norm; 0: no clipping', at_least=0.0)

    def __post_init__(self) -> None:
        for name, number in (PUBLISHED['adam'] | PUBLISHED.get(self.name, {})).items():
            if getattr(self, name) == 'auto':
                object.__setattr__(self, name, number)

    def warmup(self, num_steps: int) -> int:
        """Returns the number of steps that warm up in a run of `num_steps`."""
        return self.warmup_steps or round(self.warmup_ratio * num_steps)

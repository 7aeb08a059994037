"""Keys of learning from pairs of answers."""

import dataclasses

from mixln_jax.keys.field import key


@dataclasses.dataclass(frozen=True)
class Preference:
    """preference: of two answers to a prompt the chosen one becomes likelier; see docs/preferences.md."""

    loss: str = key(
        'sigmoid',
        'preference: of the log-probability ratios of both answers to the reference; sigmoid: DPO (Rafailov et al. '
        '2023); ipo: squared error of the means over tokens (Azar et al. 2023); sigmoid_norm: DPO of these means',
        choices=('sigmoid', 'ipo', 'sigmoid_norm'),
    )
    beta: float = key(
        0.1, 'preference: how strongly the reference holds the network; it scales the reward', above=0.0, at_most=1e6
    )
    label_smoothing: float = key(
        0.0, 'preference: share of the pairs that may be the wrong way round', at_least=0.0, below=0.5
    )
    reference: str = key(
        'network',
        'preference: where the log-probabilities of the reference come from; network: from its weights, which the run '
        'keeps, in every step; precomputed: they are computed once, before the first step',
        choices=('network', 'precomputed'),
    )


@dataclasses.dataclass(frozen=True)
class Reward:
    """reward: a network learns to score texts, the chosen one of two answers higher; see docs/preferences.md."""

    centering: float = key(
        0.0,
        'reward: weight of the squared sum of both rewards of a pair, which keeps rewards near 0 (Eisenstein et al. '
        '2023); 0: none',
        at_least=0.0,
        at_most=1e6,
    )

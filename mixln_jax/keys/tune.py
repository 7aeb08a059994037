"""Keys of what is trained of the network."""

import dataclasses

from mixln_jax.keys.field import key

# The keys that have a meaning under one method or two alone; elsewhere they keep their default.
MEANT_FOR = {
    'rank': ('lora',),
    'alpha': ('lora',),
    'dropout': ('lora',),
    'matrices': ('lora',),
    'base_dtype': ('full', 'lora'),
    'train': ('full', 'lora'),
    'layers': ('lisa',),
    'interval': ('lisa',),
}


@dataclasses.dataclass(frozen=True)
class Tune:
    """What is trained of the network; see docs/finetune.md."""

    method: str = key(
        'full',
        'full: all weights; lora: adapters of low rank, added to the frozen matrices of init_from (Hu et al. 2022); '
        'lisa: the layers that are drawn every few steps, and all that is not a layer (Pan et al. 2024)',
        choices=('full', 'lora', 'lisa'),
    )
    train: str = key(
        '',
        'full, lora: weights to train, the others are frozen: names as --verbose lists them, or patterns such as '
        'head/* or layers/*/mlp/*, separated by commas; empty: all, under lora the adapters alone',
    )
    rank: int = key(8, 'lora: columns of A and rows of B', at_least=1)
    alpha: float = key(16.0, 'lora: an adapter adds x A B times alpha / rank', above=0.0)
    dropout: float = key(0.0, "lora: share of the adapters' input that is dropped in training", at_least=0.0, below=1.0)
    matrices: str = key(
        'all',
        'lora: matrices with an adapter: names such as attention/q or q, separated by commas; all: every matrix of '
        'attention and MLP',
    )
    base_dtype: str = key(
        'float32',
        'type of the frozen matrices and embeddings; the trained weights have config.param_dtype',
        choices=('float32', 'bfloat16'),
    )
    layers: int = key(2, 'lisa: layers that train at a time', at_least=1)
    interval: int = key(3, 'lisa: steps between draws of these layers', at_least=1)

"""Keys of learning from generated text."""

import dataclasses

from mixln_jax.keys.field import LONGEST, key


@dataclasses.dataclass(frozen=True)
class Online:
    """online: completions of prompts are sampled, scored and learned from; see docs/online.md."""

    reward: str = key(
        '', 'online: what scores completions: a function, module:function, or the folder of a reward network'
    )
    algorithm: str = key(
        'rloo',
        'online: what a reward is compared with; rloo: the mean of the other completions of the prompt (Ahmadian et '
        'al. 2024); grpo: the mean of all of them, in units of their standard deviation (Shao et al. 2024); remax: the '
        'reward of the likeliest completion (Li et al. 2023)',
        choices=('rloo', 'grpo', 'remax'),
    )
    completions: int = key(
        4, 'online: completions of each prompt, G; config.batch_size counts completions', at_least=1, at_most=2**16
    )
    max_new_tokens: int = key(64, 'online: tokens of a completion, at most', at_least=1, at_most=LONGEST)
    temperature: float = key(
        1.0, 'online: logits are divided by it, in sampling and in the loss', at_least=1e-3, at_most=1e3
    )
    beta: float = key(
        0.05, 'online: weight of the KL divergence from the reference network; 0: there is none', at_least=0.0
    )
    kl: str = key(
        'auto',
        'online: where the KL divergence counts: in the reward or in the loss; auto: in the loss under grpo, else in '
        'the reward',
        choices=('auto', 'reward', 'loss'),
    )
    clip: float = key(
        0.2, 'online: the ratio of new and old probability is clipped to 1 plus or minus this', above=0.0, below=1.0
    )
    updates: int = key(1, 'online: updates of the weights by the completions of a step', at_least=1, at_most=1024)

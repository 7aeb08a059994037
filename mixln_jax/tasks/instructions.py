"""Instructions: the next token of what the assistant says in a conversation."""

import dataclasses

from mixln_jax.tasks.language import Language


@dataclasses.dataclass(frozen=True)
class Instructions(Language):
    """Language modelling of conversations (data/instructions.py): the loss is the sum over the learned tokens, those of
    `loss_mask`, divided by their number in the whole batch."""

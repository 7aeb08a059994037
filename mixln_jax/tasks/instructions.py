"""Instructions: the next token of what the assistant says in a conversation."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mixln_jax import config as configs
from mixln_jax.models.network import Network
from mixln_jax.tasks.language import Language, check_answers
from mixln_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Instructions(Language):
    """Language modelling of conversations (data/instructions.py): the loss is the sum over the learned tokens, those of
    `loss_mask`, divided by their number in the whole batch."""

    @classmethod
    def from_config(cls, config: configs.Config, model: Network) -> Task:
        """Returns the task of a run. Raises UsageError if the network is not causal, or `compat` is set."""
        check_answers(config, model)
        return cls(model, config.data.mode, config.seq_length)

    def summary(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns what `Language.summary` does, without bits per byte: the bytes of what is learned are not counted."""
        return super().summary({name: total for name, total in totals.items() if name != 'num_bytes'})

"""Masked language modelling: some tokens of a text are hidden and predicted from both sides.

Devlin et al. 2019 (arXiv 1810.04805), section 3.1, Task 1.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.models.network import Network
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks.language import Language
from mixln_jax.tasks.task import EVALUATION, Batch, Context, Losses, Task, example_keys

HIDDEN, OTHER = 0.8, 0.1  # shares of the chosen tokens that become the mask and another token; the rest stays


@dataclasses.dataclass(frozen=True)
class MaskedLanguage(Language):
    """Predicts tokens that are hidden: `mask_rate` of the tokens of a text are chosen at random, anew in every epoch.

    80 % of them become the token `mask_id`, 10 % a random token, 10 % stay; only they count in the loss. The token that
    ends a document is never chosen, except in rows of mode concat.

    In an evaluation the choice depends on the example alone, so that networks are compared on the same tokens.
    """

    mask_rate: float = 0.15
    mask_id: int = -1  # -1: the last token of the vocabulary

    @classmethod
    def from_config(cls, config: configs.Config, model: Network) -> Task:
        """Returns the task of a run. Raises UsageError if the network is causal, `compat` is set, or the vocabulary has
        no token `mask_id`."""
        if model.causal:
            raise UsageError(
                f'config.task.name=masked_language needs a network that sees both sides, such as '
                f'config.model.family=bert, not {config.model.family}'
            )
        if config.compat != 'none':
            raise UsageError(
                f'config.compat={config.compat} has no meaning for config.task.name=masked_language: leave it at none'
            )
        size, mask_id = config.model.vocab_size, config.task.mask_id
        if mask_id >= size:
            raise UsageError(f'config.task.mask_id={mask_id} is not below config.model.vocab_size={size}')
        return cls(model, config.data.mode, config.seq_length, config.task.mask_rate, mask_id)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises UsageError if the mask is by default the last token of the vocabulary, and the tokenizer uses it."""
        last = self.model.config.vocab_size - 1
        if self.mask_id == -1 and tokenizer.vocab_size > last:
            raise UsageError(
                f'config.task.mask_id=-1 is id {last}, which texts use too: raise config.model.vocab_size to '
                f'at least {tokenizer.vocab_size + 1}, or give the id of the token that hides others'
            )

    def prepare(self, batch: Batch, key: jax.Array, train: bool) -> Batch:
        ids, may_be_chosen = batch['inputs'], batch['loss_mask'] > 0
        size = self.model.config.vocab_size
        mask_id = size - 1 if self.mask_id == -1 else self.mask_id

        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            choice, fate, other = jax.random.split(key, 3)
            uniform = lambda key: jax.random.uniform(key, ids.shape[1:])  # noqa: E731
            return uniform(choice), uniform(fate), jax.random.randint(other, ids.shape[1:], 0, size)

        choice, fate, other = jax.vmap(draw)(example_keys(key, batch))
        chosen = may_be_chosen & (choice < self.mask_rate)
        replaced = jnp.where(fate < HIDDEN, mask_id, jnp.where(fate < HIDDEN + OTHER, other, ids))
        return {
            **batch,
            'inputs': jnp.where(chosen, replaced, ids).astype(ids.dtype),
            'targets': ids,
            'loss_mask': chosen.astype(jnp.float32),
            'token_mask': _tokens(batch),
        }

    def losses(self, params: Any, batch: Batch, context: Context = EVALUATION) -> Losses:
        losses = super().losses(params, batch, context)
        return losses._replace(metrics={'tokens': self.position_mask(batch).sum()})

    def position_mask(self, batch: Mapping[str, Any]) -> Any:
        return batch['token_mask'] if 'token_mask' in batch else _tokens(batch)

    def summary(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        return super().summary({name: total for name, total in totals.items() if name != 'num_bytes'})

    def baseline(self, batches: Iterable[Mapping[str, np.ndarray]]) -> float | None:
        """Returns the entropy of the tokens in nats, of as many batches as it takes."""
        return super().baseline({**batch, 'targets': batch['inputs']} for batch in batches)


def _tokens(batch: Mapping[str, Any]) -> Any:
    """Returns [B,T] float32: 1 at tokens of a text and at ends of documents, which have a target or are one."""
    target = batch['loss_mask']
    array = np if isinstance(target, np.ndarray) else jnp
    return array.maximum(target, array.pad(target[:, :-1], ((0, 0), (1, 0))))

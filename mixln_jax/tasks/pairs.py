"""What tasks that learn from pairs of answers (data/pairs.py) have in common.

Shapes: B rows, T positions, P pairs in a row at most. A row has 2 P texts: text 2p is the chosen one of pair p, text
2p+1 the rejected one.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.data import pairs
from mixln_jax.models.network import Network
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks.language import Language, check_answers
from mixln_jax.tasks.task import Batch, Losses


@dataclasses.dataclass(frozen=True)
class OfPairs(Language):
    """A task whose examples are pairs: losses and records are sums over pairs, divided by their number."""

    per_row: int = 1  # P

    headline: ClassVar[str] = 'accuracy'
    label: ClassVar[str] = 'accuracy'
    lower: ClassVar[tuple[str, ...]] = ('loss', 'kl')
    digits: ClassVar[int] = 4
    headline_of_loss: ClassVar[None] = None

    def baseline(self, batches: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Returns None: pairs have no frequencies."""

    def summary(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        count = max(totals['weight'], 1e-9)
        return {'loss': totals['sum'] / count} | {
            name: totals[name] / count for name in self.metrics if name != 'tokens'
        }

    def text_sums(self, values: jax.Array, batch: Batch) -> jax.Array:
        """Returns the sums [B, 2P] over each text of values [B, T]."""
        numbers = jnp.arange(1, 2 * self.per_row + 1)  # 0: padding
        inside = batch['segment_ids'][..., None] == numbers  # no scatter, whose order of sums is chance on a GPU
        return jnp.where(inside, values[..., None], 0).sum(1)

    def losses_of_pairs(
        self, losses: jax.Array, lengths: jax.Array, batch: Batch, metrics: Mapping[str, jax.Array]
    ) -> Losses:
        """Returns the Losses of pairs [B, P], where each of their two texts has a target that counts.

        Args:
            losses: [B, P].
            lengths: targets that count in each text, [B, 2P].
            batch: the batch.
            metrics: values [B, P] by name, to be summed over pairs.
        """
        real = (lengths.reshape(*losses.shape, 2).min(-1) > 0).astype(jnp.float32)
        total = lambda values: jnp.where(real > 0, values, 0)  # noqa: E731
        sums = {name: total(values).sum() for name, values in metrics.items()} | {'tokens': batch['loss_mask'].sum()}
        rows = total(losses).sum(-1)
        return Losses(rows.sum(), real.sum(), rows, real.sum(-1), jax.lax.stop_gradient(sums))


def check(config: configs.Config, model: Network) -> None:
    """Raises UsageError, naming the key, where a network cannot learn to answer, or rows are too short for a pair."""
    check_answers(config, model)
    if config.seq_length < pairs.SHORTEST:
        raise UsageError(f'config.seq_length={config.seq_length} is too short for a pair: at least {pairs.SHORTEST}')


def sides(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns values of texts [B, 2P] as those of chosen and of rejected ones, [B, P] each."""
    return values[:, ::2], values[:, 1::2]

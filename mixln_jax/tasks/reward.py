"""Reward models: a network scores texts, of two answers to a prompt the chosen one higher (Bradley and Terry 1952).

Symbols: the reward r of a text, what the head gives at the text's last token; r_c and r_r of the chosen and the
rejected one of a pair, with the margin m that the record states, or 0.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.data import pairs
from mixln_jax.models.network import Network
from mixln_jax.tasks.pairs import OfPairs, check, sides
from mixln_jax.tasks.task import EVALUATION, Batch, Context, Losses, Task


@dataclasses.dataclass(frozen=True)
class Reward(OfPairs):
    """Learns a reward from pairs; see `pair_losses`.

    Of the records, `margin` is r_c - r_r, `accuracy` the share of pairs in which it is positive, `reward` the mean over
    all texts and `reward_std` their standard deviation.
    """

    reward: configs.Reward = dataclasses.field(default_factory=configs.Reward)

    lower: ClassVar[tuple[str, ...]] = ('loss',)
    metrics: ClassVar[tuple[str, ...]] = ('tokens', 'accuracy', 'margin', 'reward', 'reward_squared')

    @classmethod
    def from_config(cls, config: configs.Config, model: Network) -> Task:
        """Returns the task of a run. Raises UsageError if the network is not causal, `compat` is set, or rows are too
        short."""
        check(config, model)
        per_row = pairs.num_pairs(config.data.mode, config.seq_length)
        return cls(model, 'pack', config.seq_length, per_row, config.task.reward)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        margins = jax.ShapeDtypeStruct((batch_size, self.per_row), np.float32)
        return super().batch_spec(batch_size) | {'margin': margins}

    def rewards(self, params: Any, batch: Batch, context: Context = EVALUATION) -> jax.Array:
        """Returns the reward of each text, [B, 2P]; 0 where there is none."""
        variables = {'params': params, **context.collections}
        outputs, _ = self.model.apply(variables, batch, context.layer_mask, step=context.step)
        return self.text_sums(outputs[..., 0] * last_tokens(batch['segment_ids']), batch)

    def losses(self, params: Any, batch: Batch, context: Context = EVALUATION) -> Losses:
        chosen, rejected = sides(self.rewards(params, batch, context))
        losses = pair_losses(chosen, rejected, batch['margin'], self.reward.centering)
        metrics = {
            'accuracy': (chosen > rejected).astype(jnp.float32),
            'margin': chosen - rejected,
            'reward': (chosen + rejected) / 2,
            'reward_squared': (jnp.square(chosen) + jnp.square(rejected)) / 2,
        }
        return self.losses_of_pairs(losses, self.text_sums(batch['loss_mask'], batch), batch, metrics)

    def summary(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        values: dict[str, Any] = super().summary(totals)
        variance = values.pop('reward_squared') - values['reward'] ** 2
        return values | {'reward_std': max(variance, 0) ** 0.5}


def pair_losses(chosen: jax.Array, rejected: jax.Array, margins: Any = 0.0, centering: float = 0.0) -> jax.Array:
    """Returns the loss of each pair, -log s(r_c - r_r - m) + c (r_c + r_r)^2 with the logistic function s.

    Ouyang et al. 2022 (arXiv 2203.02155), equation 1; Touvron et al. 2023 (Llama 2, arXiv 2307.09288), equation 2, for
    m; Eisenstein et al. 2023 (arXiv 2312.09244), section 2, for c.

    Args:
        chosen, rejected: r_c and r_r.
        margins: m.
        centering: c.
    """
    losses = -jax.nn.log_sigmoid(chosen - rejected - margins)
    return losses + centering * jnp.square(chosen + rejected) if centering else losses


def last_tokens(segment_ids: jax.Array) -> jax.Array:
    """Returns [B, T] float32: 1 at the last token of each text; `segment_ids` are 0 at padding."""
    after = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return ((segment_ids != after) & (segment_ids > 0)).astype(jnp.float32)

"""Preferences: of two answers to a prompt the chosen one becomes likelier than the rejected one, relative to a
reference network (direct preference optimisation).

Symbols: x a prompt, y_c and y_r the chosen and the rejected answer, of n_c and n_r tokens that count; the log-ratio of
an answer d(y) = log p(y | x) - log p_ref(y | x), in nats.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.data import pairs
from mixln_jax.kernels import cross_entropy
from mixln_jax.models.network import Network
from mixln_jax.tasks.pairs import OfPairs, check, sides
from mixln_jax.tasks.task import EVALUATION, Batch, Context, Losses, Task


@dataclasses.dataclass(frozen=True)
class Preference(OfPairs):
    """Direct preference optimisation and its relatives; see `pair_losses`.

    Of the records, `margin` is beta (d(y_c) - d(y_r)), `accuracy` the share of pairs in which it is positive, and `kl`
    the sum of d^2 / 2 over the tokens of an answer, which near the reference is their KL divergence (Schulman 2020,
    Approximating KL Divergence, k2), averaged over both answers.

    Where there is no reference network, as in analyses, d(y) = log p(y | x).
    """

    preference: configs.Preference = dataclasses.field(default_factory=configs.Preference)

    metrics: ClassVar[tuple[str, ...]] = (
        'tokens', 'accuracy', 'margin', 'chosen_log_prob', 'rejected_log_prob', 'kl',
    )  # fmt: skip

    @classmethod
    def from_config(cls, config: configs.Config, model: Network) -> Task:
        """Returns the task of a run. Raises UsageError if the network is not causal, `compat` is set, or rows are too
        short."""
        check(config, model)
        per_row = pairs.num_pairs(config.data.mode, config.seq_length)
        return cls(model, 'pack', config.seq_length, per_row, config.task.preference)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on a reference network."""
        return self.preference.reference == 'network'

    @property
    def precomputed(self) -> bool:
        """Whether batches bring the reference's log-probabilities."""
        return self.preference.reference == 'precomputed'

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        spec = super().batch_spec(batch_size)
        if self.precomputed:
            spec[pairs.REFERENCE] = jax.ShapeDtypeStruct((batch_size, self.seq_length), np.float32)
        return spec

    def log_probs(self, params: object, batch: Batch, context: Context = EVALUATION) -> jax.Array:
        """Returns the log-probability [B, T] of each token of the answers, in nats; 0 at others."""
        variables = {'params': params, **context.collections}
        x, _ = self.model.apply(variables, batch, context.layer_mask, step=context.step, method='backbone')
        mesh = self.model.stream_sharding and self.model.stream_sharding.mesh
        size = self.model.config.vocab_size
        tokens = cross_entropy.token_log_probs(x, self.model.head_kernel(params), batch['targets'], size, mesh=mesh)
        return tokens.log_probs * batch['loss_mask']

    def losses(self, params: object, batch: Batch, context: Context = EVALUATION) -> Losses:
        own = self.log_probs(params, batch, context)
        lengths = self.text_sums(batch['loss_mask'], batch)
        ratios = own - self._reference(batch, context)
        chosen, rejected = sides(self.text_sums(ratios, batch))
        likelihoods, squares = (sides(self.text_sums(values, batch)) for values in (own, jnp.square(ratios)))
        losses = pair_losses(chosen, rejected, *sides(lengths), self.preference)
        margin = self.preference.beta * (chosen - rejected)
        metrics = {
            'accuracy': (margin > 0).astype(jnp.float32),
            'margin': margin,
            'chosen_log_prob': likelihoods[0],
            'rejected_log_prob': likelihoods[1],
            'kl': (squares[0] + squares[1]) / 4,
        }
        return self.losses_of_pairs(losses, lengths, batch, metrics)

    def _reference(self, batch: Batch, context: Context) -> jax.Array:
        """Returns what `log_probs` does, of the reference; 0 where there is none."""
        if self.precomputed:
            return batch[pairs.REFERENCE] * batch['loss_mask']
        if context.reference is None:
            assert not context.train, 'training has a reference'
            return jnp.zeros(batch['targets'].shape)
        return jax.lax.stop_gradient(self.log_probs(context.reference, batch, context.of_reference))


def pair_losses(
    chosen: jax.Array, rejected: jax.Array, num_chosen: jax.Array, num_rejected: jax.Array, keys: configs.Preference
) -> jax.Array:
    """Returns the loss of each pair, with s the logistic function, beta and the label smoothing e of `keys`:

        sigmoid       -(1 - e) log s(beta (d(y_c) - d(y_r))) - e log s(-beta (d(y_c) - d(y_r)))
        sigmoid_norm  the same of d(y_c) / n_c - d(y_r) / n_r
        ipo           (d(y_c) / n_c - d(y_r) / n_r - 1 / (2 beta))^2

    Rafailov et al. 2023 (DPO, arXiv 2305.18290), equation 7, with the smoothing of Mitchell 2023 (cDPO); Azar et al.
    2023 (IPO, arXiv 2310.12036), equation 17, with the means over tokens that its authors use.

    Args:
        chosen, rejected: d(y_c) and d(y_r), [B, P].
        num_chosen, num_rejected: n_c and n_r, [B, P]; 0 where there is no pair.
        keys: config.task.preference.
    """
    if keys.loss != 'sigmoid':
        chosen, rejected = chosen / jnp.maximum(num_chosen, 1), rejected / jnp.maximum(num_rejected, 1)
    difference = chosen - rejected
    if keys.loss == 'ipo':
        return jnp.square(difference - 1 / (2 * keys.beta))
    logits = keys.beta * difference
    smoothing = keys.label_smoothing
    return -(1 - smoothing) * jax.nn.log_sigmoid(logits) - smoothing * jax.nn.log_sigmoid(-logits)

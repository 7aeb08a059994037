"""Learning from generated text: completions of prompts are sampled, scored and made likelier the better they are."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.data import batches
from mixln_jax.kernels import cross_entropy
from mixln_jax.kernels.cross_entropy import TokenLogProbs
from mixln_jax.models.network import Network
from mixln_jax.tasks import policy
from mixln_jax.tasks.language import Language, check_answers
from mixln_jax.tasks.task import EVALUATION, Batch, Context, Losses, Task


@dataclasses.dataclass(frozen=True)
class Rollout:
    """A completion of a prompt with its reward.

    Attributes:
        prompt, completion: token ids; `completion` has at least one.
        reward: of the completion.
        baseline: the reward of the likeliest completion of the prompt; 0 where nothing needs it.
        ended: whether an end token is the last of the completion.
        place: see batches.py; completions of one prompt have places of their own.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    reward: float
    baseline: float
    ended: bool
    place: int


@dataclasses.dataclass(frozen=True)
class Online(Language):
    """Learns from completions that the network samples itself, by their rewards (tasks/policy.py).

    A row is a prompt with a completion, whose tokens are the targets that count. `collect` makes the rows of a step;
    `recorded` and `with_advantages` add to them what stays the same in the `online.updates` updates of the step.

    Rows without rewards are prompts alone, on which analyses measure: their loss is that of language modelling.
    """

    online: configs.Online = dataclasses.field(default_factory=configs.Online)

    headline: ClassVar[str] = 'reward'
    label: ClassVar[str] = 'reward'
    lower: ClassVar[tuple[str, ...]] = ('loss', 'kl')
    digits: ClassVar[int] = 3
    headline_of_loss: ClassVar[None] = None
    metrics: ClassVar[tuple[str, ...]] = (
        'tokens', 'completions', 'reward', 'reward_squared', 'kl', 'entropy', 'ended', 'clipped',
    )  # fmt: skip

    @classmethod
    def from_config(cls, config: configs.Config, model: Network) -> Task:
        """Returns the task of a run. Raises UsageError if the network is not causal, or `compat` is set."""
        check_answers(config, model)
        return cls(model, 'pad', config.seq_length, config.task.online)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on a reference network."""
        return self.online.beta > 0

    @property
    def updates(self) -> int:
        return self.online.updates

    @property
    def forward_passes(self) -> dict[str, float]:
        """See Task. In sampling prefill and decoding see each position once; at most, as most rows are shorter."""
        greedy = 1 / self.online.completions if self.online.algorithm == 'remax' else 0
        return {'sampling': 1.0 + greedy, 'log-probabilities': 1.0} | super().forward_passes

    @property
    def objective(self) -> policy.Objective:
        """What the algorithm optimises, with the place of the KL divergence that the keys choose."""
        objective = policy.OBJECTIVES[self.online.algorithm]
        return objective if self.online.kl == 'auto' else objective._replace(kl=self.online.kl)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        number = jax.ShapeDtypeStruct((batch_size,), np.float32)
        return super().batch_spec(batch_size) | {'reward': number, 'baseline': number, 'ended': number}

    def collect(self, rollouts: Sequence[Rollout], size: int) -> dict[str, np.ndarray]:
        """Returns rollouts as the arrays of `batch_spec(size)`, on the host; rows that fill up have masks of 0."""
        shape, rows = (size, self.seq_length + 1), len(rollouts)
        ids, learned = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        for row, one in enumerate(rollouts):
            start, end = len(one.prompt), len(one.prompt) + len(one.completion)
            ids[row, :end] = [*one.prompt, *one.completion]
            learned[row, start:end] = 1
        numbers = np.zeros((3, size), np.float32)
        numbers[:, :rows] = np.array([(one.reward, one.baseline, one.ended) for one in rollouts]).reshape(-1, 3).T
        places = np.zeros(size, np.int64)
        places[:rows] = [one.place for one in rollouts]
        return {
            'inputs': ids[:, :-1],
            'targets': ids[:, 1:],
            'loss_mask': learned[:, 1:],
            **dict(zip(('reward', 'baseline', 'ended'), numbers, strict=True)),
            **batches.marks(places, np.arange(size) < rows),
        }

    def log_probs(
        self, params: Any, batch: Batch, context: Context = EVALUATION, entropy: bool = False
    ) -> TokenLogProbs:
        """Returns the log-probability [B, T] of each target at `online.temperature`, and the entropies on request."""
        variables = {'params': params, **context.collections}
        x, _ = self.model.apply(variables, batch, context.layer_mask, step=context.step, method='backbone')
        if self.online.temperature != 1:
            x = x / self.online.temperature  # the head is linear
        mesh = self.model.stream_sharding and self.model.stream_sharding.mesh
        size = self.model.config.vocab_size
        return cross_entropy.token_log_probs(
            x, self.model.head_kernel(params), batch['targets'], size, mesh=mesh, entropy=entropy
        )

    def recorded(self, params: Any, batch: Batch, context: Context) -> Batch:
        """Returns a batch with `old_log_probs` and, of a reference network, `reference_log_probs` [B, T]."""
        found = {'old_log_probs': self.log_probs(params, batch, context).log_probs}
        if self.needs_reference:
            found['reference_log_probs'] = self._of_reference(batch, context)
        return {**batch, **jax.lax.stop_gradient(found)}

    def _of_reference(self, batch: Batch, context: Context) -> jax.Array:
        return self.log_probs(context.reference, batch, context.of_reference).log_probs

    def with_advantages(self, batch: Batch) -> Batch:
        """Returns a recorded batch, all of it, with `advantage` [B]."""
        rewards, objective = batch['reward'], self.objective
        if self.needs_reference and objective.kl == 'reward':
            divergence = (batch['old_log_probs'] - batch['reference_log_probs']) * batch['loss_mask']
            rewards = rewards - self.online.beta * divergence.sum(-1)
        by_prompt = lambda values: values.reshape(-1, self.online.completions)  # noqa: E731
        return {
            **batch,
            'advantage': objective.advantages(by_prompt(rewards), by_prompt(batch['baseline'])).reshape(-1),
        }

    def losses(self, params: Any, batch: Batch, context: Context = EVALUATION) -> Losses:
        if 'reward' not in batch:
            return super().losses(params, batch, context)
        found, mask = self.log_probs(params, batch, context, entropy=True), batch['loss_mask']
        assert found.entropy is not None, 'they are asked for'
        real = mask.max(-1)
        divergences = jnp.zeros_like(mask)
        if self.needs_reference:
            reference = batch['reference_log_probs'] if context.train else self._of_reference(batch, context)
            divergences = policy.kl_estimates(found.log_probs, jax.lax.stop_gradient(reference)) * mask
        if context.train:
            losses, weights, clipped = self._surrogate(found.log_probs, batch, divergences)
        else:
            losses = (self.online.beta * divergences.sum(-1) - batch['reward']) * real
            weights, clipped = real, jnp.zeros_like(real)
        metrics = {
            'tokens': mask.sum(),
            'completions': real.sum(),
            'reward': (batch['reward'] * real).sum(),
            'reward_squared': (batch['reward'] ** 2 * real).sum(),
            'kl': divergences.sum(),
            'entropy': (found.entropy * mask).sum(),
            'ended': (batch['ended'] * real).sum(),
            'clipped': clipped.sum(),
        }
        return Losses(losses.sum(), weights.sum(), losses, weights, jax.lax.stop_gradient(metrics))

    def _surrogate(
        self, log_probs: jax.Array, batch: Batch, divergences: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the losses of rows [B], what they are divided by [B], and the share of each that is clipped [B]."""
        per, mask = self.objective.per, batch['loss_mask']
        ratios = policy.log_ratios(log_probs, batch['old_log_probs'], mask, per)
        losses, clipped = policy.clipped_losses(ratios, batch['advantage'], self.online.clip)
        counted = mask if per == 'tokens' else mask.max(-1, keepdims=True)
        total = (losses * counted).sum(-1)
        if self.objective.kl == 'loss':
            total = total + self.online.beta * divergences.sum(-1)
        lengths = jnp.maximum(counted.sum(-1), 1)
        return total, counted.sum(-1), (clipped * counted).sum(-1) / lengths

    def summary(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        count, tokens = (max(totals[name], 1e-9) for name in ('completions', 'tokens'))
        reward = totals['reward'] / count
        return {
            'loss': totals['sum'] / totals['weight'],
            'reward': reward,
            'reward_std': max(totals['reward_squared'] / count - reward**2, 0) ** 0.5,
            'kl': totals['kl'] / count if self.needs_reference else None,
            'entropy': totals['entropy'] / tokens,
            'length': totals['tokens'] / count,
            'ended': totals['ended'] / count,
            'clipped': totals['clipped'] / count,
        }

    def baseline(self, batches: Any) -> None:
        """Returns None: rewards are no frequencies."""

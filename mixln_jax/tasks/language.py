"""Language modelling: the next token of every real token."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mixln_jax import config as configs
from mixln_jax.data import batches, layout
from mixln_jax.kernels import cross_entropy
from mixln_jax.models.network import Network
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks.task import EVALUATION, Batch, Context, Losses, Task

ENOUGH = 500_000  # tokens, for their frequencies


def check_answers(config: configs.Config, model: Network) -> None:
    """Raises UsageError, naming the key, where a network cannot learn to answer: it has to predict the next token, and
    `compat` has no meaning."""
    name = config.task.name
    if not model.causal:
        raise UsageError(
            f'config.task.name={name} needs a network that predicts the next token, such as '
            f'config.model.family=llama, not {config.model.family}'
        )
    if config.compat != 'none':
        raise UsageError(f'config.compat={config.compat} has no meaning for config.task.name={name}: leave it at none')


@dataclasses.dataclass(frozen=True)
class Language(Task):
    """Next-token prediction: the sum of the tokens' losses over their number, on every path.

    `mode` and `seq_length` say how rows are made; see data/layout.py.
    """

    mode: str = 'pad'
    seq_length: int = 2

    headline: ClassVar[str] = 'perplexity'
    label: ClassVar[str] = 'ppl'
    digits: ClassVar[int] = 2
    lower: ClassVar[tuple[str, ...]] = 'loss', 'perplexity', 'bits_per_byte', 'perplexity_official'
    headline_of_loss: ClassVar[tuple[Callable[[Any], Any], Callable[[Any], Any]] | None] = (np.exp, np.exp)

    @classmethod
    def from_config(cls, config: configs.Config, model: Network) -> Task:
        """Returns the task of a run. Raises UsageError if the network sees the tokens that it has to predict."""
        if not model.causal:
            raise UsageError(
                f'config.model.family={config.model.family} attends to both sides, so it would see the token that it '
                'has to predict: use config.task.name=masked_language'
            )
        kind = cls if config.compat == 'none' else OfficialLanguage
        return kind(model, config.data.mode, config.seq_length)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        rows = layout.Layout(self.mode, 0, 0)
        batch = rows.batch(rows.block(np.zeros((batch_size, self.seq_length + 1), layout.TOKEN)))
        batch |= batches.marks(np.arange(batch_size), np.ones(batch_size, bool))
        return {name: jax.ShapeDtypeStruct(values.shape, values.dtype) for name, values in batch.items()}

    def position_mask(self, batch: Mapping[str, Any]) -> Any:
        return batch['loss_mask']

    def losses(self, params: Any, batch: Batch, context: Context = EVALUATION) -> Losses:
        model = self.model
        variables = {'params': self._read(params), **context.collections}
        x, _ = model.apply(variables, batch, context.layer_mask, step=context.step, method='backbone')
        mesh = model.stream_sharding and model.stream_sharding.mesh
        total, count, aux = cross_entropy.token_losses(
            x, model.head_kernel(params), batch['targets'], batch['loss_mask'], model.config.vocab_size, mesh=mesh
        )
        return Losses(total, count, aux['token_loss'].sum(-1), batch['loss_mask'].sum(-1), {'tokens': count})

    def _read(self, params: Any) -> Any:
        """Returns the parameters as the network reads them."""
        return params

    def summary(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        loss = totals['sum'] / totals['weight']
        values: dict[str, float | None] = {'loss': loss, 'perplexity': perplexity(loss)}
        if 'num_bytes' in totals:
            num_bytes = totals['num_bytes']
            values['bits_per_byte'] = totals['sum'] / math.log(2) / num_bytes if num_bytes else None
        return values

    def baseline(self, batches: Iterable[Mapping[str, np.ndarray]]) -> float | None:
        """Returns the entropy of the targets in nats, of as many batches as it takes."""
        counts = np.zeros(self.model.config.vocab_size)
        for batch in batches:
            counts += np.bincount(batch['targets'][batch['loss_mask'] > 0], minlength=len(counts))
            if counts.sum() > ENOUGH:
                break
        return unigram_entropy(counts)


class OfficialLanguage(Language):
    """Language modelling as the Mix-LN authors' code has it (docs/official.md): the training loss is the mean of the
    micro-batches' means, the embedding's last row is zero and stays so (torch's padding_idx of -1), and the evaluation
    reports their perplexity too."""

    def initial(self, params: Any) -> Any:
        return self._with_last_row(params, jnp.zeros_like)

    def losses(self, params: Any, batch: Batch, context: Context = EVALUATION) -> Losses:
        losses = super().losses(params, batch, context)
        mean = losses.sum / jnp.maximum(losses.weight, 1)
        if context.train:
            return losses._replace(sum=mean, weight=jnp.float32(1))
        counted = {'batch_means': mean, 'batches': (losses.weight > 0).astype(jnp.float32)}
        return losses._replace(metrics=losses.metrics | counted)

    def _read(self, params: Any) -> Any:
        return self._with_last_row(params, jax.lax.stop_gradient)

    def _with_last_row(self, params: Any, change: Callable[[jax.Array], jax.Array]) -> Any:
        table, row = params['embed']['embedding'], self.model.config.vocab_size - 1
        return params | {'embed': {'embedding': table.at[row].set(change(table[row]))}}

    def summary(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        values = super().summary(totals)
        if 'batches' in totals:  # their count starts at one (torchrun_main.py, evaluate_model), so this is too low
            values['perplexity_official'] = perplexity(totals['batch_means'] / (totals['batches'] + 1))
        return values


def perplexity(loss: float) -> float:
    """Returns exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 709 else math.inf


def unigram_entropy(counts: np.ndarray) -> float:
    """Returns the entropy in nats of the tokens that were counted: the loss of a network that knows their frequencies
    alone.

    With Miller and Madow's correction for a small sample (Miller 1955): + (tokens seen at all - 1) / 2N.
    """
    counts = np.asarray(counts, np.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() + (len(share) - 1) / (2 * counts.sum()))

"""What the training kernels do not show of a forward pass, measured on a few rows of a batch."""

from typing import Any

import jax
import jax.numpy as jnp

from mixln_jax.kernels import cross_entropy
from mixln_jax.models import transformer
from mixln_jax.models.layers import LOGITS
from mixln_jax.program.step import step_key
from mixln_jax.tasks.task import Batch, Task


def probe(network: Any, batch: Batch, step: jax.Array, *, task: Task, seed: int, rows: int) -> dict[str, jax.Array]:
    """Returns `attention_logits` [L], the largest absolute attention logit of each layer, and of networks that predict
    tokens `log_z`, the mean of log Z over real tokens, in nats: the log-normaliser of the output distribution.

    Args:
        network: all weights.
        batch: of the update that led to them, arrays [B, ...].
        step: updates done.
        task: of the run.
        seed: as of `step.train_step`.
        rows: number of rows that are measured, at most B; the mesh divides it.
    """
    model, stride = task.model, len(batch['place']) // rows
    part = jax.tree.map(lambda array: array[: rows * stride : stride], batch)
    part = task.prepare(part, step_key(seed, step - 1), True)
    (x, _), made = model.apply(
        {'params': network}, part, step=transformer.needed_step(model, step), method='backbone', mutable=[LOGITS]
    )
    stack = made[LOGITS]['layers']
    largest = [stack[f'segment_{number}']['attention']['largest'] for number in range(len(stack))]
    measured = {'attention_logits': jnp.concatenate(largest)}
    if model.predicts_tokens:
        mesh, mask = model.stream_sharding and model.stream_sharding.mesh, task.position_mask(part)
        labels, size = jnp.zeros(mask.shape, jnp.int32), model.config.vocab_size
        head = model.head_kernel(network)
        log_z = cross_entropy.token_log_probs(x, head, labels, size, mesh=mesh, log_normalizer=True).log_normalizer
        measured['log_z'] = (log_z * mask).sum() / jnp.maximum(mask.sum(), 1)
    return measured

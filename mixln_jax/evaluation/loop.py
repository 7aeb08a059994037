"""Evaluation on text."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mixln_jax import config as configs
from mixln_jax.data import batches
from mixln_jax.data import rows as data_rows
from mixln_jax.distributed import mesh as meshes
from mixln_jax.evaluation import references
from mixln_jax.evaluation.classes import Confusions
from mixln_jax.evaluation.rollouts import completed, open_rollouts
from mixln_jax.models import transformer
from mixln_jax.program.program import Program
from mixln_jax.runs import frozen, weights
from mixln_jax.system.errors import DataError, NumericsError, UsageError
from mixln_jax.tasks.classification import Classification
from mixln_jax.tasks.task import Task


def evaluate(
    eval_step: Callable[[Any, Mapping[str, jax.Array]], Mapping[str, jax.Array]],
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    task: Task,
    at_a_time: int,
    num_tokens: int,
    sharding: jax.sharding.Sharding,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float | None]:
    """Evaluates on batches until at least `num_tokens` target tokens have been seen or the batches end.

    Args:
        eval_step: (params, batch) -> sums, compiled, at the step of the weights; see program/step.py.
        params: the weights.
        batches: dicts of numpy arrays [B,T], the same in every process, with `num_bytes` [B] where the text's bytes
            are known; see `batches.evaluation`.
        task: what the sums are of.
        at_a_time: batches between looks at `num_tokens`, so that smaller batches see the same text.
        num_tokens: when to stop.
        sharding: of the batches' arrays on devices.
        check: called before each batch; may raise to stop early.

    Returns:
        What the task's `summary` gives and `tokens`, each name with `eval/` before it.
    """
    sums, tokens = [], 0
    num_bytes: int | None = 0
    for batch in batches:
        check()
        if num_bytes is not None:
            num_bytes = num_bytes + int(batch['num_bytes'].sum()) if 'num_bytes' in batch else None
        batch = {name: values for name, values in batch.items() if name != 'num_bytes'}
        sums.append(eval_step(params, meshes.to_devices(batch, sharding)))
        tokens += int(task.position_mask(batch).sum())
        if len(sums) > 1:
            sums[-2] = jax.device_get(sums[-2])  # the batch before: keeps the device busy and its queue short
        if tokens >= num_tokens and len(sums) % at_a_time == 0:
            break
    sums = jax.device_get(sums)
    totals = {name: sum(float(batch[name]) for batch in sums) for name in sums[0]}
    if not totals['weight']:
        raise DataError('the evaluation has nothing to predict: raise config.eval.tokens or config.task.mask_rate')
    values = task.summary(totals | {'tokens': tokens, 'num_bytes': num_bytes}) | {'tokens': tokens}
    return {f'eval/{name}': value for name, value in values.items()}


def evaluate_run(
    loaded: weights.Weights,
    split: str | None = None,
    num_tokens: int | None = None,
    batch_size: int | None = None,
    data_path: str | None = None,
    by_class: bool = False,
) -> dict[str, Any]:
    """Evaluates the weights of a run as the run itself does, on all devices that share a batch evenly.

    Args:
        loaded: the weights, from `weights.load`.
        split: of the run's data; None: config.eval.split.
        num_tokens: target tokens, at least (or the whole split); None: config.eval.tokens.
        batch_size: rows at a time, a divisor of the run's batch; None: the run's micro-batch.
        data_path: where the run's data is now; None: where it was.
        by_class: whether to add `classes` of a network that classifies images, as `Confusions`; it runs twice.

    Returns:
        As `evaluate`.

    Raises:
        UsageError: no run, or a batch that does not divide the run's. DataError: as `rows.open_rows_of_run`.
        NumericsError: the loss is not finite.
    """
    config = loaded.config
    if not (config and loaded.workdir):
        raise UsageError(f'{loaded.where} is a Hugging Face folder, which names no text to evaluate on; give --tasks')
    batch_size = batch_size or config.batch_size // config.accumulate
    if config.batch_size % batch_size:
        raise UsageError(f"--batch_size {batch_size} does not divide the run's config.batch_size={config.batch_size}")
    devices = meshes.devices('auto')
    mesh = meshes.make_mesh(configs.Mesh(data=math.gcd(batch_size, len(devices))), devices)
    program = Program(dataclasses.replace(config, batch_size=batch_size, accumulate=1), mesh)
    split = split or config.eval.split
    rows = data_rows.open_rows_of_run(loaded.workdir, config, split, loaded.tokenizer, data_path)
    rows = references.of_run(program.task, loaded, split, rows)
    step = transformer.needed_step(program.model, loaded.step)
    rollouts = open_rollouts(program, loaded.tokenizer)
    params = _placed(loaded.params, program.state.params)
    kept = tuple(_placed(frozen.read_reference(loaded.workdir), like) for like in program.references)
    confusions = Confusions(program.task) if by_class and isinstance(program.task, Classification) else None

    def eval_step(params: Any, batch: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
        if confusions:
            confusions.add(params, batch, step)
        return program.eval_step(params, batch, step, *kept)

    with contextlib.closing(batches.read(batches.mixed(rows, batch_size), 0, workers=0)) as reader:
        values = evaluate(
            eval_step,
            params,
            completed(rollouts, params, reader, rows, loaded.step),
            task=program.task,
            at_a_time=config.batch_size // batch_size,
            num_tokens=num_tokens or config.eval.tokens,
            sharding=meshes.batch_sharding(mesh),
        )
    loss = values['eval/loss']
    if loss is None or not math.isfinite(loss):
        raise NumericsError(f'{loaded.where}: the evaluation loss is not finite')
    return values | ({'classes': confusions.by_class(rows.classes)} if confusions else {})


def _placed(values: Any, like: Any) -> Any:
    """Returns arrays on the devices that those of `like` are on."""
    return jax.device_put(values, jax.tree.map(lambda leaf: leaf.sharding, like))

"""Trained weights as a model of the lm-evaluation-harness (Gao et al. 2024), and its tasks.

This is the only module that imports `lm_eval` (`pip install lm_eval`).
"""

import functools
import importlib.metadata
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
import optax
from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_table
from tqdm import tqdm

from mixln_jax import config as configs
from mixln_jax.distributed import mesh as meshes
from mixln_jax.evaluation.generation import Writer
from mixln_jax.kernels import cross_entropy
from mixln_jax.models.sampler import Sampler
from mixln_jax.models.sampling import Sampling
from mixln_jax.runs import encoder as encoders
from mixln_jax.runs.weights import Weights
from mixln_jax.system import console, errors
from mixln_jax.system.errors import DataError, NumericsError, UsageError, first_line

SHORTEST = 32  # positions; padding to fewer positions would save no time
ENDS = 8  # last ids that share a row of a batch


class Harness(TemplateLM):
    """A trained network as a model of the harness, on all devices; they share the rows of a batch.

    A text begins as a document did in training: after an eos in rows of mode concat, otherwise with its own first
    token. With the weights of a Hugging Face folder it begins with one bos if the folder's tokenizer adds it. A missing
    context (an empty one, or that of the first token of a rolling likelihood) is replaced by an eos, for a Hugging Face
    folder by the bos.

    A rolling likelihood is the likelihood of the text alone, after one such token. The harness's own `hf` model puts
    its token before the bos that the tokenizer has added already, and counts that bos as text (lm-evaluation-harness
    issue 3333).

    A text that is longer than the window (config.seq_length, max_position_embeddings) loses its beginning. A
    continuation that is longer than the window is scored in several windows, as in `loglikelihood_rolling`.
    """

    # Set in __init__; they are properties in the base class.
    eot_token_id: Any = None
    prefix_token_id: Any = None
    max_gen_toks = 256  # if a task does not set it; the harness's own default

    def __init__(
        self, weights: Weights, batch_size: int = 32, max_length: int | None = None, mesh: Mesh | None = None
    ) -> None:
        """Copies the weights to the devices.

        Args:
            weights: from `weights.load`.
            batch_size: rows in a batch, rounded up to a multiple of the mesh's row parts.
            max_length: the window, in tokens; None: the length for which the weights were trained.
            mesh: from `mesh.make_mesh`; None: all devices along `data`.

        Raises:
            UsageError: the network does not predict the next token, or the folder has no tokenizer, or one with more
                ids than the network.
            DataError: the tokenizer cannot be read.
        """
        super().__init__()
        self._where = weights.where
        if weights.model.obstacle:
            raise UsageError(f'{self._where} {weights.model.obstacle}')
        self._encoder = encoders.of_weights(weights)
        self._tokenizer, self._start = self._encoder.tokenizer, self._encoder.start
        self.prefix_token_id = self._encoder.empty
        self.eot_token_id, self.max_length = self._tokenizer.eos_id, max_length or weights.max_length
        mesh = mesh or meshes.make_mesh(configs.Mesh(), meshes.devices('auto'))
        parts = meshes.row_parts(mesh)
        self.batch_size = -(-batch_size // parts) * parts
        self._lengths = [self.max_length]  # few, because each length is compiled
        while self._lengths[0] > SHORTEST:
            self._lengths.insert(0, -(-self._lengths[0] // 2))
        self._sharding = meshes.batch_sharding(mesh)
        self.layer_mask = None  # [L] bool: layers with False become the identity; None: all layers run
        self._params = jax.device_put(weights.params, meshes.state_shardings(mesh, weights.params))
        self._sampler = Sampler(weights.model, self.max_length, mesh)
        model = weights.model.clone(stream_sharding=self._sharding)
        stretch = max(1, cross_entropy.CHUNK * parts // self.batch_size)
        self._predict = jax.jit(functools.partial(_predictions, model=model, stretch=stretch))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids of a text, after the token that begins a text unless `add_special_tokens` is False."""
        del kwargs
        start = [] if add_special_tokens is False else self._start
        return start + self._tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        rows, scored_tokens, cut = [], [], 0
        for number, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise UsageError(f'the continuation of {texts} has no token of its own')
            cut += texts is not None and len(context + continuation) > self.max_length + 1
            for row, scored in self._windows(context, continuation):
                rows.append(row)
                scored_tokens.append((number, scored))
        if cut:
            longer = f'{cut:,} of {len(requests):,} texts are longer than the window of {self.max_length} tokens'
            console.say(f'mixln_jax: warning: {longer} and lose their beginning', file=sys.stderr)
        totals, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
        predictions = self._predictions_of(rows, 'loglikelihood', disable_tqdm)
        for (number, scored), row, (log_probs, best) in zip(scored_tokens, rows, predictions, strict=True):
            totals[number] += log_probs[-scored:].sum(dtype=np.float64)
            greedy[number] &= np.array_equal(best[-scored:], row[-scored:])
        if not np.isfinite(totals).all():
            raise NumericsError(f'{self._where}: a log-likelihood is not finite')
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of each text: the sum over all its tokens, in windows that do not overlap.

        The first token of a text is predicted from `prefix_token_id` alone.
        """
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        wanted = [(None, [self.prefix_token_id], ids) for ids in texts if ids]
        sums = iter(self._loglikelihood_tokens(wanted, disable_tqdm=disable_tqdm))
        return [next(sums)[0] if ids else 0.0 for ids in texts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns continuations up to a stop string, an end token or `max_gen_toks`.

        They are greedy unless a task says `do_sample`. As in the harness's own `hf` model, a context loses its
        beginning where `max_gen_toks` would not fit into the window after it. `hf` refuses as many of them as the
        window has tokens; here half of the window is left to the context then.

        Raises:
            UsageError: a task, which is named, asks for another way to choose tokens.
        """
        groups: dict[Sampling, list[int]] = {}
        contexts, stops, limits = [], [], []
        texts: dict[int, str] = {}
        for number, request in enumerate(requests):
            context, options = request.args
            options = normalize_gen_kwargs(options, self.max_gen_toks)
            stops.append(handle_stop_sequences(options.pop('until'), eos=None))
            limits.append(options.pop('max_gen_toks'))
            groups.setdefault(_sampling(request.task_name, options), []).append(number)
            room = limits[-1] if limits[-1] < self.max_length else self.max_length // 2
            contexts.append(self._encoder.encode(context)[room - self.max_length :])
        writer = Writer(self._sampler, self._params, self._encoder, tail=0)
        with tqdm(total=len(requests), desc='generate_until', disable=disable_tqdm) as bar:
            for sampling, numbers in groups.items():
                made = writer.complete(
                    [contexts[number] for number in numbers],
                    [stops[number] for number in numbers],
                    [limits[number] for number in numbers],
                    self.batch_size,
                    bar.update,
                    sampling=sampling,
                )
                texts |= {number: one.text for number, one in zip(numbers, made, strict=True)}
        return [postprocess_generated_text(texts[number], until, None) for number, until in enumerate(stops)]

    def _windows(self, context: list[int], continuation: list[int]) -> Iterator[tuple[list[int], int]]:
        """Yields rows of up to `max_length` + 1 ids, and how many ids at the end of each are scored."""
        if len(continuation) <= self.max_length:
            yield (context + continuation)[-(self.max_length + 1) :], len(continuation)
            return
        for inputs, scored in get_rolling_token_windows(continuation, context[-1], self.max_length, context_len=1):
            yield inputs + scored[-1:], len(scored)

    def _predictions_of(self, rows: Sequence[list[int]], name: str, disable_tqdm: bool) -> list[Any]:
        """Returns for every row of ids the log-probabilities of all ids but the first, and the likeliest ids instead: a
        pair of arrays [len(row) - 1], in the order of `rows`.

        Rows that differ in their last id alone, such as a question with the answers A, B, C and D, are computed once.
        """
        alike: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            alike.setdefault(tuple(row[:-1]), []).append(number)
        order = sorted(alike.values(), key=lambda numbers: -len(rows[numbers[0]]))
        groups = [numbers[start : start + ENDS] for numbers in order for start in range(0, len(numbers), ENDS)]
        predictions: list[Any] = [None] * len(rows)
        for start in tqdm(range(0, len(groups), self.batch_size), desc=name, disable=disable_tqdm):
            chosen = groups[start : start + self.batch_size]
            batch = meshes.to_devices(self._batch([[rows[n] for n in numbers] for numbers in chosen]), self._sharding)
            arrays = jax.device_get(self._predict(self._params, batch, self.layer_mask))
            for numbers, log_probs, best, ends in zip(chosen, *arrays, strict=False):
                size = len(rows[numbers[0]]) - 1
                for number, end in zip(numbers, ends, strict=False):
                    predictions[number] = np.append(log_probs[: size - 1], end), best[:size]
        return predictions

    def _batch(self, groups: Sequence[Sequence[list[int]]]) -> dict[str, np.ndarray]:
        """Returns the arrays of `_predictions` for groups of rows, the longest first.

        The rows of a group differ in their last id alone.
        """
        length = next(length for length in self._lengths if length >= len(groups[0][0]) - 1)
        batch = {
            'ids': np.zeros((self.batch_size, length + 1), np.int32),  # attention is causal: none sees the padding
            'last': np.zeros(self.batch_size, np.int32),
            'ends': np.zeros((self.batch_size, ENDS), np.int32),
        }
        for number, rows in enumerate(groups):
            batch['ids'][number, : len(rows[0])] = rows[0]
            batch['last'][number] = len(rows[0]) - 2
            batch['ends'][number, : len(rows)] = [row[-1] for row in rows]
        return batch


def _predictions(
    params: Any, batch: Mapping[str, jax.Array], layer_mask: jax.Array | None, *, model: Any, stretch: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Predicts rows of ids, in float32; the logits of `stretch` positions are in memory at a time.

    Args:
        params: the weights.
        batch: `ids` [B, T+1]; `last` [B], a position of each row; `ends` [B, E], ids that may come after it.
        layer_mask: [L] bool or None, as of `Harness`.
        model: the network.
        stretch: positions.

    Returns:
        The log-probability of each id except the first [B, T], the likeliest id [B, T], and the log-probabilities of
        `ends` [B, E].
    """
    ids = batch['ids']
    x, _ = model.apply({'params': params}, ids[:, :-1], layer_mask, method='backbone')

    def predict(position: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, targets = position
        logits = model.apply({'params': params}, x, method='logits')
        return -optax.softmax_cross_entropy_with_integer_labels(logits, targets), logits.argmax(-1)

    log_probs, best = jax.lax.map(predict, (jnp.moveaxis(x, 1, 0), ids[:, 1:].T), batch_size=stretch)
    at_last = jnp.take_along_axis(x, batch['last'][:, None, None], axis=1)[:, 0]
    logits = jax.nn.log_softmax(model.apply({'params': params}, at_last, method='logits'))
    return log_probs.T, best.T, jnp.take_along_axis(logits, batch['ends'], axis=1)


def _sampling(task: str, options: dict[str, Any]) -> Sampling:
    """Returns how a task wants tokens to be chosen, from its generation options.

    Raises UsageError, naming the task, for options that are unknown or out of range.
    """
    sampled = options.pop('do_sample')
    chosen = {name: options.pop(name) for name in ('temperature', 'top_k', 'top_p') if name in options}
    if options := {name: value for name, value in options.items() if value}:
        raise UsageError(f'task {task} asks for generation with {options}, which is not supported')
    try:
        return Sampling(**chosen) if sampled else Sampling(temperature=0)
    except (TypeError, UsageError) as error:
        raise UsageError(f'task {task} asks for generation with {chosen}: {first_line(error)}') from None


def open_tasks(names: Sequence[str], task_path: str | None = None) -> TaskManager:
    """Returns the harness's TaskManager, after it has loaded all tasks in `names`.

    Args:
        names: tasks, groups or tags.
        task_path: a folder of YAML files that define more tasks.

    Raises:
        UsageError: a task is unknown.
        DataError: a task cannot be read.
    """
    manager = TaskManager(include_path=task_path)
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(f'unknown task {name!r}{errors.nearest(name, manager.all_tasks)}')
        try:
            manager.load(name)
        except Exception as error:  # files, hosts and YAML can be wrong in any way
            raise DataError(f'task {name} cannot be loaded: {first_line(error)}') from error
    return manager


def average_accuracy(results: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Returns the mean of the accuracies of tasks or groups, each with the same weight, as `average`, and its standard
    error as `average_stderr`: the root of the sum of the tasks' squared ones, which are of different documents, over
    their number. What is not known of each of them is left out."""
    accuracies, errors = (
        [value for name in names if isinstance(value := results.get(name, {}).get(metric), float)]
        for metric in ('acc,none', 'acc_stderr,none')
    )
    found = {}
    if len(accuracies) == len(names):
        found['average'] = float(np.mean(accuracies))
        if len(errors) == len(names):
            found['average_stderr'] = float(np.linalg.norm(errors)) / len(names)
    return found


def run(
    model: Harness,
    manager: TaskManager,
    names: Sequence[str],
    limit: float | None = None,
    num_fewshot: int | None = None,
) -> tuple[str, dict[str, Any]]:
    """Runs tasks of the harness.

    Args:
        model: the network.
        manager: from `open_tasks`.
        names: of tasks that `manager` has loaded.
        limit: documents of each task, or a share below 1 of them; None: all.
        num_fewshot: examples before each document; None: as many as the task asks for.

    Returns:
        A table for people, and a JSON object with `results` {task: {'acc,none': ..., 'acc_stderr,none': ..., ...}} and
        `documents` {task: {'acc,none': [of every document, in the task's order], ...}}.

    Raises:
        NumericsError: a log-likelihood is not finite.
    """
    # The harness's bootstrap forks processes, which can hang because JAX has threads. Without processes, 1000 draws are
    # enough.
    os.environ['DISABLE_MULTIPROC'] = '1'
    evaluation = lm_eval.simple_evaluate(
        model,
        tasks=list(names),
        task_manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        bootstrap_iters=1000,
        torch_random_seed=None,
    )
    tables = [make_table(evaluation, part) for part in ('results', 'groups') if evaluation.get(part)]
    kept = ('results', 'groups', 'versions', 'n-shot', 'n-samples')
    about: dict[str, Any] = {'lm_eval': importlib.metadata.version('lm_eval'), 'limit': limit}
    if len(names) > 1 and (average := average_accuracy(evaluation['results'], names)):
        numbers = ' ± '.join(f'{100 * value:.2f}' for value in average.values())
        tables.append(f'average acc of {len(names)} tasks: {numbers} %')
        about |= average
    about['documents'] = {task: of_documents(samples) for task, samples in evaluation['samples'].items()}
    return '\n'.join(tables), about | {part: evaluation[part] for part in kept if part in evaluation}


def of_documents(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Returns the metrics of every document of a task, in the task's order: what a comparison in pairs needs.

    Args:
        samples: of the harness: one for each document and filter. Metrics that are no number of one document, such as
            the counts that a perplexity is made of, are left out.
    """
    values: dict[str, list[float]] = {}
    for sample in sorted(samples, key=lambda sample: sample['doc_id']):
        for metric in sample['metrics']:
            if isinstance(value := sample[metric], int | float | np.number):
                values.setdefault(f'{metric},{sample["filter"]}', []).append(float(value))
    return values

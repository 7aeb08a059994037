"""The sample of text that an analysis measures on."""

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from mixln_jax import config as configs
from mixln_jax.analysis.subjects import Subject
from mixln_jax.data import batches, squad, text_files
from mixln_jax.data import rows as data_rows
from mixln_jax.data.examples import Batch, Examples
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.evaluation import references
from mixln_jax.program import step
from mixln_jax.runs import encoder
from mixln_jax.system import console, files
from mixln_jax.system.errors import DataError, UsageError
from mixln_jax.tasks.question_answering import QuestionAnswering
from mixln_jax.tasks.task import Task


def text(
    subject: Subject,
    path: str | None = None,
    split: str | None = None,
    seq_length: int | None = None,
    mode: str | None = None,
    data_path: str | None = None,
) -> tuple[Examples, dict[str, Any]]:
    """Returns rows of text, or the images of a run, to measure a network on.

    Args:
        subject: from `open_subject`.
        path: files, all of JSON lines or all of plain text, as `data.path`; None: the run's own text.
        split: of the text; None: the run's config.eval.split, or all of `path`.
        seq_length: tokens of a row; None: the run's, also where it was exported; of other Hugging Face folders 256, or
            as many as they have positions.
        mode: as config.data.mode; None: the run's, also where it was exported; of other Hugging Face folders `pad`.
        data_path: where the run's own text is now; None: where it was.

    Returns:
        (examples, a dict that identifies them).

    Raises:
        UsageError: no text, no tokenizer, or a network that does not read plain text. DataError: as
        `rows.open_rows_of_run`.
    """
    loaded = subject.weights
    if isinstance(subject.task, QuestionAnswering):
        raise UsageError(f'{loaded.where} is a BERT; give --squad FILE, questions and texts for it to read')
    if subject.task.reads != 'texts':
        return _images(subject, {'--text': path, '--seq_length': seq_length, '--mode': mode}, split, data_path)
    data = loaded.config.data if loaded.config else configs.Data()
    length = seq_length or (loaded.max_length if loaded.data_mode else min(256, loaded.max_length))
    if path:
        source = text_files.kind_of_all(text_files.paths(path, '--text'))
        data = dataclasses.replace(data, source=source, path=path)
    elif not loaded.config:
        raise UsageError(f'{loaded.where} is a Hugging Face folder, which names no text; give --text FILES')
    if length > loaded.max_length:
        warning = f'{loaded.where} was trained on rows of up to {loaded.max_length} tokens, not {length}'
        console.say(f'mixln_jax: warning: {warning}', file=sys.stderr)
    data = dataclasses.replace(data, mode=mode or loaded.data_mode or data.mode)
    split = split or ('all' if path or not loaded.config else loaded.config.eval.split)
    tokenizer = loaded.tokenizer or _WithStart(*encoder.open_tokenizer(pathlib.Path(loaded.where)))
    try:
        if path or not loaded.config or not loaded.workdir:
            rows = data_rows.open_rows(data, split, tokenizer, length, subject.model.config.vocab_size)
        else:
            run = dataclasses.replace(loaded.config, data=data, seq_length=length)
            rows = data_rows.open_rows_of_run(loaded.workdir, run, split, tokenizer, data_path)
            rows = references.of_run(subject.task, loaded, split, rows)
    except (DataError, UsageError) as error:
        message = str(error)
        options = {'data.mode': '--mode', 'seq_length': '--seq_length'} | ({'data.path': '--text'} if path else {})
        for key, option in options.items():
            message = message.replace(f'config.{key}', option)
        raise type(error)(message) from None
    return rows, {'split': split} | rows.fingerprint


def _images(
    subject: Subject, options: Mapping[str, Any], split: str | None, data_path: str | None
) -> tuple[Examples, dict[str, Any]]:
    """Returns the images of a run as `text` does. Raises UsageError for `options` that have no meaning, or no run."""
    loaded = subject.weights
    for option, value in options.items():
        if value is not None:
            raise UsageError(f'{option} has no meaning for {loaded.where}, which reads images')
    if not loaded.config or not loaded.workdir:
        raise UsageError(f'{loaded.where} is a Hugging Face folder, which names no images; a run of ours is needed')
    split = split or loaded.config.eval.split
    examples = data_rows.open_rows_of_run(loaded.workdir, loaded.config, split, None, data_path)
    return examples, {'split': split} | examples.fingerprint


class _WithStart:
    """A tokenizer that begins texts as in the training of the weights: with a bos, or with nothing before them."""

    def __init__(self, tokenizer: Tokenizer, start: Sequence[int]):
        self._tokenizer, self._start = tokenizer, np.array(start, np.int32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, text: str, limit: int | None = None) -> np.ndarray:
        return np.concatenate([self._start, self._tokenizer.encode(text, limit)])[:limit]

    def spans(self, text: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        ids, ends = self._tokenizer.spans(text, limit)
        return np.concatenate([self._start, ids])[:limit], np.concatenate([0 * self._start, ends])[:limit]


def questions(subject: Subject, path: str, seq_length: int | None = None) -> squad.Features:
    """Returns the rows of a SQuAD file for a BERT.

    Args:
        subject: from `open_subject`.
        path: the file.
        seq_length: tokens of a row, at most a quarter (and 64) of them a question's; None: 384, or the network's
            positions where those are fewer.

    Raises:
        UsageError: not a BERT, or no tokenizer. DataError: as `squad.read`.
    """
    loaded = subject.weights
    if not isinstance(subject.task, QuestionAnswering):
        raise UsageError(f'--squad {path}: {loaded.where} is not a BERT that answers questions')
    length, most = seq_length or min(384, subject.model.config.num_positions), subject.model.config.num_positions
    if length > most:
        raise UsageError(f'--seq_length {length}: {loaded.where} has {most} positions')
    if length < 8:
        raise UsageError(f'--seq_length {length}: too short for a question and a text')
    questions = squad.read(path)
    tokenizer = squad.open_tokenizer(loaded.where)
    features = squad.make_features(questions, tokenizer, max_length=length, max_query=min(64, length // 4))
    digest = hashlib.blake2b(files.read(path, DataError), digest_size=16)
    return dataclasses.replace(features, fingerprint={'source': digest.hexdigest(), 'seq_length': length})


def sample(
    task: Task, examples: Examples, num_tokens: int, batch_size: int, last: bool = False, parts: int | None = None
) -> list[Batch]:
    """Returns a fixed sample of examples as batches: the same for every network and whatever the batch size.

    Args:
        task: of the network; it prepares the batches as for an evaluation.
        examples: from `text` or `questions`; they are taken in a random order that is always the same.
        num_tokens: number of real tokens, at least; whole rows are taken, and all of them if there are fewer tokens.
        batch_size: rows at a time, at most; the last batch is filled up with rows of weight 0.
        last: whether only the last real token of each row counts.
        parts: number of devices that share the rows of a batch: a small sample gets smaller batches that they can
            still share; None: batches are never smaller.

    Returns:
        Batches of numpy arrays, with `position_mask` [B,T]: the positions that count.
    """
    taken, tokens, singles = [], 0, batches.evaluation(examples, 1, seed=0)
    for batch in map(singles.__getitem__, range(len(singles))):
        batch.pop('num_bytes', None)
        mask = task.position_mask(batch)
        real = mask.sum()
        if real:
            taken.append(batch | {'position_mask': _last(mask) if last else mask})
        tokens += real
        if tokens >= num_tokens:
            break
    if not taken:
        raise UsageError('the text has no real token')
    empty = {name: np.zeros_like(values) for name, values in taken[0].items()}
    if parts:
        batch_size = min(batch_size, -(-len(taken) // parts) * parts)
    taken += [empty] * (-len(taken) % batch_size)
    joined = (
        {name: np.concatenate([row[name] for row in taken[start : start + batch_size]]) for name in empty}
        for start in range(0, len(taken), batch_size)
    )
    prepare = jax.jit(lambda batch: task.prepare(batch, step.step_key(0, 0), False))
    return [jax.device_get(prepare(batch)) for batch in joined]


def _last(real: np.ndarray) -> np.ndarray:
    """Returns a mask [1,T] with only the last position of `real` that is not 0."""
    return real * (np.arange(real.shape[1]) == np.flatnonzero(real[0])[-1])

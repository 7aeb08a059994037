"""The sample of text that an analysis measures on."""

import dataclasses
import hashlib
import pathlib
import sys

import numpy as np

from mixln_jax import config as configs
from mixln_jax.data import batches, squad, text_files
from mixln_jax.data import rows as data_rows
from mixln_jax.models.bert import Bert
from mixln_jax.runs import weights
from mixln_jax.system import console, files
from mixln_jax.system.errors import DataError, UsageError


def text(subject, path=None, split=None, seq_length=None, mode=None, data_path=None):
    """Rows of text to measure a network on.

    Args:
        subject: from `open_subject`.
        path: files, all of JSON lines or all of plain text, as `data.path`; None: the run's own text.
        split: of it; None: the run's config.eval.split, of `path` all.
        seq_length: tokens of a row; None: the run's, also where it was exported; of other Hugging Face folders 256, or
            as many as they have positions.
        mode: as config.data.mode; None: the run's, also where it was exported; of other Hugging Face folders `pad`.
        data_path: where the run's own text is now; None: where it was.

    Returns:
        (rows, what says which text it is: a dict).

    Raises:
        UsageError: no text, no tokenizer, or a network that does not read plain text. DataError: as
        `rows.open_rows_of_run`.
    """
    found = subject.found
    if isinstance(subject.model, Bert):
        raise UsageError(f'{found.where} is a BERT; give --squad FILE, questions and texts for it to read')
    data = found.config.data if found.config else configs.Data()
    length = seq_length or (found.max_length if found.data_mode else min(256, found.max_length))
    if path:
        source = text_files.kind_of_all(text_files.paths(path, '--text'))
        data = dataclasses.replace(data, source=source, path=path)
    elif not found.config:
        raise UsageError(f'{found.where} is a Hugging Face folder, which names no text; give --text FILES')
    if length > found.max_length:
        warning = f'{found.where} was trained on rows of up to {found.max_length} tokens, not {length}'
        console.say(f'mixln_jax: warning: {warning}', file=sys.stderr)
    data = dataclasses.replace(data, mode=mode or found.data_mode or data.mode)
    split = split or ('all' if path else found.config.eval.split)
    tokenizer = found.tokenizer or _Begun(*weights.open_tokenizer(pathlib.Path(found.where)))
    try:
        if path:
            rows = data_rows.open_rows(data, split, tokenizer, length, subject.model.config.vocab_size)
        else:
            run = dataclasses.replace(found.config, data=data, seq_length=length)
            rows = data_rows.open_rows_of_run(found.workdir, run, split, tokenizer, data_path)
    except (DataError, UsageError) as error:
        said = str(error)
        options = {'data.mode': '--mode', 'seq_length': '--seq_length'} | ({'data.path': '--text'} if path else {})
        for key, option in options.items():
            said = said.replace(f'config.{key}', option)
        raise type(error)(said) from None
    return rows, {'split': split} | rows.fingerprint


class _Begun:
    """A tokenizer whose texts begin as those did that the weights were trained on: with a bos, or with nothing."""

    def __init__(self, tokenizer, start):
        self._tokenizer, self._start = tokenizer, np.array(start, np.int32)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode(self, text, limit=None):
        return np.concatenate([self._start, self._tokenizer.encode(text, limit)])[:limit]

    def spans(self, text, limit=None):
        ids, ends = self._tokenizer.spans(text, limit)
        return np.concatenate([self._start, ids])[:limit], np.concatenate([0 * self._start, ends])[:limit]


def questions(subject, path, seq_length=None):
    """(Features, Examples, what says which they are: a dict) of a SQuAD file for a BERT.

    Args:
        subject: from `open_subject`.
        path: the file.
        seq_length: tokens of a row, at most a quarter (and 64) of them a question's; None: 384, or the network's
            positions where those are fewer.

    Raises:
        UsageError: not a BERT, or no tokenizer. DataError: as `squad.read`.
    """
    found = subject.found
    if not isinstance(subject.model, Bert):
        raise UsageError(f'--squad {path}: {found.where} is not a BERT')
    length, most = seq_length or min(384, subject.model.config.num_positions), subject.model.config.num_positions
    if length > most:
        raise UsageError(f'--seq_length {length}: {found.where} has {most} positions')
    if length < 8:
        raise UsageError(f'--seq_length {length}: too short for a question and a text')
    examples = squad.read(path)
    tokenizer = squad.open_tokenizer(found.where)
    features = squad.make_features(examples, tokenizer, max_length=length, max_query=min(64, length // 4))
    digest = hashlib.blake2b(files.read(path, DataError), digest_size=16)
    return features, examples, {'source': digest.hexdigest(), 'seq_length': length}


def rows_of_text(rows):
    """Rows from `text` as batches of one, in a random order that is always the same; for `sample`."""
    return map(batches.evaluation(rows, 1, seed=0).__getitem__, range(len(rows)))


def rows_of_questions(features):
    """Rows from `questions` as batches of one, in a random order that is always the same; for `sample`."""
    for number in np.random.default_rng(0).permutation(len(features.inputs)):
        batch = {name: getattr(features, name)[number : number + 1] for name in ('inputs', 'types', 'token_mask')}
        yield batch | {'loss_mask': batch['token_mask']}


def sample(singles, num_tokens, batch_size, last=False, parts=None):
    """A fixed sample of rows as batches: the same for every network and whatever the batch size.

    Args:
        singles: batches of one row, from `rows_of_text` or `rows_of_questions`.
        num_tokens: real tokens, at least, or all rows; whole rows are taken.
        batch_size: rows at a time, at most; the last batch is filled up with rows of weight 0.
        last: whether the last real token of each row alone counts.
        parts: devices that share the rows of a batch, so that of few rows smaller batches can be made; None: none are.

    Returns:
        Batches of numpy arrays (see data/layout.py), of which `loss_mask` says what counts.
    """
    taken, tokens = [], 0
    for batch in singles:
        real = batch['loss_mask'].sum()
        if real:
            taken.append(batch | {'loss_mask': _last(batch['loss_mask'])} if last else batch)
        tokens += real
        if tokens >= num_tokens:
            break
    if not taken:
        raise UsageError('the text has no real token')
    empty = {name: np.zeros_like(values) for name, values in taken[0].items()}
    if parts:
        batch_size = min(batch_size, -(-len(taken) // parts) * parts)
    taken += [empty] * (-len(taken) % batch_size)
    return [
        {name: np.concatenate([row[name] for row in taken[at : at + batch_size]]) for name in empty}
        for at in range(0, len(taken), batch_size)
    ]


def _last(real):
    """[1,T] weights with the last position that is not 0 alone."""
    return real * (np.arange(real.shape[1]) == np.flatnonzero(real[0])[-1])

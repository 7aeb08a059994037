"""What an analysis measures: networks with their weights on the devices, and a fixed sample of text."""

import dataclasses
import hashlib
import math
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from mixln_jax import checkpoint, drawing, exits, paths, record, squad, weights
from mixln_jax import config as configs
from mixln_jax import mesh as meshes
from mixln_jax.data import batches, files
from mixln_jax.data import rows as data_rows
from mixln_jax.exits import DataError, UsageError
from mixln_jax.models.bert import Bert
from mixln_jax.program import Program
from mixln_jax.weights import Weights

INITIAL = 'init'  # the step of weights that no training has changed


@dataclasses.dataclass(frozen=True)
class Place:
    """Where weights lie: a checkpoint's folder or Hugging Face's, and the run it is of, or None.

    `initial`: not they, but those that the run began with. `label` is their name among others. `newest`: whichever is
    the run's newest checkpoint when it is opened.
    """

    folder: pathlib.Path
    run: pathlib.Path | None
    initial: bool
    label: str
    newest: bool = False


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network in float32, its weights on all devices that share `batch_size` rows evenly."""

    found: Weights
    model: Any
    params: Any


def places(checkpoints, steps=None) -> list[Place]:
    """What is to be measured, once each.

    Args:
        checkpoints: folders of runs, of single checkpoints of them, or of Hugging Face.
        steps: of every run; None: the newest. Else text: `init`, numbers of steps and `all` (that are kept), separated
            by commas.

    Raises:
        UsageError: nothing there, a step that is not kept, or steps of what is not a run.
    """
    found = {}  # (folder, initial) -> (folder, run, initial, what is said after the run's name, whether the newest)
    for path in checkpoints:
        folder, of_run = weights.find(path)
        run = folder.parents[1] if of_run else None
        is_run = (pathlib.Path(path).expanduser() / 'checkpoints').is_dir()
        if not steps:
            chosen = [(folder, False, f' step {folder.name}' if run and not is_run else '')]
        elif not is_run:
            raise UsageError(f'--steps {steps}: {path} is not the folder of a run')
        else:
            chosen = _steps(folder, steps)
        for at, initial, said in chosen:
            newest = is_run and of_run and (initial or not steps)
            found.setdefault((os.path.realpath(at), initial), (at, run, initial, said, newest))
    names = drawing.names([run or folder for folder, run, *_ in found.values()])
    return [
        Place(folder, run, initial, name + said, newest)
        for name, (folder, run, initial, said, newest) in zip(names, found.values(), strict=True)
    ]


def _steps(newest, steps):
    """[(folder, whether initial, suffix of the name)] of the run with this newest checkpoint."""
    kept = checkpoint.steps(newest.parent)
    for step in exits.listed(steps) or ['']:
        if step == INITIAL:
            yield newest, True, ' at init'
        elif step == 'all' or exits.digits(step) in kept:
            for number in kept if step == 'all' else [int(step)]:
                yield newest.with_name(str(number)), False, f' step {number}'
        else:
            listed = ', '.join([INITIAL, *map(str, kept)])
            raise UsageError(f'--steps: {newest.parents[1]} has no checkpoint {step!r} (there is {listed})')


def open_subject(place: Place, norm_position=None, batch_size=8, data_path=None) -> Subject:
    """Opens one of `places`.

    Args:
        place: which.
        norm_position: placement of a Hugging Face folder that does not say it.
        batch_size: rows that the devices are to share.
        data_path: where the run's data is now; None: where it was.

    Raises:
        UsageError, CheckpointError: as `weights.load`; DataError where initial weights need the run's data.
    """
    found = weights.load(place.run if place.newest else place.folder, norm_position=norm_position, bert=True)
    mesh = _mesh(batch_size)
    if place.initial:
        params = _initial(found, data_path)
        found = dataclasses.replace(found, params=params, step=0, where=f'{place.run} at initialisation')
    model = found.model.clone(stream_sharding=meshes.batch_sharding(mesh))
    return Subject(found, model, jax.device_put(found.params, meshes.state_shardings(mesh, found.params)))


def _mesh(rows):
    """Devices along `data`, as many as share so many rows evenly."""
    return meshes.make_mesh(configs.Mesh(data=parts(rows)), meshes.devices('auto'))


def parts(rows):
    """How many devices share so many rows."""
    return math.gcd(rows, len(meshes.devices('auto')))


def _initial(found, data_path):
    """The weights that a run began with, made again from its config, on one device."""
    config, mesh = found.config, _mesh(1)
    if config.init_from:
        return weights.initial(config.init_from, found.model)
    program = Program(config, mesh)
    state = program.init(jax.random.key(config.seed))
    if program.model.measured():
        rows = data_rows.open_rows_of_run(found.workdir, config, config.data.split, found.tokenizer, data_path)
        first = batches.training(rows, seed=config.data.seed, batch_size=config.batch_size)[0]
        state = program.measure_factors(state, meshes.place(first, meshes.batch_sharding(mesh)))
    return jax.device_get(state.params)


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
        source = files.kind_of_all(files.paths(path, '--text'))
        data = dataclasses.replace(data, source=source, path=path)
    elif not found.config:
        raise UsageError(f'{found.where} is a Hugging Face folder, which names no text; give --text FILES')
    if length > found.max_length:
        warning = f'{found.where} was trained on rows of up to {found.max_length} tokens, not {length}'
        record.say(f'mixln_jax: warning: {warning}', file=sys.stderr)
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
    digest = hashlib.blake2b(paths.read(path, DataError), digest_size=16)
    return features, examples, {'source': digest.hexdigest(), 'seq_length': length}


def rows_of_text(rows):
    """Rows from `text` as batches of one, in a random order that is always the same; for `sample`."""
    return map(batches.evaluation(rows, 1, seed=0).__getitem__, range(len(rows)))


def rows_of_questions(features):
    """Rows from `questions` as batches of one, in a random order that is always the same; for `sample`."""
    for number in np.random.default_rng(0).permutation(len(features.inputs)):
        batch = {name: getattr(features, name)[number : number + 1] for name in ('inputs', 'types', 'weights')}
        yield batch | {'mask': batch['weights'][:, None, None, :] > 0}


def sample(singles, num_tokens, batch_size, last=False, parts=None):
    """A fixed sample of rows as batches: the same for every network and whatever the batch size.

    Args:
        singles: batches of one row, from `rows_of_text` or `rows_of_questions`.
        num_tokens: real tokens, at least, or all rows; whole rows are taken.
        batch_size: rows at a time, at most; the last batch is filled up with rows of weight 0.
        last: whether the last real token of each row alone counts.
        parts: devices that share the rows of a batch, so that of few rows smaller batches can be made; None: none are.

    Returns:
        Batches of numpy arrays (see data/layout.py), of which `weights` says what counts.
    """
    taken, tokens = [], 0
    for batch in singles:
        real = batch['weights'].sum()
        if real:
            taken.append(batch | {'weights': _last(batch['weights'])} if last else batch)
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

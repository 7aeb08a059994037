"""What an analysis measures: networks with their weights on the devices, and a fixed sample of text."""

import dataclasses
import math
import pathlib
import re
from typing import Any

import jax
import numpy as np

from mixln_jax import config as configs
from mixln_jax import mesh as meshes
from mixln_jax import squad, weights
from mixln_jax.data import batches
from mixln_jax.data import rows as data_rows
from mixln_jax.exits import UsageError
from mixln_jax.models import hf_bert
from mixln_jax.models.bert import Bert
from mixln_jax.program import Program
from mixln_jax.weights import Weights

INITIAL = 'init'  # the step of weights that no training has changed


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network in float32, its weights on all devices that share `batch_size` rows evenly, and what it is called."""

    label: str
    found: Weights
    model: Any
    params: Any


def paths(checkpoints, steps):
    """[(path, step)] of what `open_subject` takes: every checkpoint's folder, or its `steps`.

    Args:
        checkpoints: folders of runs, of single checkpoints of them, or of Hugging Face.
        steps: None: the newest. Else text: `init`, numbers of steps and `all` (that are kept), separated by commas.

    Raises:
        UsageError: a step that is not kept, or steps of what is not a run.
    """
    found = []
    for path in map(pathlib.Path, checkpoints):
        if not steps:
            found.append((path, None))
            continue
        if not (path / 'checkpoints').is_dir():
            raise UsageError(f'--steps {steps}: {path} is not the folder of a run')
        kept = sorted(int(folder.name) for folder in (path / 'checkpoints').iterdir() if folder.name.isdigit())
        for step in re.split(r'\s*,\s*', steps.strip()):
            if step == 'all':
                found += [(path / 'checkpoints' / str(number), number) for number in kept]
            elif step == INITIAL:
                found.append((path, INITIAL))
            elif step.isdigit() and int(step) in kept:
                found.append((path / 'checkpoints' / str(int(step)), int(step)))
            else:
                raise UsageError(f'--steps: {path} has no checkpoint {step!r} (there is {INITIAL}, {_listed(kept)})')
    return found


def _listed(numbers):
    return ', '.join(map(str, numbers))


def open_subject(path, step=None, norm_position=None, batch_size=8) -> Subject:
    """Opens one of `paths`.

    Args:
        path, step: from `paths`.
        norm_position: placement of a Hugging Face folder that does not say it.
        batch_size: rows that the devices are to share.

    Raises:
        UsageError, CheckpointError: as `weights.load`; DataError where initial weights need the run's data.
    """
    if hf_bert.is_bert(path):
        found = Weights(*hf_bert.load(path), str(path))
    else:
        found = weights.load(path, norm_position=norm_position)
    mesh = _mesh(batch_size)
    if step == INITIAL:
        found = dataclasses.replace(found, params=_initial(found), step=0, where=f'{path} at initialisation')
    model = found.model.clone(stream_sharding=meshes.batch_sharding(mesh))
    params = jax.device_put(found.params, meshes.state_shardings(mesh, found.params))
    folder = pathlib.Path(path).absolute()
    run = folder.parents[1] if folder.parent.name == 'checkpoints' else folder
    label = {None: run.name, INITIAL: f'{run.name} at init'}.get(step, f'{run.name} step {found.step}')
    return Subject(label, found, model, params)


def _mesh(rows):
    """Devices along `data`, as many as share so many rows evenly."""
    devices = meshes.devices('auto')
    return meshes.make_mesh(configs.Mesh(data=math.gcd(rows, len(devices))), devices)


def _initial(found):
    """The weights that a run began with, made again from its config, on one device."""
    config, mesh = found.config, _mesh(1)
    if config.init_from:
        return weights.initial(config.init_from, found.model)
    program = Program(config, mesh)
    state = program.init(jax.random.key(config.seed))
    if program.model.measured():
        rows = data_rows.open_rows(
            config.data, config.data.split, found.tokenizer, config.seq_length, config.model.vocab_size
        )
        first = batches.training(rows, seed=config.data.seed, batch_size=config.batch_size)[0]
        state = program.measure_factors(state, meshes.place(first, meshes.batch_sharding(mesh)))
    return jax.device_get(state.params)


def text(subject, path=None, split=None, seq_length=None):
    """Rows of text to measure a network on.

    Args:
        subject: from `open_subject`.
        path: files, .jsonl (also gzipped) or plain text, as `data.path`; None: the run's own text.
        split: of it; None: the run's config.eval.split, of `path` all.
        seq_length: tokens of a row; None: the run's, of a Hugging Face folder 256.

    Raises:
        UsageError: no text, no tokenizer, or a network that does not read plain text. DataError: as `rows.open_rows`.
    """
    found = subject.found
    if isinstance(subject.model, Bert):
        raise UsageError(f'{found.where} is a BERT; give --squad FILE, questions and texts for it to read')
    data, length = (found.config.data, found.config.seq_length) if found.config else (configs.Data(), 256)
    if path:
        source = 'jsonl' if re.search(r'\.jsonl?(\.gz)?$', path.split(',')[0]) else 'text'
        data = dataclasses.replace(data, source=source, path=path)
    elif not found.config:
        raise UsageError(f'{found.where} is a Hugging Face folder, which names no text; give --text FILES')
    elif seq_length not in (None, length) and data.source == 'tokens':
        raise UsageError(f'--seq_length {seq_length}: the run has rows of {length} tokens, made beforehand')
    tokenizer = found.tokenizer or weights.open_tokenizer(pathlib.Path(found.where))[0]
    split = split or ('all' if path else found.config.eval.split)
    return data_rows.open_rows(data, split, tokenizer, seq_length or length, subject.model.config.vocab_size)


def questions(subject, path, seq_length=None):
    """(Features, Examples) of a SQuAD file for a BERT.

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
    examples = squad.read(path)
    tokenizer = squad.open_tokenizer(found.where)
    return squad.make_features(examples, tokenizer, max_length=length, max_query=min(64, length // 4)), examples


def rows_of_text(rows):
    """Rows from `text` as batches of one, in a random order that is always the same; for `sample`."""
    return map(batches.evaluation(rows, 1, seed=0).__getitem__, range(len(rows)))


def rows_of_questions(features):
    """Rows from `questions` as batches of one, in a random order that is always the same; for `sample`."""
    for number in np.random.default_rng(0).permutation(len(features.inputs)):
        batch = {name: getattr(features, name)[number : number + 1] for name in ('inputs', 'types', 'weights')}
        yield batch | {'mask': batch['weights'][:, None, None, :] > 0}


def sample(singles, num_tokens, batch_size, last=False):
    """A fixed sample of rows as batches: the same for every network and whatever the batch size.

    Args:
        singles: batches of one row, from `rows_of_text` or `rows_of_questions`.
        num_tokens: real tokens, at least, or all rows; whole rows are taken.
        batch_size: rows at a time; the last batch is filled up with rows of weight 0.
        last: whether the last real token of each row alone counts.

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
    taken += [empty] * (-len(taken) % batch_size)
    return [
        {name: np.concatenate([row[name] for row in taken[at : at + batch_size]]) for name in empty}
        for at in range(0, len(taken), batch_size)
    ]


def _last(real):
    """[1,T] weights with the last position that is not 0 alone."""
    return real * (np.arange(real.shape[1]) == np.flatnonzero(real[0])[-1])

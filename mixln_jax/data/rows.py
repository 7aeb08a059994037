"""Rows of tokens by number: made from one document each on demand, made at the start of a run, or prepared."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from mixln_jax import config
from mixln_jax.data import instructions, layout, pairs, prepared, prompt_rows, sources, splits, tokenizers
from mixln_jax.data.examples import Examples, Numbers, Rows
from mixln_jax.data.layout import Block, Layout
from mixln_jax.data.sources import Source, open_source
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system import console, files
from mixln_jax.system.errors import DataError, UsageError, reading

# The help of the option --data_path.
MOVED = "where the run's data is now: data.data_dir of a tfds data set, data.path of another source [where it was]"


LANGUAGE = config.Task()  # the task of plain text
OF_PAIRS = ('preference', 'reward')  # tasks that learn from pairs
OF_PYTHON = 'stdlib', 'shelves'  # sources that come with Python
RECORDS = {'instructions': instructions, 'online': prompt_rows, **dict.fromkeys(OF_PAIRS, pairs)}  # have `gather`


class Documents(Rows):
    """pad: row i is document i, made on demand, so the source may be of any size."""

    def __init__(self, source: Source, tokenizer: Tokenizer, seq_length: int):
        self.layout = Layout('pad', tokenizer.pad_id, tokenizer.eos_id)
        self.fingerprint = _fingerprint(source, tokenizer, 'pad', seq_length)
        self._source, self._tokenizer, self._length = source, tokenizer, seq_length

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Numbers, sized: bool = False) -> Block:
        texts = self._source.__getitems__(list(indices))
        rows = np.empty((len(texts), self._length + 1), layout.TOKEN)
        for row, text in zip(rows, texts, strict=True):
            # One id more than fits into a row tells whether the text ends there.
            document = tokenized(text, self._tokenizer, self.layout, self._length) if sized else self._ids(text)
            layout.pad(row, document, self.layout)
        block = self.layout.block(rows)
        return block if sized else block._replace(num_bytes=None)

    def _ids(self, text: str) -> np.ndarray:
        return self.layout.document(self._tokenizer.encode(text, self._length - 1))

    def origin(self, i: int) -> str:
        return self._source.origin(i)


class InMemory(Rows):
    """pack and concat: a source of up to 1 GB, tokenised at the start.

    Raises DataError if the text does not fill one row.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, mode: str, seq_length: int):
        self.layout = Layout(mode, tokenizer.pad_id, tokenizer.eos_id)
        self.fingerprint = _fingerprint(source, tokenizer, mode, seq_length)
        blocks = []
        dtype = layout.dtype_for(tokenizer.vocab_size)
        compact = lambda block: Block(block.ids.astype(dtype), np.packbits(block.ends, 1), block.num_bytes)  # noqa: E731
        fill: layout.Fill = layout.FILL[mode](seq_length, self.layout, lambda block: blocks.append(compact(block)))
        for i in range(len(source)):
            fill.add(tokenized(source[i], tokenizer, self.layout))
        fill.close()
        if not any(len(block.ids) for block in blocks):
            raise DataError(f'the text is not enough for one row of config.seq_length={seq_length}')
        self._rows = Block(*map(np.concatenate, zip(*blocks, strict=True)))

    def __len__(self) -> int:
        return len(self._rows.ids)

    def read(self, indices: Numbers, sized: bool = False) -> Block:
        ids, ends, num_bytes = self._rows
        chosen = np.asarray(indices)
        assert num_bytes is not None, 'the texts are known'
        return Block(ids[chosen], np.unpackbits(ends[chosen], 1, ids.shape[1]).view(bool), num_bytes[chosen])

    def origin(self, i: int) -> str:
        return f'row {range(len(self))[i]}'


def tokenized(text: str, tokenizer: Tokenizer, layout: Layout, limit: int | None = None) -> np.ndarray:
    """Returns a text as TOKENs with their numbers of bytes, see `Layout.document`; with `limit` only its first ids and
    the eos."""
    return layout.document(*tokenizer.spans(text, limit), len(text.encode()))


def open_tokenizer(data: config.Data) -> Tokenizer:
    """Returns the tokenizer of a run: that of prepared rows, or else that of the config.

    Raises DataError; UsageError if prepared rows and the config disagree.
    """
    if data.source != 'tokens':
        return tokenizers.open_tokenizer(data)
    tokenizer = prepared.open_tokenizer(data.path)
    if tokenizer.kind != data.tokenizer:
        raise UsageError(
            f'{data.path} was prepared with --config.data.tokenizer={tokenizer.kind}, not {data.tokenizer}'
        )
    if data.tokenizer_path and tokenizers.open_tokenizer(data).fingerprint != tokenizer.fingerprint:
        raise UsageError(f'{data.path} was prepared with another tokenizer than config.data.tokenizer_path')
    return tokenizer


def open_rows(
    data: config.Data,
    split: str,
    tokenizer: Tokenizer,
    seq_length: int,
    vocab_size: int,
    task: config.Task = LANGUAGE,
) -> Rows:
    """Returns the rows of a split, made for a task as `data.mode` says; `vocab_size` is the model's.

    Raises UsageError if text or padding may have ids beyond the model's, or prepared rows have another length or mode;
    DataError as `open_source` and the kinds of rows.
    """
    tokenizers.check_fits(tokenizer, vocab_size, f'config.model.vocab_size={vocab_size}')
    if task.name == 'instructions':
        return instructions.open_rows(data, split, tokenizer, seq_length, vocab_size, task.learn)
    if task.name in OF_PAIRS:
        return pairs.open_rows(data, split, tokenizer, seq_length, vocab_size, task.name)
    if task.name == 'online':
        return prompt_rows.open_rows(data, split, tokenizer, seq_length, vocab_size, task.online.max_new_tokens)
    if data.source == 'tokens':
        rows = prepared.Prepared(data.path, split)
        for name, wanted in (('mode', data.mode), ('seq_length', seq_length)):
            if rows.fingerprint[name] != wanted:
                key = 'seq_length' if name == 'seq_length' else f'data.{name}'
                raise UsageError(f'{data.path} holds rows of config.{key}={rows.fingerprint[name]}, not {wanted}')
        return rows
    if data.mode == 'pad':
        return Documents(open_source(data, split), tokenizer, seq_length)
    if data.source == 'tfds':
        raise DataError(
            f'data.mode={data.mode} of a tfds data set needs rows made beforehand: python -m mixln_jax.data.prepare '
            f'--source tfds --name {data.name} --mode {data.mode} --seq_length {seq_length} --format tokens --out DIR'
        )
    source = open_source(data, split)
    console.say(f'{data.mode}: tokenises {len(source):,} documents of {split}')
    return InMemory(source, tokenizer, data.mode, seq_length)


def open_examples(run: config.Config, data: config.Data, split: str, tokenizer: Tokenizer | None) -> Examples:
    """Returns the examples of a split of `data`, as a run with this configuration learns from them.

    Args:
        run: the configuration.
        data: that of the run, or the same elsewhere.
        split: of the data.
        tokenizer: of the run; None: it reads images.

    Raises UsageError and DataError as `open_rows`, or as `images.examples.open_examples`.
    """
    if tokenizer:
        return open_rows(data, split, tokenizer, run.seq_length, run.model.vocab_size, run.task)
    from mixln_jax.data.images import examples  # not for runs on text

    return examples.open_examples(data, split, run.model.image_size, run.model.num_classes)


def shared(data: config.Data, task: config.Task) -> str | None:
    """Returns a line for people if records of data.validation_path are in data.path too.

    Raises UsageError where both name the same file; as `open_rows`.
    """
    if not data.validation_path:
        return None
    splits.check_apart(data)
    if task.name not in RECORDS:
        return sources.shared(data)
    gather = RECORDS[task.name].gather
    training, evaluation = (gather(data.source, splits.state(data, split)) for split in ('train', 'validation'))
    origins = {record.unit: record.origin for record in reversed(evaluation)}
    return splits.remark((record.unit for record in training), origins)


def open_rows_of_run(
    workdir: str | pathlib.Path,
    run: config.Config,
    split: str,
    tokenizer: Tokenizer | None,
    data_path: str | None = None,
) -> Any:
    """Returns the examples of a split of a run's data, after a check that they are what the run saw.

    If the run has not recorded this split and its data has moved, the split that it trained on is compared.

    Args:
        workdir: of the run.
        run: its configuration; `data.mode` and `seq_length` may differ from what the run used.
        split: of its data.
        tokenizer: its tokenizer; None: it reads images.
        data_path: where the data is now, as in `moved`; None: where it was.

    Raises:
        UsageError: the run does not say what it saw; as `moved` and `open_rows`.
        DataError: the data differs, naming the part; as `open_rows`.
    """
    data = run.data if data_path is None else moved(run.data, data_path, split)
    trained, evaluated = seen_by_run(workdir)
    seen = trained if split == run.data.split else evaluated if split == evaluated.get('split') else None
    try:
        rows = open_examples(run, data, split, tokenizer)
        current = rows.fingerprint
        if not seen and data_path:
            seen, current = trained, fingerprint(data, run.data.split, tokenizer, run)
    except (DataError, UsageError) as error:
        key, message = f'config.data.{_location(data, split)}', str(error)
        if data_path:
            message = message.replace(key, '--data_path')
        elif key in message:
            message += '; --data_path says where the data is now'
        raise type(error)(message) from None
    chosen = ('split', 'mode', 'seq_length', 'reward_network')
    if differ := [part for part, value in (seen or {}).items() if part not in chosen and current.get(part) != value]:
        known = ' (the text that comes with Python is another in other versions)' if data.source in OF_PYTHON else ''
        raise DataError(f'the data is not what the run in {workdir} saw: {", ".join(differ)} differs{known}')
    return rows


def seen_by_run(workdir: str | pathlib.Path) -> tuple[dict, dict]:
    """Returns the fingerprints of the rows that a run has trained on and, with their `split`, evaluated on.

    Raises UsageError if the run does not say.
    """
    path = pathlib.Path(workdir) / 'environment.json'
    with reading(path, UsageError, 'does not tell what data the run saw'):
        content = files.read_json(path, UsageError)
        return dict(content['data']), dict(content.get('eval_data', {}))


def moved(data: config.Data, path: str, split: str) -> config.Data:
    """Returns `data` with `path` in place of data.data_dir for tfds, or of data.path for other sources, or of
    data.validation_path if the split is read from there.

    Raises UsageError for the text that comes with Python.
    """
    if not path:
        raise UsageError('--data_path is empty')
    if data.source in OF_PYTHON:
        raise UsageError(f'--data_path has no meaning for data.source={data.source}, the text that comes with Python')
    change: dict[str, Any] = {_location(data, split): path}
    return dataclasses.replace(data, **change)


def _location(data: config.Data, split: str) -> str:
    """Returns the key that says where the data of a split is."""
    if data.validation_path and split == 'validation':
        return 'validation_path'
    return 'data_dir' if data.source == 'tfds' else 'path'


def fingerprint(data: config.Data, split: str, tokenizer: Tokenizer | None, run: config.Config) -> dict:
    """Returns the fingerprint of the rows that a run makes of a split of `data`; rows of plain text are not made."""
    if not tokenizer or run.task.name in RECORDS:
        return open_examples(run, data, split, tokenizer).fingerprint
    if data.source == 'tokens':
        return prepared.Prepared(data.path, split).fingerprint
    return _fingerprint(open_source(data, split), tokenizer, data.mode, run.seq_length)


def _fingerprint(source: Source, tokenizer: Tokenizer, mode: str, seq_length: int) -> dict[str, Any]:
    return {
        'source': source.fingerprint,
        'tokenizer': tokenizer.fingerprint,
        'mode': mode,
        'seq_length': seq_length,
    }

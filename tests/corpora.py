"""Small corpora, rows prepared of them, and how tests compare."""

import dataclasses
import gzip
import json
import random

import numpy as np

from mixln_jax import config
from mixln_jax.data import prepared, rows, sources
from mixln_jax.data.prepare import command as prepare

T = 8  # positions in a row


class Texts(list):
    """The simplest source."""

    fingerprint = '0'

    def __getitems__(self, indices):
        return [self[i] for i in indices]

    def origin(self, i):
        return f'text {i}'


def fields(number):
    """What stands beside a text, as in C4's files, and a field more."""
    return {'url': f'http://a/{number}', 'timestamp': '2019-04-25', 'language': 'en'}


def write(path, texts):
    """JSON lines, packed if the name ends in .gz."""
    opener = gzip.open if path.suffix == '.gz' else open
    with opener(path, 'wt', encoding='utf-8') as file:
        file.writelines(json.dumps({'text': text} | fields(i)) + '\n' for i, text in enumerate(texts))
    return path


def texts(seed, count=120):
    """Different ones."""
    rng = random.Random(seed)
    words = 'the quick brown fox größer 🙂 jumps over a lazy dog'.split()  # noqa: SIM905
    return [f'{seed}.{i} ' + ' '.join(rng.choices(words, k=rng.randrange(1, 60))) for i in range(count)]


def two_files(folder):
    """120 documents of up to seven words."""
    for name in 'ab':
        write(folder / f'{name}.jsonl', (f'{name}{i} ' * (i % 7 + 1) for i in range(60)))
    return config.Data(source='jsonl', path=f'{folder}/*.jsonl', tokenizer='bytes')


def prepare_to(folder, data, mode='pad', **changes):
    """Prepares `data`; the keys that then read it."""
    data = dataclasses.replace(data, mode=mode)
    assert prepare.prepare(data, str(folder), format='tokens', seq_length=T, **changes)
    return dataclasses.replace(data, source='tokens', path=str(folder))


def contents(folder):
    """Name and bytes of everything that readers see."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file() and prepared.WORK not in path.parts
    }


def open_(data, split='train', **changes):
    """The rows of a run with these keys."""
    return rows.open_rows(data, split, rows.open_tokenizer(data), **{'seq_length': T, 'vocab_size': 300} | changes)


def documents(data, split):
    """All texts of a split."""
    source = sources.open_source(data, split)
    return [source[i] for i in range(len(source))]


def all_tokens(made):
    return made.read(np.arange(len(made))).ids


def assert_same(got, wanted):
    """Of batches."""
    assert got.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_array_equal(got[name], values, err_msg=name)

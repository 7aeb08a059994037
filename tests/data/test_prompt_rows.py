"""Prompts as rows: what is read, which are left out, splits, and the source of the quickstart."""

import collections
import json
import pathlib

import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import recipes
from mixln_jax.data import instructions, prompt_rows, rows, sources, stdlib, tokenizers
from mixln_jax.system.errors import DataError, UsageError

ROOT = pathlib.Path(__file__).parents[2]


def opened(path, split='all', seq_length=16, max_new=4, **changes):
    data = configs.Data(**{'source': 'jsonl', 'path': str(path), 'template': 'plain', 'tokenizer': 'bytes'} | changes)
    task = configs.Task(name='online', online=configs.Online(reward='a:b', max_new_tokens=max_new))
    return rows.open_rows(data, split, tokenizers.Bytes(), seq_length, 259, task)


def write(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def test_rows(tmp_path, capsys):
    records = [
        {'prompt': 'ab', 'answer': 'x'},
        {'messages': [{'role': 'user', 'content': 'cde'}, {'role': 'assistant', 'content': 'f'}], 'level': 2},
        {'instruction': 'g', 'input': 'h'},
        {'prompt': 'much too long'},
        {'prompt': ''},
    ]
    found = opened(write(tmp_path / 'a.jsonl', records))
    assert len(found) == 4 and [prompt.fields for prompt in found.prompts] == [*records[:3], records[4]]
    batch = found.batch([0, 1, 2, 3])
    contexts = [prompt_rows.context(*pair) for pair in zip(batch['inputs'], batch['loss_mask'], strict=True)]
    assert contexts == [[*b'ab'], [*b'cde'], [*b'g\n\nh'], [258]]
    assert batch['record'].tolist() == [0, 1, 2, 3] and batch['inputs'].shape == (4, 16)
    assert batch['targets'][1, :2].tolist() == [*b'de'] and found.origin(1).endswith('a.jsonl:2')
    err = capsys.readouterr().err
    assert 'all: 4 prompts' in err
    assert '1 of 5 prompts leave no room for config.task.online.max_new_tokens=4' in err and 'a.jsonl:4' in err


def test_splits_are_by_the_prompt(tmp_path):
    path = write(tmp_path / 'a.jsonl', [{'prompt': f'{i // 2}', 'answer': str(i)} for i in range(120)])
    train, held = (opened(path, split, held_out=0.4) for split in ('train', 'validation'))
    texts = [{prompt.text for prompt in part.prompts} for part in (train, held)]
    assert len(train) + len(held) == 120 and not texts[0] & texts[1] and len(held) >= 40
    assert train.fingerprint != held.fingerprint


BAD = {
    'none': ([{'text': 'a'}], {}, DataError, 'a.jsonl:1: a prompt is an object with'),
    'a number': ([{'prompt': 3}], {}, DataError, 'a.jsonl:1: prompt is a number, not a string'),
    'no object': ([[1]], {}, DataError, 'a.jsonl'),
    'empty': ([], {}, DataError, 'no records in this file'),
    'all too long': ([{'prompt': 'x' * 99}], {}, DataError, 'none of 1 prompts leaves room'),
    'only an answer': ([{'messages': [{'role': 'assistant', 'content': 'x'}]}], {}, DataError, 'nothing before'),
    'packed': ([{'prompt': 'a'}], {'mode': 'pack'}, UsageError, 'needs config.data.mode=pad, not pack'),
    'split': ([{'prompt': 'a'}], {'split': 'test'}, UsageError, 'config.task.name=online has no split test'),
    'template': ([{'prompt': 'a'}], {'template': 'chat'}, DataError, 'has no chat template'),
}


@pytest.mark.parametrize('records, changes, kind, message', BAD.values(), ids=BAD)
def test_what_is_wrong(records, changes, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        opened(write(tmp_path / 'a.jsonl', records), **changes)


def test_shelves():
    """As many names on each, by the last letter; what `format` teaches is right as often as by chance."""
    found = stdlib.shelves()
    counts = collections.Counter(shelf for _, shelf in found)
    assert {*counts} == {*stdlib.SHELVES} and len({*counts.values()}) == 1 and len(found) > 400
    assert all(name[-1] in stdlib.SHELVES[shelf] and len(name) <= 20 for name, shelf in found)
    assert sorted(''.join(stdlib.SHELVES.values())) == [*'abcdefghijklmnopqrstuvwxyz']
    taught = {
        one.messages[0]['content'].strip(): one.messages[1]['content'] for one in instructions.gather('shelves', None)
    }
    right = np.mean([taught[name] == shelf for name, shelf in found])
    assert taught.keys() == {name for name, _ in found} and 0.2 < right < 0.3
    prompts = opened('', source='shelves', seq_length=32, max_new=8).prompts
    assert {(prompt.text.strip(), prompt.fields['answer']) for prompt in prompts} == {*found}


def test_shelves_are_no_text():
    with pytest.raises(UsageError, match='data.source=shelves has no text'):
        sources.open_source(configs.Data(source='shelves'), 'train')


def test_recipes():
    for stage, name in (('', 'online'), (':format', 'instructions')):
        config = configs.build(recipes.load(f'{ROOT}/configs/preferences/online_quickstart.py{stage}', []))
        start = configs.build(recipes.load(str(ROOT / 'configs/quickstart.py'), []))
        assert config.task.name == name
        assert all(getattr(config.model, key) == getattr(start.model, key) for key in configs.same_weights())

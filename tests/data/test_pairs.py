"""Rows of pairs of answers: arrays by expectation written by hand, what is cut, dropped, held out, and bad input."""

import gzip
import json
import re

import numpy as np
import pytest

from mixln_jax import config
from mixln_jax.data import batches, pair_records, pairs, rows, tokenizers
from mixln_jax.system.errors import DataError, UsageError

BYTES = tokenizers.Bytes()
PAD, EOS = BYTES.pad_id, BYTES.eos_id


def pair(prompt, chosen, rejected):
    return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


def turns(*texts):
    return [{'role': 'user' if i % 2 == 0 else 'assistant', 'content': text} for i, text in enumerate(texts)]


def system(text):
    return [{'role': 'system', 'content': text}]


def write(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def open_(path, mode='pad', T=12, split='all', vocab_size=259, **changes):
    data = {'source': 'jsonl', 'path': str(path), 'tokenizer': 'bytes', 'template': 'plain', 'mode': mode}
    task = config.Task(name='preference')
    return rows.open_rows(config.Data(**data | changes), split, BYTES, T, vocab_size, task)


def letters(ids):
    """Ids as text, . for the end of a turn, - for padding."""
    return ''.join({PAD: '-', EOS: '.'}.get(i) or chr(i) for i in ids)


def shown(found, number=0):
    """(inputs, loss_mask, segment_ids, positions) of a row, a letter a position."""
    batch = found.batch([number])
    digits = lambda name: ''.join(str(int(value)) for value in batch[name][0])  # noqa: E731
    return letters(batch['inputs'][0].tolist()), digits('loss_mask'), digits('segment_ids'), digits('positions')


SHAPES = {
    'texts': pair('Hi', 'yo', 'no!'),
    'messages': pair(turns('Hi'), turns('', 'yo')[1:], turns('', 'no!')[1:]),
    'messages with the prompt in them': pair(turns('Hi'), turns('Hi', 'yo'), turns('Hi', 'no!')),
    'conversations': {'chosen': turns('Hi', 'yo'), 'rejected': turns('Hi', 'no!')},
}


@pytest.mark.parametrize('mode', ['pad', 'pack'])
@pytest.mark.parametrize('record', SHAPES.values(), ids=SHAPES)
def test_a_row_by_hand(tmp_path, mode, record):
    found = open_(write(tmp_path / 'a', [record]), mode)
    assert shown(found) == ('Hiyo.Hino!.-', '011100111100', '111112222220', '012340123450')
    batch = found.batch([0])
    assert letters(batch['targets'][0].tolist())[1:4] + letters(batch['targets'][0].tolist())[6:10] == 'yo.no!.'


def test_earlier_answers_do_not_count(tmp_path):
    record = {'chosen': turns('a', 'b', 'c', 'd'), 'rejected': turns('a', 'b', 'c', 'e')}
    assert shown(open_(write(tmp_path / 'a', [record])))[:2] == ('ab.cd.ab.ce.', '000110000110')


def test_an_empty_prompt(tmp_path):
    """An eos stands before the answers, of which all tokens count."""
    assert shown(open_(write(tmp_path / 'a', [pair('', 'yo', 'no')])))[:2] == ('.yo..no.----', '111011100000')


def test_packed(tmp_path):
    """The same pairs, as many to a row as fit."""
    records = [pair('Hi', 'yo' * (i % 3), f'no{i}') for i in range(20)]
    path = write(tmp_path / 'a', records)
    padded, packed = open_(path, 'pad', 40), open_(path, 'pack', 40)
    assert len(padded) == padded.num_pairs == packed.num_pairs == 20 and len(packed) < 10

    def texts(found):
        for number in range(len(found)):
            batch = found.batch([number])
            ids, segments, mask = (batch[name][0] for name in ('inputs', 'segment_ids', 'loss_mask'))
            for p in range(segments.max() // 2):
                sides = [segments == 2 * p + 1 + side for side in (0, 1)]
                yield *(letters(ids[side]) for side in sides), *(mask[side].tolist() for side in sides)

    assert sorted(texts(padded), key=str) == sorted(texts(packed), key=str)


CUTS = {  # T=12
    'the longer one': (pair('Hi', 'yo', 'nonononono'), 'Hiyo.Hinonon', '011100111110'),
    'both': (pair('Hi', 'yoyoyoyo', 'nonononono'), 'HiyoyoHinono', '011110011110'),
}


@pytest.mark.parametrize('record, inputs, mask', CUTS.values(), ids=CUTS)
def test_cut(tmp_path, capsys, record, inputs, mask):
    found = open_(write(tmp_path / 'a', [record]))
    assert shown(found)[0] == inputs
    assert shown(found)[1] == mask and found.num_cut == 1
    assert '1 of 1 pairs are cut, so that both texts fit into config.seq_length=12' in capsys.readouterr().err


def test_dropped(tmp_path, capsys):
    records = [
        pair('a', 'b', 'c'),
        pair('a', 'b', 'b'),
        pair('too long for', 'b', 'c'),
        pair('Hi', 'same until here', 'same until there'),
    ]
    found = open_(write(tmp_path / 'a', records))
    assert found.num_pairs == 1
    said = capsys.readouterr().err
    assert f'1 of 4 pairs have two equal answers and are left out, the first of them {tmp_path}/a:2' in said
    assert '1 of 4 pairs have answers whose tokens are equal as far as they fit and are left out, the first' in said
    assert f'1 of 4 pairs have a prompt that leaves no room and are left out, the first of them {tmp_path}/a:3' in said


def test_texts_that_repeat_the_prompt_are_said(tmp_path, capsys):
    """They are taken as they are, as TRL does, which may be meant."""
    records = [pair('Hi', 'Hiyo', 'Hino'), pair('Hi', 'Hiyo', 'no'), pair('', 'yo', 'no')]
    records.append(pair(turns('Hi'), 'Hiyo', 'Hino'))
    assert shown(open_(write(tmp_path / 'a', records), T=14))[0] == 'HiHiyo.HiHino.'
    said = f'2 of 4 pairs have texts as answers that both begin with the prompt, .* the first of them {tmp_path}/a:1'
    assert re.search(said, capsys.readouterr().err)


def test_answers_that_go_on_with_a_question(tmp_path):
    """After a prompt that ends with an answer, the same one in both."""
    record = pair(turns('a', 'b'), turns('c', 'd'), turns('c', 'e'))
    assert shown(open_(write(tmp_path / 'a', [record])))[:2] == ('ab.cd.ab.ce.', '000110000110')


def test_answers_that_call_tools():
    """They may say nothing; calls are a part of the answer."""
    calls = lambda name: [{'role': 'assistant', 'tool_calls': [{'name': name}]}]  # noqa: E731
    made = lambda one, other: pair_records.from_record(pair('a', calls(one), calls(other)), 'a:1')  # noqa: E731
    assert made('f', 'f').same and not made('f', 'g').same


def test_held_out_by_prompt(tmp_path):
    records = [pair(f'prompt {i // 2}', 'a', f'b{i}') for i in range(200)]
    path = write(tmp_path / 'a', records)
    splits = {split: open_(path, T=40, split=split, held_out=0.2) for split in ('train', 'validation')}
    numbers = {
        split: {int(found.origin(i).rpartition(':')[2]) - 1 for i in range(len(found))}
        for split, found in splits.items()
    }
    assert numbers['train'] | numbers['validation'] == set(range(200))
    assert not {n // 2 for n in numbers['train']} & {n // 2 for n in numbers['validation']}
    assert 20 < len(numbers['validation']) < 60


def test_files(tmp_path):
    records = [pair('a', 'b', 'c'), pair('d', 'e', 'f')]
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(''.join(json.dumps(r) + '\n' for r in records).encode()))
    (tmp_path / 'b.json').write_text(json.dumps(records))
    one, other = open_(tmp_path / 'a.jsonl.gz'), open_(tmp_path / 'b.json')
    assert one.fingerprint == other.fingerprint and one.num_pairs == 2
    assert one.fingerprint != open_(tmp_path / 'b.json', 'pack').fingerprint


def test_rows_that_only_fill(tmp_path):
    dataset = batches.evaluation(open_(write(tmp_path / 'a', [pair('a', 'b', 'c')])), 4)
    assert dataset[0]['loss_mask'].sum(1).tolist() == [4, 0, 0, 0]


BAD = {
    'no prompt': ({'chosen': 'a', 'rejected': 'b'}, 'prompt is missing; a pair is an object with'),
    'no chosen': ({'prompt': 'a', 'rejected': 'b'}, 'chosen is missing'),
    'no rejected': ({'prompt': 'a', 'chosen': 'b'}, 'rejected is missing'),
    'nothing in common': (
        {'chosen': turns('a', 'b'), 'rejected': turns('c', 'd')}, 'chosen and rejected have no common prompt',
    ),
    'answers alone': ({'chosen': turns('a'), 'rejected': turns('a')}, 'chosen and rejected have no common prompt'),
    'one is a text': ({'chosen': turns('a', 'b'), 'rejected': 'c'}, 'prompt is missing'),
    'an array': ([1], 'a pair is an object with `chosen`'),
    'a number': (pair(3, 'a', 'b'), 'prompt is a number, not a text or messages'),
    'null': (pair('a', None, 'b'), 'chosen is null, not a text or messages'),
    'no messages': (pair('a', [], 'b'), 'chosen is empty'),
    'no content': (pair('a', [{'role': 'assistant'}], 'b'), r'chosen\[0\].content is missing'),
    'another prompt': (pair('A', turns('A', 'x'), turns('B', 'y')), "rejected neither begins .*: the user says, 'B'"),
    'a prompt with a blank': (pair('A', turns('A ', 'x'), turns('A ', 'y')), "chosen neither begins .* says, 'A '"),
    'half of the prompt': (
        pair(system('S') + turns('A'), turns('A', 'x'), turns('A', 'y')), 'chosen neither begins with the prompt',
    ),
    'prompts that begin alike': (
        {'chosen': system('S') + turns('A', 'x'), 'rejected': system('S') + turns('B', 'y')}, 'no common prompt',
    ),
    'later questions': (
        {'chosen': turns('a', 'b', 'c', 'd'), 'rejected': turns('a', 'b', 'e', 'd')}, 'no common prompt: they differ',
    ),
    'ends with the user': (pair('a', turns('b'), 'c'), 'chosen does not end with what the assistant says'),
    'tools': (pair('a', 'b', 'c') | {'tools': 3}, 'tools is a number, not an array'),
    'tools that a template leaves out': (pair('a', 'b', 'c') | {'tools': [{'name': 'f'}]}, 'does not know tools'),
    'calls of them': (pair('a', [{'role': 'assistant', 'tool_calls': [{'name': 'f'}]}], 'c'), 'not know tool_calls'),
    'an unknown role': (pair([{'role': 'judge', 'content': 'x'}], 'b', 'c'), "does not know the role judge"),
}  # fmt: skip


@pytest.mark.parametrize('record, words', BAD.values(), ids=BAD)
def test_bad_records_are_named(tmp_path, record, words):
    path = write(tmp_path / 'a', [pair('a', 'b', 'c'), record])
    with pytest.raises(DataError, match=rf'^{path}:2: .*{words}') as error:
        open_(path)
    assert '\n' not in str(error.value) and error.value.code == 4


def test_bad_files(tmp_path):
    (tmp_path / 'empty').write_text('')
    with pytest.raises(DataError, match='no records in this file'):
        open_(tmp_path / 'empty')
    (tmp_path / 'text').write_text('{"prompt": ')
    with pytest.raises(DataError, match='text:1: not JSON'):
        open_(tmp_path / 'text')
    with pytest.raises(
        DataError, match=r'none of 1 pairs can be learned from in config.seq_length=12 tokens: 1 have two'
    ):
        open_(write(tmp_path / 'same', [pair('a', 'b', 'b')]))
    with pytest.raises(DataError, match='tokens: 2 have a prompt that leaves no room, the first of them .*long:1$'):
        open_(write(tmp_path / 'long', [pair('too long for', 'b', 'c')] * 2))


def test_bad_keys(tmp_path):
    path = write(tmp_path / 'a', [pair('a', 'b', 'c')])
    with pytest.raises(UsageError, match=r'config.task.name=preference needs config.data.mode=pad or pack'):
        open_(path, 'concat')
    with pytest.raises(UsageError, match=r'config.data.source=jsonl or stdlib, not text'):
        open_(path, source='text')


def test_the_stated_rule_of_the_library():
    """The shorter answer is chosen."""
    made = open_('', source='stdlib', T=384)
    assert made.num_pairs > 500
    assert np.all(made.lengths.sum(1) <= 384) and np.all(made.lengths[:, 0] <= made.lengths[:, 1])


def test_an_evaluation_mixes_packed_rows(tmp_path):
    path = write(tmp_path / 'a', [pair('a' * (1 + n % 20), f'{n}', 'x') for n in range(100)])
    for mode, mixed in (('pad', False), ('pack', True)):
        found = open_(path, mode, 60)
        [batch] = batches.mixed(found, len(found))
        rows = found.batch(range(len(found)))['inputs']
        assert (batch['inputs'] != rows).any() == mixed
        assert sorted(map(bytes, batch['inputs'])) == sorted(map(bytes, rows))


def test_rows_with_a_reference_are_read_in_the_same_order(tmp_path):
    path = write(tmp_path / 'a', [pair('a' * (1 + n % 20), f'{n}', 'x') for n in range(100)])
    found = open_(path, 'pack', 60)
    numbered = pairs.WithReference(found, np.arange(len(found), dtype=np.float32)[:, None])
    [plain], [batch] = batches.mixed(found, len(found)), batches.mixed(numbered, len(found))
    np.testing.assert_array_equal(plain['inputs'], batch['inputs'])
    by_number = found.batch(batch[pairs.REFERENCE][:, 0].astype(int))
    np.testing.assert_array_equal(by_number['inputs'], batch['inputs'])
    [ordered] = batches.evaluation(numbered, len(found))
    assert ordered[pairs.REFERENCE][:, 0].tolist() == list(range(len(found)))

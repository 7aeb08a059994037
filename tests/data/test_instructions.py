"""Rows of conversations: masks in both modes, by expectation written by hand, what is cut, dropped and held out."""

import json
import pickle

import numpy as np
import pytest

from mixln_jax import config
from mixln_jax.data import batches, learned_rows, rows, tokenizers
from mixln_jax.system.errors import DataError, UsageError

BYTES = tokenizers.Bytes()
PAD, EOS = BYTES.pad_id, BYTES.eos_id
TASK = config.Task(name='instructions')


def pair(prompt, completion):
    return {'prompt': prompt, 'completion': completion}


def write(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def talk(texts):
    """A conversation: a letter a turn, the first one of the system."""
    roles = ['system', *('user', 'assistant') * len(texts)]
    return {'messages': [{'role': role, 'content': text} for role, text in zip(roles, texts, strict=False)]}


def open_(path, mode='pad', T=8, split='all', task=TASK, vocab_size=259, **changes):
    data = {'source': 'jsonl', 'path': str(path), 'tokenizer': 'bytes', 'template': 'plain', 'mode': mode}
    return rows.open_rows(config.Data(**data | changes), split, BYTES, T, vocab_size, task)


def letters(ids):
    """Ids as text, . for the end of a turn, - for padding."""
    return ''.join({PAD: '-', EOS: '.'}.get(i) or chr(i) for i in ids)


def shown(of, number=0):
    """(inputs, targets, loss_mask) of a row, a letter a position."""
    batch = of.batch([number])
    mask = ''.join('01'[int(value)] for value in batch['loss_mask'][0])
    return letters(batch['inputs'][0].tolist()), letters(batch['targets'][0].tolist()), mask


class TestMasks:
    MASKS = {
        'a pair': (pair('Hi', 'yo'), 'Hiyo.---', 'iyo.----', '01110000'),
        'an empty completion': (pair('Hi', ''), 'Hi.-----', 'i.------', '01000000'),
        'an empty prompt': (pair('', 'yo'), 'yo.-----', 'o.------', '11000000'),  # a first token is no target
        'an exact fit': (pair('Hi', 'seven!'), 'Hiseven!', 'iseven!.', '01111111'),
        'cut at the end': (pair('Hi', 'sevent!'), 'Hisevent', 'isevent!', '01111111'),
        'cut in the completion': (pair('Hiseven', 'yo yo'), 'Hiseveny', 'isevenyo', '00000011'),
        'one token left': (pair('Hi seven', 'yo'), 'Hi seven', 'i seveny', '00000001'),
        'an instruction': (
            {'instruction': 'a', 'input': 'b', 'output': 'c'}, 'a\n\nbc.--', '\n\nbc.---', '00011000',
        ),
        'several turns': (talk('Sabcde'), 'Sab.cd.-', 'ab.cd.--', '01101100'),
        'several turns, cut': (talk('Sabcdefgh'), 'Sab.cd.e', 'ab.cd.ef', '01101101'),
        'markers': (pair('.-', '</s>'), '.-</s>.-', '-</s>.--', '01111100'),
    }  # fmt: skip

    @pytest.mark.parametrize('mode', ['pad', 'pack'])
    @pytest.mark.parametrize('record, inputs, targets, mask', MASKS.values(), ids=MASKS)
    def test_by_hand(self, tmp_path, mode, record, inputs, targets, mask):
        assert shown(open_(write(tmp_path / 'a', [record]), mode)) == (inputs, targets, mask)

    def test_all_tokens(self, tmp_path):
        task = config.Task(name='instructions', learn='all')
        path = write(tmp_path / 'a', [pair('Hi', 'yo')])
        assert shown(open_(path, task=task)) == ('Hiyo.---', 'iyo.----', '11110000')

    def test_packed(self, tmp_path):
        """The longest first, each of the others where it fits best."""
        path = write(tmp_path / 'a', [pair('a', 'b'), pair('cd', 'ef'), pair('g', ''), pair('hijklm', 'n')])
        packed = open_(path, 'pack')
        assert [shown(packed, i) for i in range(len(packed))] == [
            ('hijklmn.', 'ijklmn.-', '00000110'),
            ('cdef.ab.', 'def.ab.-', '01110110'),
            ('g.------', '.-------', '10000000'),
        ]
        assert [packed.origin(i) for i in range(3)] == [f'{path}:4', f'{path}:2, {path}:1', f'{path}:3']
        batch = packed.batch([1, 2])
        assert batch['segment_ids'].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 0, 0, 0, 0, 0, 0]]
        assert batch['positions'].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0, 0]]

    def test_an_eos_that_is_padding_too(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tokenizers.Bytes, 'pad_id', EOS)
        path = write(tmp_path / 'a', [pair('Hi', 'yo')])
        for mode in ('pad', 'pack'):
            assert shown(open_(path, mode)) == ('Hiyo....', 'iyo.....', '01110000')


def test_pack():
    """Against a plain search, of random lengths."""
    lengths = np.random.default_rng(0).integers(1, 21, 300).tolist()
    wanted: list[list[int]] = []
    for number in sorted(range(300), key=lambda number: -lengths[number]):
        rooms = [20 - sum(lengths[i] for i in row) for row in wanted]
        fitting = [room for room in rooms if room >= lengths[number]]
        if fitting:
            last = max(i for i, room in enumerate(rooms) if room == min(fitting))
            wanted[last].append(number)
        else:
            wanted.append([number])
    packed = learned_rows.pack(lengths, 20)
    assert sorted(sum(packed, [])) == list(range(300))
    used = lambda rows: sorted(sum(lengths[i] for i in row) for row in rows)  # noqa: E731
    assert used(packed) == used(wanted) and max(used(packed)) <= 20


def test_what_is_cut_and_dropped_is_said(tmp_path, capsys):
    records = [
        pair('Hi', 'yo'),
        pair('Hi seven!', 'yo'),
        pair('Hi', 'a long one'),
        {'prompt': 'long enough', 'completion': ''},
    ]
    path = write(tmp_path / 'a', records)
    made = open_(path)
    assert len(made) == 2 and made.origin(1) == f'{path}:3'
    assert capsys.readouterr().err.splitlines() == [
        'mixln_jax: all: 2 conversations in 2 rows; 10 of 14 tokens are learned',
        'mixln_jax: warning: all: 3 of 4 records are cut to config.seq_length=8',
        f'mixln_jax: warning: all: 2 of 4 records have nothing to learn and are left out, the first of them {path}:2',
    ]


def test_a_conversation_without_an_answer_is_dropped(tmp_path, capsys):
    path = write(tmp_path / 'a', [talk('S'), talk('Sab')])
    assert open_(path).origin(0) == f'{path}:2'
    assert (
        f'1 of 2 records have nothing to learn and are left out, the first of them {path}:1' in capsys.readouterr().err
    )


class TestHeldOut:
    RECORDS = [pair(f'question {i}', f'answer {i}') for i in range(200)]

    @staticmethod
    def origins(path, split, **changes):
        made = open_(path, T=64, split=split, **changes)
        return {made.origin(i) for i in range(len(made))}

    def test_splits(self, tmp_path):
        path = write(tmp_path / 'a', self.RECORDS)
        train, held_out = (self.origins(path, split, held_out=0.2) for split in ('train', 'validation'))
        assert not train & held_out and len(train | held_out) == 200 and 20 <= len(held_out) < 60
        assert self.origins(path, 'all', held_out=0.2) == train | held_out
        assert len(self.origins(path, 'validation', held_out=0.01)) == 20  # at least
        assert len(self.origins(path, 'train', held_out=0.0)) == 200

    def test_order_and_equal_records_do_not_matter(self, tmp_path):
        """A record is in the same split wherever it is, and whatever beside it."""
        words = lambda path, split: {  # noqa: E731
            letters(row) for row in open_(path, T=64, split=split, held_out=0.3).batch(range(20))['inputs'].tolist()
        }
        one = write(tmp_path / 'a', self.RECORDS)
        two = write(tmp_path / 'b', self.RECORDS[::-1] + self.RECORDS)
        for split in ('train', 'validation'):
            held = {s: self.origins(one, s, held_out=0.3) for s in ('train', 'validation')}
            assert len(self.origins(two, split, held_out=0.3)) == 2 * len(held[split])
        assert not words(two, 'train') & words(one, 'validation')

    def test_none(self, tmp_path):
        path = write(tmp_path / 'a', self.RECORDS)
        with pytest.raises(UsageError, match='^config.data.held_out=0 leaves no record for the split validation'):
            open_(path, split='validation', held_out=0.0)
        with pytest.raises(UsageError, match='has no split test, only'):
            open_(path, split='test')
        with pytest.raises(DataError, match='only one document.*held_out=0'):
            open_(write(tmp_path / 'b', self.RECORDS[:1]), split='train')


def test_fingerprint(tmp_path):
    path = write(tmp_path / 'a', [pair('Hi', 'yo'), pair('a', 'b')])
    one = open_(path).fingerprint
    assert open_(write(tmp_path / 'b', [pair('Hi', 'yo'), pair('a', 'b')])).fingerprint == one
    others = {
        'source': open_(write(tmp_path / 'c', [pair('Hi', 'you'), pair('a', 'b')])),
        'template': open_(path, template='chatml', T=64),
        'learn': open_(path, task=config.Task(name='instructions', learn='all')),
        'mode': open_(path, 'pack'),
        'seq_length': open_(path, T=9),
    }
    for name, other in others.items():
        assert other.fingerprint[name] != one[name] and other.fingerprint.keys() == one.keys()
        assert {part for part in one if one[part] != other.fingerprint[part]} - {'seq_length'} <= {name}


def test_rows_travel_to_workers_and_into_batches(tmp_path):
    path = write(tmp_path / 'a', [pair(f'{i}', 'yo') for i in range(5)])
    made = open_(path, 'pack')
    again = pickle.loads(pickle.dumps(made))
    for name, values in made.batch([1, 0]).items():
        np.testing.assert_array_equal(again.batch([1, 0])[name], values)
    last = batches.evaluation(made, 4)[0]
    assert last['loss_mask'].shape == (4, 8) and last['loss_mask'].sum() == 5 * 3


class TestWhatIsWrong:
    GOOD = [pair('Hi', 'yo')]
    KEYS = {
        'source': (dict(source='tfds'), 'config.data.source=jsonl or stdlib or shelves, not tfds'),
        'mode': (dict(mode='concat'), 'config.data.mode=pad or pack, not concat'),
        'vocabulary': (dict(vocab_size=258), 'the tokenizer bytes has 259 ids, more than config.model.vocab_size=258'),
    }

    @pytest.mark.parametrize('changes, message', KEYS.values(), ids=KEYS)
    def test_keys(self, tmp_path, changes, message):
        with pytest.raises(UsageError, match=message):
            open_(write(tmp_path / 'a', self.GOOD), **changes)

    def test_an_error_of_a_template_names_the_line(self, tmp_path):
        records = [talk('Sab'), {'messages': [{'role': 'tool', 'content': 'x'}]}]
        with pytest.raises(DataError, match=f'^{tmp_path}/a:2: the template plain: .*the role tool$'):
            open_(write(tmp_path / 'a', records))

    @pytest.mark.parametrize(
        'records, reason',
        [
            ([talk('S'), talk('Sa')], 'none has an answer of the assistant'),
            ([{'prompt': 'x' * 20, 'completion': 'y'}] * 2, 'raise config.seq_length'),
        ],
        ids=['no answers', 'long prompts'],
    )
    def test_nothing_to_learn(self, tmp_path, records, reason):
        path = write(tmp_path / 'a', records)
        with pytest.raises(DataError, match=f'^none of . records has anything .*=8.*first of them {path}:1: {reason}$'):
            open_(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(DataError, match='there is no file'):
            open_(tmp_path / 'a')


def evaluated(of, size=4):
    """Returns the real rows of an evaluation in the order in which it reads them, as bytes of their inputs."""
    found = list(batches.mixed(of, size))
    return [batch['inputs'][row].tobytes() for batch in found for row in np.flatnonzero(batch['example_mask'])]


def test_an_evaluation_of_a_part_is_unbiased(tmp_path):
    """Packed rows begin with the longest records; what an evaluation reads first is like the whole."""
    path = write(tmp_path / 'a', [pair('a' * (2 + n % 50), f'{n}') for n in range(400)])
    packed, padded = (open_(path, mode, 60) for mode in ('pack', 'pad'))
    longest = [int(packed.batch([row])['positions'].max()) for row in range(len(packed))]
    assert longest == sorted(longest, reverse=True)
    by_row = {packed.batch([row])['inputs'].tobytes(): longest[row] for row in range(len(packed))}
    read = evaluated(packed)
    part = len(packed) // 4
    error = np.std(longest) / part**0.5
    assert abs(np.mean([by_row[row] for row in read[:part]]) - np.mean(longest)) < 2 * error
    assert sorted(read) == sorted(by_row), 'each row comes once'
    assert evaluated(padded) == [padded.batch([row])['inputs'].tobytes() for row in range(len(padded))]

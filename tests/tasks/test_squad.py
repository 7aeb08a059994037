"""SQuAD: three questions worked out by hand, transformers' own numbers, and what is refused."""

import copy
import json
import re

import numpy as np
import pytest
import tokenizers
from questions import CONTEXT, GOLDEN, VOCABULARY, golden_features, write_json, write_vocabulary

from mixln_jax.data import batches, squad
from mixln_jax.models.hf import bert as hf_bert
from mixln_jax.system.errors import CheckpointError, DataError, NumericsError, UsageError
from mixln_jax.tasks import question_answering

TOKENS = re.findall(r'\w+|[.,]', 'the big cat, a red cat, sat on the mat. then the dog ran.')
THREE = {
    'version': 'v2.0',
    'data': [
        {
            'title': 'animals',
            'paragraphs': [
                {
                    'context': CONTEXT,
                    'qas': [
                        {'id': 'sat', 'question': 'Who sat?', 'answers': [{'text': 'cat'}, {'text': 'big cat'}]},
                        {'id': 'ran', 'question': 'Who ran?', 'answers': [{'text': 'the dog'}]},
                        {'id': 'slept', 'question': 'Who slept?', 'answers': [], 'is_impossible': True},
                    ],
                }
            ],
        }
    ],
}


@pytest.fixture
def folder(tmp_path):
    return write_vocabulary(tmp_path)


@pytest.fixture
def three(folder):
    """(examples, features) of the three questions in one window each, 24 tokens."""
    examples = squad.read(write_json(folder / 'three.json', THREE))
    return examples, squad.make_features(examples, squad.open_tokenizer(folder), 24, 8, 8)


def tokens(features, row):
    return [VOCABULARY[id] for id in features.inputs[row]]


class TestRead:
    def test_three_questions(self, three):
        examples, _ = three
        assert [example.id for example in examples] == ['sat', 'ran', 'slept']
        assert examples[0] == squad.Question(
            'sat', 'Who sat?', CONTEXT, ('cat', 'big cat'), False, CONTEXT.index('cat')
        )
        assert (examples[2].answers, examples[2].nullable) == ((), True)

    @pytest.mark.parametrize(
        'at, value, message',
        [
            (('data',), {}, 'data is not a list'),
            (('data',), [], 'has no questions'),
            (('data', 0), 'text', r'data\[0\].paragraphs is not a list'),
            (('data', 0, 'paragraphs', 0, 'context'), None, r'data\[0\].paragraphs\[0\].context is not a text'),
            (('data', 0, 'paragraphs', 0, 'qas', 1, 'id'), 7, r'paragraphs\[0\].qas\[1\].id is not a text'),
            (('data', 0, 'paragraphs', 0, 'qas', 1, 'answers'), [{}], r'qas\[1\].answers\[0\].text is not a text'),
            (('data', 0, 'paragraphs', 0, 'qas', 1, 'answers'), [], 'question ran has no answer, but is not is_imposs'),
            (('data', 0, 'paragraphs', 0, 'qas', 1, 'is_impossible'), True, 'question ran is impossible, but has answ'),
            (('data', 0, 'paragraphs', 0, 'qas', 1, 'is_impossible'), 'no', 'is_impossible is not true or false'),
            (('data', 0, 'paragraphs', 0, 'qas', 1, 'id'), 'sat', 'two questions have the id sat'),
        ],
    )
    def test_malformed(self, tmp_path, at, value, message):
        content = copy.deepcopy(THREE)
        inside = content
        for part in at[:-1]:
            inside = inside[part]
        inside[at[-1]] = value
        with pytest.raises(DataError, match=rf'bad\.json:? .*{message}'):
            squad.read(write_json(tmp_path / 'bad.json', content))

    @pytest.mark.parametrize('text', ['cat', 'big cat', CONTEXT, 'The', 'ran.', 'red cat,\nsat'])
    @pytest.mark.parametrize('shift', [-2, 0, 1, 2])
    def test_answers_where_they_stand(self, tmp_path, text, shift):
        """Or nearly."""
        start = min(max(CONTEXT.index(text) + shift, 0), len(CONTEXT) - 1)
        content = copy.deepcopy(THREE)
        content['data'][0]['paragraphs'][0]['qas'][1]['answers'] = [{'text': text, 'answer_start': start}]
        assert squad.read(write_json(tmp_path / 'good.json', content))[1].answers == (text,)

    @pytest.mark.parametrize(
        'answer, message',
        [
            (
                {'text': 'cat', 'answer_start': 12},
                "the answer 'cat' does not stand in the context at its answer_start, 12",
            ),
            (
                {'text': 'cow', 'answer_start': 8},
                "the answer 'cow' does not stand in the context at its answer_start, 8",
            ),
            ({'text': 'cat', 'answer_start': 11}, 'does not stand in the context at its answer_start, 11'),
            ({'text': 'cat', 'answer_start': 5}, 'does not stand in the context at its answer_start, 5'),
            ({'text': 'Cat', 'answer_start': 8}, "the answer 'Cat' does not"),
            ({'text': 'cat', 'answer_start': -3}, f'answer_start is -3, the context has {len(CONTEXT)} characters'),
            ({'text': 'cat', 'answer_start': len(CONTEXT)}, f'answer_start is {len(CONTEXT)}, the context has'),
            ({'text': 'cat', 'answer_start': 10**9}, 'answer_start is 1000000000, '),
            ({'text': 'cat', 'answer_start': '8'}, "answer_start is '8', "),
            ({'text': 'cat', 'answer_start': 8.0}, 'answer_start is 8.0, '),
            ({'text': 'The', 'answer_start': False}, 'answer_start is False, '),
            ({'text': CONTEXT + '!', 'answer_start': 0}, 'does not stand in the context'),
            ({'text': '', 'answer_start': 0}, 'the text of an answer is empty'),
            ({'text': ''}, 'the text of an answer is empty'),
            ({'text': ' \n', 'answer_start': 23}, 'the text of an answer is empty'),
        ],
    )
    @pytest.mark.parametrize('others', [[], [{'text': 'cat', 'answer_start': 8}]])
    def test_answers_that_are_not_in_the_context(self, tmp_path, answer, message, others):
        content = copy.deepcopy(THREE)
        content['data'][0]['paragraphs'][0]['qas'][1]['answers'] = [*others, answer]
        with pytest.raises(DataError) as caught:
            squad.read(write_json(tmp_path / 'bad.json', content))
        said = str(caught.value)
        assert said.startswith(f'{tmp_path}/bad.json: question ran: ') and message in said and '\n' not in said

    @pytest.mark.parametrize('context', ['', ' ', '\n\t '])
    def test_an_empty_context(self, tmp_path, context):
        content = copy.deepcopy(THREE)
        content['data'][0]['paragraphs'][0]['context'] = context
        with pytest.raises(DataError, match=r'bad\.json: data\[0\]\.paragraphs\[0\]\.context is empty$'):
            squad.read(write_json(tmp_path / 'bad.json', content))

    def test_json_lines(self, tmp_path):
        (tmp_path / 'a.jsonl').write_text(f'{json.dumps(THREE)}\n' * 2)
        with pytest.raises(DataError, match=r'a\.jsonl: not .*; a file of SQuAD is one object, not one a line$'):
            squad.read(tmp_path / 'a.jsonl')

    @pytest.mark.parametrize('content', [None, b'{', b'\xff', b'[]'])
    def test_no_json_or_no_object(self, tmp_path, content):
        if content:
            (tmp_path / 'bad.json').write_bytes(content)
        with pytest.raises(DataError, match=r'bad\.json'):
            squad.read(tmp_path / 'bad.json')


class TestTokenizer:
    def test_either_form_of_the_files(self, folder):
        old = squad.open_tokenizer(folder)
        ids = old.encode('The CATS, cat').ids
        assert ids == [VOCABULARY.index(token) for token in ('[CLS]', 'the', 'cat', '##s', ',', 'cat', '[SEP]')]
        old.save(str(folder / 'tokenizer.json'))
        (folder / 'vocab.txt').unlink()
        # A tokenizer.json may say how to cut and pad; the rows here are made otherwise.
        whole = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
        whole.enable_truncation(3)
        whole.enable_padding(length=9)
        whole.save(str(folder / 'tokenizer.json'))
        assert squad.open_tokenizer(folder).encode('The CATS, cat').ids == ids

    def test_letters_of_both_cases(self, folder):
        write_json(folder / 'tokenizer_config.json', {'do_lower_case': False})
        assert squad.open_tokenizer(folder).encode('The cat', add_special_tokens=False).tokens == ['[UNK]', 'cat']

    def test_files_that_are_refused(self, folder):
        write_json(folder / 'tokenizer_config.json', {})
        with pytest.raises(CheckpointError, match='tokenizer_config.json does not say do_lower_case'):
            squad.open_tokenizer(folder)
        (folder / 'tokenizer_config.json').unlink()
        with pytest.raises(UsageError, match='neither tokenizer.json nor both of vocab.txt and tokenizer_config.json'):
            squad.open_tokenizer(folder)
        (folder / 'tokenizer.json').write_text('{')
        with pytest.raises(CheckpointError, match='its tokenizer is not readable: '):
            squad.open_tokenizer(folder)
        tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(folder / 'tokenizer.json'))
        with pytest.raises(CheckpointError, match=r"no token \[CLS\], so it is not BERT's"):
            squad.open_tokenizer(folder)


class TestFeatures:
    def test_one_window(self, three):
        _, features = three
        assert features.inputs.shape == (3, 24)
        # Of 'Who sat?' the question mark is not in the vocabulary.
        assert tokens(features, 0) == ['[CLS]', 'who', 'sat', '[UNK]', '[SEP]', *TOKENS, '[SEP]']
        np.testing.assert_array_equal(features.types[0], [0] * 5 + [1] * 19)
        np.testing.assert_array_equal(features.context[0], [0] * 5 + [1] * 18 + [0])
        np.testing.assert_array_equal(features.begins, features.context)
        assert [CONTEXT[a:b].lower() for a, b in features.offsets[0, 5:23]] == TOKENS
        assert {name: getattr(features, name).dtype for name in ('inputs', 'types', 'token_mask')} == {
            **{'inputs': np.int32, 'types': np.int32, 'token_mask': np.float32}
        }

    def test_windows(self, folder, three):
        """18 tokens of text in rows that have room for 8, 3 apart; the question is cut to two tokens."""
        examples, _ = three
        features = squad.make_features(examples[:1], squad.open_tokenizer(folder), 13, 3, 2)
        assert [' '.join(tokens(features, row)[4:-1]) for row in range(5)] == [
            'the big cat , a red cat ,',
            ', a red cat , sat on the',
            'cat , sat on the mat . then',
            'on the mat . then the dog ran',
            '. then the dog ran . [SEP] [PAD]',
        ]
        np.testing.assert_array_equal(features.token_mask[4], [1] * 11 + [0] * 2)
        np.testing.assert_array_equal(features.context[4], [0] * 4 + [1] * 6 + [0] * 3)
        # Token 5 has two tokens at its narrower side in both of the first two windows, so the first has it; token 6 has
        # one in the first, three in the second.
        starts = [np.flatnonzero(row) - 4 + 3 * window for window, row in enumerate(features.begins)]
        assert [part.tolist() for part in starts] == [
            [0, 1, 2, 3, 4, 5],
            [6, 7, 8],
            [9, 10, 11],
            [12, 13, 14],
            [15, 16, 17],
        ]

    def test_where_the_first_answer_is(self, folder):
        """[CLS] where the window does not hold all of it, masked where nobody says; characters may be off by two."""
        context = 'the cat sat on the mat, the dog ran'
        asked = [
            squad.Question('a', 'who', context, ('cat sat',), False, 4),
            squad.Question('b', 'who', context, ('dog',), False, context.index('dog')),
            squad.Question('c', 'who', context, (), True),
            squad.Question('d', 'who', context, ('bird',), False),
        ]
        features = squad.make_features(asked, squad.open_tokenizer(folder), 10, 3, 2)
        for row, number in enumerate(features.example):
            first, last = features.answer[row]
            shown = context[features.offsets[row, first, 0] : features.offsets[row, last, 1]]
            whole = not features.questions[number].answers or shown == features.questions[number].answers[0]
            assert whole if last else not first, row
            assert features.answer_mask[row] == (number != 3)
        for number in (0, 1):  # some window holds it
            assert features.answer[features.example == number].any()
        assert not features.answer[features.example > 1].any()

    def test_batches(self, three):
        _, features = three
        first, last = batches.evaluation(features, 2)
        assert all(last[name].shape == (2, 24) for name in ('inputs', 'types', 'token_mask'))
        np.testing.assert_array_equal(first['inputs'], features.inputs[:2])
        np.testing.assert_array_equal(last['token_mask'].sum(axis=1), [24, 0])

    def test_a_text_without_tokens_has_a_row_still(self, folder):
        features = squad.make_features(
            [squad.Question('', 'who', '', ('a',), False)], squad.open_tokenizer(folder), 9, 1, 2
        )
        assert tokens(features, 0) == ['[CLS]', 'who', '[SEP]', '[SEP]', *['[PAD]'] * 5]
        start, end = np.ones((2, 1, 9))
        assert question_answering.best_answers(
            start, end, features, [squad.Question('', 'who', '', ('a',), False)]
        ) == ['']

    @pytest.mark.parametrize('sizes', [(11, 8, 8), (24, 0, 8), (24, 8, 0)])
    def test_sizes(self, folder, sizes):
        with pytest.raises(UsageError, match='stride and max_query must be at least 1, max_length at least max_query'):
            squad.make_features([], squad.open_tokenizer(folder), *sizes)


class TestScores:
    """Three questions: an exact answer, a part of one, and one that cannot be answered, or is all the same."""

    def logits(self, *spans):
        """[3,24]: 5 at the beginning, and the end, of each question's span (tokens of the text); at [CLS] 2."""
        start, end = np.full((2, 3, 24), -1.0, np.float32)
        for row, (first, last) in enumerate(spans):
            start[row, 0] = end[row, 0] = 2
            start[row, 5 + first], end[row, 5 + last] = 5, 5
        return start, end

    def test_by_hand(self, three):
        examples, features = three
        start, end = self.logits((1, 2), (12, 15), (17, 17))
        start[2, 5 + 17] = end[2, 5 + 17] = 1.5  # less than at [CLS]
        texts = question_answering.best_answers(start, end, features, examples)
        assert texts == ['big cat', '.  Then the dog', '']
        found = question_answering.scores(texts, examples)
        # 'then dog' against 'dog', without article and full stop: precision 1/2, recall 1.
        np.testing.assert_allclose(found['exact_match'], [1, 0, 1], rtol=0, atol=0)
        np.testing.assert_allclose(found['f1'], [1, 2 / 3, 1], rtol=1e-15)

    def test_an_answer_where_there_is_none(self, three):
        examples, features = three
        texts = question_answering.best_answers(*self.logits((0, 3), (14, 15), (17, 17)), features, examples)
        assert texts == ['The big cat,', 'the dog', '.']
        found = question_answering.scores(texts, examples)
        np.testing.assert_array_equal(found['exact_match'], [1, 1, 1])  # '.' has no words, which is no answer
        found = question_answering.scores(['cat sat', 'mat', 'red'], examples)
        np.testing.assert_allclose(found['f1'], [2 / 3, 0, 0])
        np.testing.assert_array_equal(found['exact_match'], [0, 0, 0])

    def test_spans_that_are_none(self, three, monkeypatch):
        """Backwards, too long, outside of the text, or where another window shows more: the next best is taken."""
        examples, features = three
        start, end = self.logits((6, 2), (0, 16), (1, 1))
        start[0, 5 + 1], start[1, 5 + 15], start[2, 2] = 3, 2, 9
        monkeypatch.setattr(question_answering, 'LONGEST', 16)
        assert question_answering.best_answers(start, end, features, examples) == ['big cat', 'dog ran', 'big']
        features.begins[0, 6] = False
        assert question_answering.best_answers(start, end, features, examples)[0] == 'cat'

    def test_no_answer_only_in_files_that_have_such(self, three):
        examples, features = three
        start, end = self.logits((1, 2), (14, 15), (17, 17))
        start[:, 0] = end[:, 0] = 9
        assert question_answering.best_answers(start, end, features, examples) == ['big cat', 'the dog', '']

    @pytest.mark.parametrize(
        'first, second, answer',
        [
            ((3.0, 1.5), (0.5, 1.25), 'the dog'),  # 4.5 and 1.75, of which the smaller counts: below 4
            ((0.5, 1.25), (3.0, 1.5), 'the dog'),
            ((3.0, 1.5), (3.0, 1.25), ''),  # 4.5 and 4.25
            ((2.5, 1.75), (2.0, 2.0), 'the dog'),  # 4.25 and 4, as good as the answer, which then is given
            ((2.0, 2.25), (2.5, 1.75), ''),
        ],
    )
    def test_no_answer_is_as_good_as_in_the_worst_window(self, folder, three, first, second, answer):
        """A question whose text takes two windows, and (start, end) at [CLS] in each; the best span sums up to 4."""
        examples, _ = three
        example = examples[2]
        features = squad.make_features([example], squad.open_tokenizer(folder), 20, 8, 3)
        assert features.example.tolist() == [0, 0] and 'the dog ran' in ' '.join(tokens(features, 1))
        start, end = np.full((2, 2, 20), -9.0, np.float32)
        start[:, 0], end[:, 0] = zip(first, second, strict=True)
        at = tokens(features, 1).index('dog')
        assert features.begins[1, at - 1]
        start[1, at - 1], end[1, at] = 1.0, 3.0
        assert question_answering.best_answers(start, end, features, [example]) == [answer]

    def test_the_n_best(self, three, monkeypatch):
        """A pair of which one is not among them is not looked at."""
        examples, features = three
        start, end = self.logits((6, 2), (14, 15), (17, 17))
        start[0, 5 + 1] = 1
        monkeypatch.setattr(question_answering, 'N_BEST', 2)
        assert question_answering.best_answers(start, end, features, examples)[0] == ''
        monkeypatch.setattr(question_answering, 'N_BEST', 3)
        assert question_answering.best_answers(start, end, features, examples)[0] == 'big cat'

    @pytest.mark.parametrize(
        'text, gold, exact, f1',
        [
            ('The  Cat!', 'a cat', 1, 1),
            ("the cat's mat", 'cats mat', 1, 1),
            ('cat cat dog', 'cat mat', 0, 0.4),
            ('', 'the', 1, 1),
            ('', 'cat', 0, 0),
            ('theatre', 'atre', 0, 0),
        ],
    )
    def test_words(self, text, gold, exact, f1):
        assert (question_answering.exact_match(text, gold), question_answering.f1(text, gold)) == (
            exact,
            pytest.approx(f1),
        )


@pytest.fixture(scope='module')
def golden():
    return hf_bert.load(GOLDEN)


class TestGolden:
    """transformers 4's SQuAD pipeline, with random weights; see golden/README.md."""

    @pytest.mark.parametrize('version', ['v1', 'v2'])
    def test_rows_logits_answers_and_scores(self, golden, version):
        examples, features, expected = golden_features(version)
        for name, former in (('inputs', 'inputs'), ('types', 'types'), ('token_mask', 'weights')):
            np.testing.assert_array_equal(getattr(features, name), expected[former])
        start, end = question_answering.logits(*golden, features, batch_size=8)
        real = features.token_mask > 0
        np.testing.assert_allclose(start[real], np.array(expected['start'])[real], rtol=0, atol=1e-4)
        np.testing.assert_allclose(end[real], np.array(expected['end'])[real], rtol=0, atol=1e-4)
        texts = question_answering.best_answers(start, end, features, examples)
        assert dict(zip([example.id for example in examples], texts, strict=True)) == expected['predictions']
        found = question_answering.evaluate(*golden, features, examples, batch_size=8)
        for name in ('exact_match', 'f1'):
            assert found[name].shape == (8,)
            assert 100 * found[name].mean() == pytest.approx(expected[name], abs=1e-9)
        assert 100 * question_answering.scores(['cat', *texts[1:]], examples)['f1'].mean() != pytest.approx(
            expected['f1']
        )

    def test_losses(self, golden):
        """The mean of two cross-entropies over all positions; rows without answer or that fill up have none."""
        model, params = golden
        _, features, _ = golden_features('v1')
        features.answer_mask[3] = 0
        logits = np.stack(question_answering.logits(model, params, features, 8), 1).astype(np.float64)  # [N, 2, T]
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [
            -(row[0, first] + row[1, last]) / 2 * mask
            for row, (first, last), mask in zip(log_probs, features.answer, features.answer_mask, strict=True)
        ]
        task, sums, per_example = question_answering.QuestionAnswering(model), 0, []
        for batch in batches.evaluation(features, 8):
            losses = task.losses(params, batch)
            sums += np.array([losses.sum, losses.weight, losses.metrics['tokens']])
            per_example += [*losses.per_example]
        assert expected[3] == 0 and len(features) % 8 and len(per_example) > len(features)
        np.testing.assert_allclose(per_example[: len(features)], expected, rtol=1e-5)
        assert not np.any(per_example[len(features) :])
        np.testing.assert_allclose(sums, [sum(expected), len(features) - 1, features.token_mask.sum()], rtol=1e-5)

    def test_another_network_gives_other_answers(self, golden):
        examples, features, expected = golden_features('v1')
        model, params = golden
        moved = params | {'span': {name: leaf + 0.3 * np.cos(np.arange(leaf.size)).reshape(leaf.shape)
                                   for name, leaf in params['span'].items()}}  # fmt: skip
        texts = question_answering.best_answers(
            *question_answering.logits(model, moved, features, 8), features, examples
        )
        assert texts != list(expected['predictions'].values())

    def test_one_program_whatever_is_removed(self, golden):
        examples, features, _ = golden_features('v1')
        whole = question_answering.evaluate(*golden, features, examples, batch_size=8)
        programs = question_answering._logits._cache_size()
        again = question_answering.evaluate(*golden, features, examples, batch_size=8, layer_mask=[True] * 3)
        np.testing.assert_array_equal(again['f1'], whole['f1'])
        full = question_answering.logits(*golden, features, 8)
        for layer in range(3):
            start, end = question_answering.logits(*golden, features, 8, layer_mask=np.arange(3) != layer)
            assert np.abs(start - full[0]).max() > 0.1
        assert question_answering._logits._cache_size() == programs

    def test_batches_of_another_size(self, golden):
        _, features, _ = golden_features('v1')
        one, other = (question_answering.logits(*golden, features, size) for size in (8, 34))
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)

    def test_rows_for_another_network(self, golden):
        examples, features, _ = golden_features('v1')
        model, params = golden
        features.inputs[3, 3] = 95
        with pytest.raises(UsageError, match='inputs up to 95, but the network has a table of 95'):
            question_answering.evaluate(model, params, features, examples, 8)
        features.inputs[3, 3] = 5
        broken = params | {'span': {'kernel': params['span']['kernel'] * np.nan, 'bias': params['span']['bias']}}
        with pytest.raises(NumericsError, match='logits of where answers begin and end are not finite'):
            question_answering.evaluate(model, broken, features, examples, 8)
        longer = squad.make_features(examples, squad.open_tokenizer(GOLDEN), 41, 10, 8)
        with pytest.raises(UsageError, match='rows of 41 tokens, but BERT has 40 positions'):
            question_answering.evaluate(model, params, longer, examples, 8)

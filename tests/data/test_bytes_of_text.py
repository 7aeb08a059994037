"""Where in a text its tokens end, and the bits per byte that follow: of the text's own bytes, by hand."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import sentencepiece
import tokenizers as library
from corpora import T, Texts, open_, prepare_to, two_files, write
from tokenizers import decoders, models, normalizers, pre_tokenizers
from vocabularies import KINDS, LLAMA, T5, open_file, prose, sentencepiece_model, with_settings

from mixln_jax.data import batches, layout, learned_tokenizer, prepared, rows, tokenizers
from mixln_jax.evaluation import loop as evaluation
from mixln_jax.system.errors import DataError, UsageError
from mixln_jax.tasks.language import Language

SPECIALS = {'<unk>': 0, '</s>': 1, '<pad>': 2}


def saved(folder, tokenizer, **settings):
    """A tokenizers.Tokenizer as the project opens it."""
    return with_settings(folder, tokenizer.to_str().encode(), {'eos_token': '</s>', 'pad_token': '<pad>'} | settings)


def of_words(*words):
    """Whole words, blanks dropped."""
    vocabulary = SPECIALS | {word: 3 + i for i, word in enumerate(words)}
    tokenizer = library.Tokenizer(models.WordLevel(vocabulary, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def of_pieces():
    """WordPiece, in lower case and without accents."""
    pieces = SPECIALS | {'un': 3, '##able': 4, 'cafe': 5, '!': 6}
    tokenizer = library.Tokenizer(models.WordPiece(pieces, unk_token='<unk>'))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def of_ended_words():
    """BPE whose words end with `</w>`, as CLIP's."""
    letters = ['l', 'o', 'w', 'w</w>', 'lo', 'low</w>', 'o</w>']
    vocabulary = SPECIALS | {token: 3 + i for i, token in enumerate(letters)}
    tokenizer = library.Tokenizer(
        models.BPE(vocabulary, [('l', 'o'), ('lo', 'w</w>')], unk_token='<unk>', end_of_word_suffix='</w>')
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder()
    return tokenizer


@pytest.mark.parametrize(
    'make, text, ends',
    [
        (of_words('cat', 'sat'), 'cat  sat', [3, 8]),
        (of_words('cat', 'sat'), ' zebra 日本 sat ', [6, 13, 17]),  # unknown words are as long as they are
        (of_pieces(), 'Unable Café!', [2, 6, 12, 13]),
        (of_ended_words(), 'low lo', [3, 5, 6]),
    ],
)
def test_spans_by_hand(tmp_path, make, text, ends):
    tokenizer = saved(tmp_path, make)
    ids, found = tokenizer.spans(text)
    assert found.tolist() == ends
    assert ids.tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize(
    'options, text, ends',
    [
        (T5, 'a\n\n a', [1, 5]),  # blanks are one, and none comes before the text
        (T5, 'ﬁ ½', [3, 6]),  # the normaliser makes three letters of ½
        (LLAMA, 'a€', [1, 2, 3, 4]),  # three bytes
    ],
)
def test_spans_of_sentencepiece_end_where_the_text_does(tmp_path, options, text, ends):
    path = tmp_path / 'a.model'
    path.write_bytes(sentencepiece_model(**options))
    ids, found = open_file(path, 'sentencepiece').spans(text)
    assert [end for end, _ in itertools.groupby(found.tolist()) if end] == sorted({*found.tolist()} - {0})
    assert {*ends} <= {*found.tolist()} and found[-1] == len(text.encode())


@pytest.mark.parametrize('text, ends', [('日 bade½', [0, 3, 6, 8, 10, 10, 10]), (' 日 x', None), ('x', None)])
def test_a_blank_before_the_text_is_none_of_it(opened, text, ends):
    """Also where it is a token of its own, to which the library gives the first letter."""
    _, found = opened('unigram').spans(text)
    assert ends is None or found.tolist() == ends
    assert found[-1] == len(text.encode()) and found[0] <= 1


def test_a_blank_after_the_text_is_none_of_it(tmp_path):
    (tmp_path / 'a.model').write_bytes(sentencepiece_model(**T5, treat_whitespace_as_suffix=True))
    ids, ends = open_file(tmp_path / 'a.model', 'sentencepiece').spans('bade lo')
    bare = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / 'a.model'))
    pieces = [bare.id_to_piece(int(i)).replace('▁', ' ') for i in ids]
    assert ''.join(pieces) == 'bade lo ' and pieces[-1] != ' '
    assert ends.tolist() == [*np.cumsum([len(piece) for piece in pieces])[:-1], 7]


def test_lengths_that_add_up_by_chance(tmp_path):
    """A blank that is dropped at the end and one put at the beginning, of which a trial with `a` would not tell."""
    vocabulary = SPECIALS | {letter: 3 + i for i, letter in enumerate('▁кот')}
    tokenizer = library.Tokenizer(models.BPE(vocabulary, [], unk_token='<unk>'))
    tokenizer.normalizer = normalizers.Strip(left=False, right=True)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    _, ends = saved(tmp_path, tokenizer).spans('кот\n')
    assert ends.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize('pad, text', [('!', 'wow!'), ('##s', 'cats')])
def test_padding_that_only_the_inside_of_words_has(tmp_path, pad, text):
    pieces = SPECIALS | {
        piece: 3 + i for i, piece in enumerate(['wow', 'cat', '##s', '!', '##!', '▁wow', '▁cat', '▁!'])
    }
    if pad == '##s':
        tokenizer = library.Tokenizer(models.WordPiece(pieces, unk_token='<unk>'))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer = library.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    opened = saved(tmp_path, tokenizer, pad_token=pad)
    ids = opened.encode(text)
    assert opened.pad_id in ids and opened.can_yield(opened.pad_id) and not opened.can_yield(opened.eos_id)
    assert pad.removeprefix('##') in opened.decode(ids)


@pytest.mark.parametrize('name', KINDS)
def test_both_ways_to_find_spans_agree(name, opened, monkeypatch):
    """By the tokens' own lengths, and by the libraries' offsets into the text."""
    tokenizer, texts = opened(name), prose(20, seed=3) + ['bade', 'bade kilo bade', '\n', 'bade\nkilo']
    texts.append(' bade\n\n kilo\tbade \n')
    by_lengths = {text: tokenizer.spans(text)[1] for text in texts}
    monkeypatch.setattr(tokenizer, '_spell', lambda ids: (b'\xff' * len(ids), np.arange(len(ids))))
    for text in texts:
        ids, ends = tokenizer.spans(text)
        if tokenizer.decode(ids).split() == text.split():  # all of it is letters that the vocabulary has
            assert ends.tolist() == by_lengths[text].tolist()
        assert (np.diff(ends) >= 0).all() and (ends <= len(text.encode())).all()


@pytest.mark.parametrize('name', KINDS)
def test_spans_of_long_texts_go_on_from_piece_to_piece(name, opened, monkeypatch):
    tokenizer, text = opened(name), ' '.join(prose(40, seed=4))
    whole = tokenizer.spans(text)
    monkeypatch.setattr(learned_tokenizer, 'LONGEST', 100)
    cut = tokenizer.spans(text)
    assert cut[0].tolist() == whole[0].tolist() and cut[1].tolist() == whole[1].tolist()
    assert tokenizer.spans(text, 50)[1].tolist() == whole[1][:50].tolist()


def bits_per_byte(made, batch_size=3):
    """Of a network that is wrong by one bit a token."""
    seen = evaluation.evaluate(
        lambda params, batch: {
            'sum': np.log(2) * np.asarray(batch['loss_mask']).sum(),
            'weight': np.asarray(batch['loss_mask']).sum(),
        },
        None,
        batches.evaluation(made, batch_size),
        task=Language(None),
        at_a_time=1,
        num_tokens=10**9,
        sharding=None,
    )
    return seen['eval/bits_per_byte'], seen['eval/tokens']


def test_bits_per_byte_of_two_short_texts(tmp_path):
    """Five and three targets (eos is one): the first word is none, and a text that is cut ends with its last word."""
    tokenizer = saved(tmp_path, of_words('cat', 'sat'))
    texts = Texts(['cat sat zebra\tsat cat ', 'cat Ünïcödé sat'])
    made = rows.Documents(texts, tokenizer, seq_length=6)
    assert bits_per_byte(made) == (8 / (22 - 3 + 19 - 3), 8)
    made = rows.Documents(texts, tokenizer, seq_length=4)  # three words and eos
    assert bits_per_byte(made) == (6 / (13 - 3 + 19 - 3), 6)


@pytest.mark.parametrize('mode', ['pack', 'concat'])
@pytest.mark.parametrize('name', ['bytes', *KINDS])
def test_every_byte_but_of_first_tokens_counts_once(name, opened, mode):
    tokenizer, texts = opened(name), Texts(prose(30, seed=5))
    made = rows.InMemory(texts, tokenizer, mode, T)
    firsts = [int(tokenizer.spans(text)[1][0]) for text in texts]
    total = sum(len(text.encode()) for text in texts)
    got = int(made.read(range(len(made)), sized=True).num_bytes.sum())
    if mode == 'pack':
        assert got == total - sum(firsts)
    else:  # what is left at the end of the stream, less than a row, is no target
        [rest] = {sum(len(tokenizer.encode(text)) + 1 for text in texts) - 1 - T * len(made)}
        ids, ends = tokenizer.spans(texts[-1])
        sizes = [*np.diff(ends, prepend=0), len(texts[-1].encode()) - ends[-1]]
        assert rest < len(sizes)
        assert got == total - firsts[0] - sum(sizes[len(sizes) - rest :])


class TestNotes:
    """The .rows files of prepared folders."""

    @pytest.fixture
    def data(self, tmp_path):
        return dataclasses.replace(two_files(tmp_path), path=f'{tmp_path}/a.jsonl')

    @staticmethod
    def age(folder):
        """Makes a folder what version 0.1 wrote."""
        for path in folder.rglob('*.rows'):
            path.unlink()
        for path in [folder / 'tokens.json', *folder.glob('.prepare/*.json')]:
            about = json.loads(path.read_text())
            for shard in about.get(
                'splits', {'': [about.get(split, {}) for split in ('train', 'validation')]}
            ).values():
                for one in shard:
                    one.pop('notes', None)
            path.write_text(json.dumps(about))

    @pytest.mark.parametrize('mode', layout.FILL)
    def test_they_say_what_the_text_says(self, tmp_path, data, mode):
        made, wanted = open_(prepare_to(tmp_path / 'out', data, mode)), open_(dataclasses.replace(data, mode=mode))
        got, wanted = (of.read(range(len(of)), sized=True) for of in (made, wanted))
        for name, values in got._asdict().items():
            np.testing.assert_array_equal(values, getattr(wanted, name), err_msg=name)

    @pytest.mark.parametrize('mode', layout.FILL)
    def test_an_old_folder_is_read_and_completed(self, tmp_path, data, mode, capsys):
        keys = prepare_to(tmp_path / 'out', data, mode)
        before = open_(keys)
        new = before.read(range(len(before)))
        batch = before.layout.batch(new)
        self.age(tmp_path / 'out')
        old = open_(keys)
        assert 'bits per byte are not known' in capsys.readouterr().out
        block = old.read(range(len(old)), sized=True)
        assert block.num_bytes is None and old.fingerprint == before.fingerprint
        for name, values in old.layout.batch(block).items():
            np.testing.assert_array_equal(values, batch[name], err_msg=name)
        assert bits_per_byte(old)[0] is None

        times = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').glob('*.bin')}
        assert prepare_to(tmp_path / 'out', data, mode) == keys
        assert times == {path: path.stat().st_mtime_ns for path in times}
        after = open_(keys)
        np.testing.assert_array_equal(after.read(range(len(after))).num_bytes, new.num_bytes)
        assert after.fingerprint == before.fingerprint

    def test_completing_refuses_other_rows(self, tmp_path, data):
        keys = prepare_to(tmp_path / 'out', data)
        self.age(tmp_path / 'out')
        for path in (tmp_path / 'out/.prepare').glob('both*.json'):
            about = json.loads(path.read_text())
            about['train']['digest'] = '0'
            path.write_text(json.dumps(about))
        with pytest.raises(UsageError, match='train-00000-of-00001.bin holds other rows than its text gives now'):
            prepare_to(tmp_path / 'out', data)
        assert len(open_(keys)) > 0  # as it was

    @pytest.mark.parametrize('mode', ['pad', 'pack'])
    @pytest.mark.parametrize('pad', ['<unk>', '!', '<pad>'])
    def test_old_rows_whose_ids_are_ambiguous(self, tmp_path, mode, pad):
        saved(tmp_path, of_words('cat', 'sat', '!'), pad_token=pad)
        texts = [f'cat {word} ! sat' for word in 'abcdefghij']
        keys = dict(tokenizer='huggingface', tokenizer_path=str(tmp_path / 'tokenizer.json'), mode=mode)
        data = dataclasses.replace(two_files(tmp_path), path=str(write(tmp_path / 'c.jsonl', texts)), **keys)
        keys = prepare_to(tmp_path / 'out', data, mode)
        made = open_(keys)
        assert made.layout.batch(made.read(range(len(made))))['loss_mask'].sum() == 5 * 4  # of each text all but cat
        self.age(tmp_path / 'out')
        if pad == '<pad>':
            assert len(open_(keys)) == len(made)
            return
        with pytest.raises(
            DataError, match=r'out: text can have the id of padding .*mixln_jax\.data\.prepare \.\.\. --out'
        ):
            open_(keys)
        prepare_to(tmp_path / 'out', data, mode)
        assert len(open_(keys)) == len(made)

    @pytest.mark.parametrize('file', ['train-00000-of-00001.bin', 'train-00000-of-00001.rows'])
    def test_one_flipped_bit(self, tmp_path, data, file):
        made = open_(prepare_to(tmp_path / 'out', data, 'pack'))
        size = (tmp_path / 'out' / file).stat().st_size // len(made)
        with (tmp_path / 'out' / file).open('r+b') as shard:
            shard.seek(2 * size)
            [byte] = shard.read(1)
            shard.seek(2 * size)
            shard.write(bytes([byte ^ 1]))
        made.read([0, 1, 3])
        with pytest.raises(DataError, match=r'train-00000-of-00001\.bin, row 2: damaged'):
            made.read([0, 2, 1])

    @pytest.mark.parametrize('harm', [lambda path: path.unlink(), lambda path: path.write_bytes(b'x')])
    def test_missing_and_cut_short(self, tmp_path, data, harm):
        prepare_to(tmp_path / 'out', data)
        harm(tmp_path / 'out/train-00000-of-00001.rows')
        with pytest.raises(DataError, match=r'train-00000-of-00001\.rows: (missing|1 bytes)'):
            prepared.Prepared(str(tmp_path / 'out'), 'train')


class TestIdsBeyondTheNetwork:
    @pytest.mark.parametrize('special', [True, False])
    def test_huggingface(self, tmp_path, special):
        tokenizer = of_words('cat')
        tokenizer.add_tokens([library.AddedToken('<extra>', special=special)])
        opened = saved(tmp_path, tokenizer)
        assert opened.vocab_size == 5
        if special:  # no text has it
            tokenizers.check_fits(opened, 4, 'config.model.vocab_size=4')
        else:
            message = r'tokenizer\.json has 5 ids, more than config.model.vocab_size=4: rows may have id 4'
            with pytest.raises(UsageError, match=message):
                tokenizers.check_fits(opened, 4, 'config.model.vocab_size=4')
        with pytest.raises(UsageError, match='rows may have id 3'):
            tokenizers.check_fits(opened, 3, 'x')

    def test_ends_are_used(self):
        with pytest.raises(UsageError, match='rows may have id 258'):
            tokenizers.check_fits(tokenizers.Bytes(), 258, 'x')

    def test_sentencepiece(self, tmp_path):
        model = sentencepiece_model(**T5, control_symbols='<extra>')
        (tmp_path / 'a.model').write_bytes(model)
        opened = open_file(tmp_path / 'a.model', 'sentencepiece')
        extra = sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id('<extra>')
        assert not opened.can_yield(extra) and opened.can_yield(opened.vocab_size - 1) and opened.can_yield(2)

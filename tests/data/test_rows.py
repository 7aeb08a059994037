"""Rows: how documents fill them, made when asked for and in memory, and how a run opens them."""

import dataclasses
import pickle

import numpy as np
import pytest
from corpora import T, Texts, all_tokens, assert_same, open_, prepare_to, two_files

from mixln_jax import config
from mixln_jax.data import layout, prepared, rows, tokenizers
from mixln_jax.data.layout import Block, Layout
from mixln_jax.system.errors import DataError, UsageError

PAD, EOS = 0, 1
EDGES = [0, 1, 2, T - 1, T, T + 1, 2 * T, 3 * T + 1]


def distinct(lengths):
    """Documents of these lengths in which no id comes twice; none is PAD or EOS."""
    ends = 2 + np.cumsum([0, *lengths])
    return [np.arange(start, start + length) for start, length in zip(ends, lengths, strict=False)]


def random_lengths(seed, count=1000):
    rng = np.random.default_rng(seed)
    return [*EDGES, *rng.integers(0, 3 * T, count // 4), *rng.integers(T // 2 + 1, T, count)]


def fill(mode, documents, of=None, length=T):
    """The Block of rows that documents fill; an id stands for as many bytes as `size` says."""
    of = of or Layout(mode, PAD, EOS)
    blocks = [of.block(np.empty((0, length + 1), layout.TOKEN))]
    filling = layout.FILL[mode](length, of, lambda block: blocks.append(Block(*map(np.copy, block))))
    for ids in documents:
        sizes = np.array([size(i) for i in ids], int)
        filling.add(of.document(ids, np.cumsum(sizes), sizes.sum() + 2))  # two blanks at the end
    filling.close()
    return Block(*map(np.concatenate, zip(*blocks, strict=True)))


def size(i):
    """Bytes that an id stands for; an eos stands for the two blanks at the end of a text."""
    return 1 + i * i % 7


def batch(mode, documents):
    return Layout(mode, PAD, EOS).batch(fill(mode, documents))


def pieces_of(ids):
    tokens = [*ids, EOS]
    return [tokens[start : start + T + 1] for start in range(0, len(tokens) - 1, T)]


def packed(documents, num_open):
    """What `pack` says, as rows of pieces."""
    done, open_rows = [], [[] for _ in range(num_open)]
    for ids in documents:
        *whole, last = pieces_of(ids) or [None]
        done += [[piece] for piece in whole]
        if last is None:
            continue
        used = [sum(map(len, row)) for row in open_rows]
        room = [i for i in range(num_open) if used[i] + len(last) <= T + 1]
        at = room[0] if room else used.index(max(used))
        if not room:
            done.append(open_rows[at])
            open_rows[at] = []
        open_rows[at].append(last)
    return done + [row for row in open_rows if row]


def letters(lengths, seed=0):
    """Documents of these lengths that are full of the ids of padding and ends."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 3, length) for length in lengths]


def expected(row):
    """The batch of a row of pieces, token by token."""
    made = {name: [0] * T for name in ('inputs', 'targets', 'loss_mask', 'segment_ids', 'positions')}
    tokens = [token for piece in row for token in piece]
    tokens += [PAD] * (T + 1 - len(tokens))
    made['inputs'], made['targets'] = tokens[:-1], tokens[1:]
    at = 0
    for segment, piece in enumerate(row, 1):
        for position in range(len(piece)):
            if at < T:  # the last token of all is a target only
                made['segment_ids'][at], made['positions'][at] = segment, position
                made['loss_mask'][at] = float(position + 1 < len(piece))
            at += 1
    return made


def pairs(batch):
    """All (input, target) that count, sorted."""
    real = batch['loss_mask'] == 1
    return sorted(zip(batch['inputs'][real].tolist(), batch['targets'][real].tolist(), strict=True))


class TestLayout:
    @pytest.mark.parametrize('pad_id', [PAD, EOS])
    @pytest.mark.parametrize('length', EDGES)
    def test_pad(self, length, pad_id):
        [ids] = distinct([length])
        of = Layout('pad', pad_id, EOS)
        block = fill('pad', [ids], of)
        kept = [*ids[: T - 1].tolist(), EOS]
        wanted = kept + [pad_id] * (T + 1 - len(kept))
        assert block.ids.tolist() == [wanted]
        weights = [[1.0] * (len(kept) - 1) + [0.0] * (T - len(kept) + 1)]
        assert_same(of.batch(block), {'inputs': [wanted[:-1]], 'targets': [wanted[1:]], 'loss_mask': weights})

    @pytest.mark.parametrize('num_open', [1, 3, layout.OPEN_ROWS])
    @pytest.mark.parametrize('seed', range(3))
    def test_pack(self, monkeypatch, seed, num_open):
        monkeypatch.setattr(layout, 'OPEN_ROWS', num_open)
        documents = distinct(random_lengths(seed))
        wanted = [expected(row) for row in packed(documents, num_open)]
        assert_same(batch('pack', documents), {name: np.array([row[name] for row in wanted]) for name in wanted[0]})

    @pytest.mark.parametrize('mode', ['pad', 'pack'])
    def test_masks_follow_from_the_filling_where_text_has_the_ids_of_padding_and_ends(self, mode):
        documents = letters(random_lengths(4))
        if mode == 'pad':
            wanted = [expected([[*ids[: T - 1].tolist(), EOS]]) for ids in documents]
        else:
            wanted = [expected(row) for row in packed(documents, layout.OPEN_ROWS)]
        got = batch(mode, documents)
        assert_same(got, {name: np.array([row[name] for row in wanted]) for name in got})

    @pytest.mark.parametrize('mode', ['pad', 'pack'])
    def test_bytes_of_text(self, mode):
        """Of all tokens but a document's first; an eos has the two blanks at the end, where the text was not cut."""
        documents = distinct(random_lengths(5, 100))
        of_text = [[size(i) for i in ids[1 : T - 1 if mode == 'pad' else None]] for ids in documents]
        ended = [len(ids) < T or mode == 'pack' for ids in documents]
        wanted = [
            sum(sizes) + 2 * (end and len(ids) > 0) for sizes, end, ids in zip(of_text, ended, documents, strict=True)
        ]
        got = fill(mode, documents).num_bytes
        assert got.sum() == sum(wanted)
        if mode == 'pad':
            assert got.tolist() == wanted

    def test_bytes_of_text_end_to_end(self):
        documents = distinct(random_lengths(6, 100))
        sizes = [[*map(size, ids), 2] for ids in documents]
        stream = [one for document in sizes for one in document]
        wanted = [sum(stream[start + 1 : start + T + 1]) for start in range(0, len(stream) - T, T)]
        assert fill('concat', documents).num_bytes.tolist() == wanted

    def test_pack_with_one_id_for_padding_and_ends(self):
        documents = distinct(random_lengths(3))
        of = Layout('pack', EOS, EOS)
        got, wanted = of.batch(fill('pack', documents, of)), batch('pack', documents)
        wanted |= {name: np.where(wanted[name] == PAD, EOS, wanted[name]) for name in ('inputs', 'targets')}
        assert_same(got, wanted)

    @pytest.mark.parametrize('seed', range(3))
    def test_pack_has_every_token_but_a_first_as_a_target_once(self, seed):
        documents = distinct(random_lengths(seed))
        wanted = [pair for ids in documents for pair in zip(ids.tolist(), [*ids.tolist(), EOS][1:], strict=True)]
        assert pairs(batch('pack', documents)) == sorted(wanted)

    def test_packing_wastes_little(self):
        lengths = np.random.default_rng(0).lognormal(5.5, 1, 2000).astype(int)  # C4's are much like that
        assert np.mean(fill('pack', distinct(lengths), length=256).ids == PAD) < 0.03

    @pytest.mark.parametrize('block', [1, layout.BLOCK])
    @pytest.mark.parametrize('seed', range(3))
    def test_concat(self, monkeypatch, seed, block):
        monkeypatch.setattr(layout, 'BLOCK', block)
        documents = distinct(random_lengths(seed))
        stream = [token for ids in documents for token in (*ids.tolist(), EOS)]
        wanted = [stream[start : start + T + 1] for start in range(0, len(stream) - T, T)]
        assert fill('concat', documents).ids.tolist() == wanted and len(wanted) > layout.BLOCK
        got = batch('concat', documents)
        assert pairs(got) == sorted(zip(stream, stream[1 : T * len(wanted) + 1], strict=False))
        assert got.keys() == {'inputs', 'targets', 'loss_mask'} and (got['loss_mask'] == 1).all()

    @pytest.mark.parametrize('mode', layout.FILL)
    def test_types(self, mode):
        block = fill(mode, distinct([5, 20]))
        made = Layout(mode, PAD, EOS).batch(block._replace(ids=block.ids.astype('<u2')))
        types = {name: (values.dtype, values.shape) for name, values in made.items()}
        assert types.pop('loss_mask') == (np.float32, (len(block.ids), T))
        assert set(types.values()) == {(np.dtype(np.int32), (len(block.ids), T))}

    @pytest.mark.parametrize('mode', layout.FILL)
    def test_no_documents(self, mode):
        assert len(fill(mode, []).ids) == 0

    def test_dtype(self):
        assert [layout.dtype_for(size).str for size in (259, 2**16, 2**16 + 1)] == ['<u2', '<u2', '<u4']


TEXTS = Texts(['abc', '', 'größer', 'x' * 100, 'y', *(f'text {i}' for i in range(40))])


def make(mode, source=TEXTS, tokenizer=None, seq_length=T):
    tokenizer = tokenizer or tokenizers.Bytes()
    if mode == 'pad':
        return rows.Documents(source, tokenizer, seq_length)
    return rows.InMemory(source, tokenizer, mode, seq_length)


class Large(tokenizers.Bytes):
    """Bytes among many ids that no text has."""

    vocab_size, pad_id, eos_id, fingerprint = 10**6, 10**6 - 2, 10**6 - 1, 'large'


class TestRows:
    @pytest.mark.parametrize('mode', layout.FILL)
    @pytest.mark.parametrize('tokenizer', [tokenizers.Bytes(), Large()])
    def test_tokens(self, mode, tokenizer):
        made = make(mode, tokenizer=tokenizer)
        wanted = fill(mode, [np.array([*text.encode()], int) for text in TEXTS], made.layout)
        assert made.layout == Layout(mode, tokenizer.pad_id, tokenizer.eos_id)
        np.testing.assert_array_equal(all_tokens(made), wanted.ids)
        np.testing.assert_array_equal(made.read([3, 0, 3]).ids, wanted.ids[[3, 0, 3]])
        np.testing.assert_array_equal(made.read([3, 0, 3]).ends, wanted.ends[[3, 0, 3]])

    def test_origin(self):
        assert make('pad').origin(3) == 'text 3'
        assert make('pack').origin(3) == 'row 3'
        with pytest.raises(IndexError):
            make('pack').origin(1000)

    def test_documents_ask_for_no_more_ids_than_a_row_has(self):
        class Counting(tokenizers.Bytes):
            def encode(self, text, limit=None):
                assert limit == T - 1
                return super().encode(text, limit)

        make('pad', tokenizer=Counting()).read([0, 3])

    @pytest.mark.parametrize('mode', layout.FILL)
    def test_pickle(self, mode):
        made = make(mode)
        copy = pickle.loads(pickle.dumps(made))
        np.testing.assert_array_equal(all_tokens(copy), all_tokens(made))
        assert (copy.layout, copy.fingerprint) == (made.layout, made.fingerprint)

    @pytest.mark.parametrize('mode', layout.FILL)
    def test_fingerprint(self, mode):
        other = Texts(TEXTS)
        other.fingerprint = 'other'
        first = make(mode).fingerprint
        assert first == {'source': '0', 'tokenizer': tokenizers.Bytes().fingerprint, 'mode': mode, 'seq_length': T}
        assert make(mode, other).fingerprint == first | {'source': 'other'}
        assert make(mode, tokenizer=Large()).fingerprint == first | {'tokenizer': 'large'}
        assert make(mode, seq_length=T + 1).fingerprint == first | {'seq_length': T + 1}

    @pytest.mark.parametrize('mode, texts', [('concat', ['abc', 'def']), ('pack', ['', ''])])
    def test_not_enough_text(self, mode, texts):
        with pytest.raises(DataError, match='not enough for one row of config.seq_length=8'):
            make(mode, Texts(texts))
        assert len(make(mode, Texts([*texts, 'a']))) == 1


@pytest.fixture
def data(tmp_path):
    return two_files(tmp_path)


class TestOpenRows:
    @pytest.mark.parametrize(
        'mode, kind', [('pad', rows.Documents), ('pack', rows.InMemory), ('concat', rows.InMemory)]
    )
    def test_text(self, data, mode, kind):
        data = dataclasses.replace(data, mode=mode)
        validation, train = open_(data, 'validation'), open_(data)
        assert isinstance(train, kind) and train.layout.mode == mode
        assert len(validation) < len(train)
        assert validation.fingerprint['source'] != train.fingerprint['source']

    def test_vocabulary(self, tmp_path, data):
        for asked in (data, prepare_to(tmp_path / 'out', data)):
            open_(asked, vocab_size=259)
            with pytest.raises(UsageError, match='the tokenizer bytes has 259 ids.*vocab_size=258'):
                open_(asked, vocab_size=258)

    def test_prepared_otherwise(self, tmp_path, data):
        data = prepare_to(tmp_path / 'out', data, 'pack')
        assert isinstance(open_(data), prepared.Prepared)
        with pytest.raises(UsageError, match='out holds rows of config.data.mode=pack, not pad'):
            open_(dataclasses.replace(data, mode='pad'))
        with pytest.raises(UsageError, match='out holds rows of config.seq_length=8, not 9'):
            open_(data, seq_length=9)
        with pytest.raises(UsageError, match='out was prepared with .*tokenizer=bytes, not huggingface'):
            open_(dataclasses.replace(data, tokenizer='huggingface'))

    def test_prepared_with_another_file(self, tmp_path, data, monkeypatch):
        data = dataclasses.replace(prepare_to(tmp_path / 'out', data), tokenizer_path='vocabulary')
        open_(data)
        monkeypatch.setattr(tokenizers, 'open_tokenizer', lambda data: Large())
        with pytest.raises(UsageError, match='another tokenizer than config.data.tokenizer_path'):
            open_(data)

    @pytest.mark.parametrize('mode', ['pack', 'concat'])
    def test_data_sets_are_prepared_first(self, mode):
        data = config.Data(tokenizer='bytes', mode=mode)
        with pytest.raises(DataError, match=f'--source tfds --name c4/en --mode {mode} --seq_length {T}'):
            open_(data)

"""Prepared rows that are whole, but not those of their place: of another shard, split or preparation, or moved."""

import dataclasses
import json
import re
import zlib

import numpy as np
import pytest
from corpora import T, all_tokens, contents, open_, prepare_to, write

from mixln_jax import config
from mixln_jax.data import prepared, verify
from mixln_jax.data.prepare import command
from mixln_jax.system import outputs
from mixln_jax.system.errors import DataError, UsageError

ROW, NOTE = 2 * (T + 1), prepared.note(T).itemsize
NAMES = [f'{split}-0000{number}-of-00002' for split in ('train', 'validation') for number in range(2)]
COUNT = 20  # rows of every shard


def texts(name):
    """Different ones, a row each."""
    return [f'{name}{i:03}' for i in range(COUNT)]


def make(folder, name='', **changes):
    """Prepares two shards of each split, all of equal size; the keys that then read them."""
    source = folder / f'text{name}'
    source.mkdir()
    for file in 'abcd':
        write(source / f'{file}.jsonl', texts(f'{file}{name}'[:2].ljust(2, '-')))
    data = config.Data(source='jsonl', path=f'{source}/[ab].jsonl', tokenizer='bytes')
    return prepare_to(folder / f'out{name}', data, validation=f'{source}/[cd].jsonl', **changes)


@pytest.fixture
def keys(tmp_path):
    return make(tmp_path)


@pytest.fixture
def out(tmp_path, keys):
    assert {path.stat().st_size for path in (tmp_path / 'out').glob('*.bin')} == {COUNT * ROW}
    return tmp_path / 'out'


def files(out, name):
    return out / f'{name}.bin', out / f'{name}.rows'


def exchange(out, one, other):
    """Two shards with their notes."""
    for first, second in zip(files(out, one), files(out, other), strict=True):
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)


def move(out, name, order):
    """Rows, and notes, in another order; the seal stays."""
    for path, size in zip(files(out, name), (ROW, NOTE), strict=True):
        content = path.read_bytes()
        pieces = [content[size * i : size * (i + 1)] for i in order]
        path.write_bytes(b''.join(pieces) + content[COUNT * size :])


def describe(out, change):
    """Changes the splits of tokens.json."""
    about = json.loads((out / 'tokens.json').read_text())
    change(about['splits'])
    (out / 'tokens.json').write_text(json.dumps(about))


def reads(keys, split):
    """{file: its rows that can be read} of a split, each row by itself."""
    made, good = open_(keys, split), {}
    for number in range(len(made)):
        file, row = re.fullmatch(r'.*/(.*)\.bin, row (\d+)', made.origin(number)).groups()
        try:
            made.read([number])
        except DataError as error:
            assert re.search(
                rf'{file}\.(bin, row {row}: damaged, or the row of|rows: damaged, or the notes of)', str(error)
            )
            assert 'made the folder again' in str(error)
        else:
            good.setdefault(file, []).append(int(row))
    return good


def all_reads(keys):
    return reads(keys, 'train') | reads(keys, 'validation')


def damaged(out):
    return [message for *_, messages in verify.damages(str(out)) for message in messages]


WHOLE = {name: [*range(COUNT)] for name in NAMES}


def without(*names):
    return {name: rows for name, rows in WHOLE.items() if name not in names}


def mend(tmp_path, out, before):
    """The same command once more makes of the folder what it was."""
    source = tmp_path / 'text'
    data = config.Data(source='jsonl', path=f'{source}/[ab].jsonl', tokenizer='bytes')
    prepare_to(out, data, validation=f'{source}/[cd].jsonl')
    assert contents(out) == before and not damaged(out)


def test_nothing_is_wrong_with_a_good_folder(keys, out):
    assert all_reads(keys) == WHOLE and not damaged(out)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(
    'order',
    [
        [*reversed(range(COUNT))],
        [*range(1, COUNT), 0],
        [1, 0, *range(2, COUNT)],
        [*range(COUNT - 1), 0],  # a row twice, one missing
        [*np.random.default_rng(0).permutation(COUNT).tolist()],
    ],
    ids=['reversed', 'rotated', 'two', 'twice', 'permuted'],
)
def test_rows_that_have_moved(tmp_path, keys, out, name, order):
    before = contents(out)
    move(out, name, order)
    still = [i for i, row in enumerate(order) if i == row]
    assert all_reads(keys) == without(name) | ({name: still} if still else {})
    [said] = damaged(out)
    assert said.startswith(f'{out}/{name}.bin, row {next(i for i, row in enumerate(order) if i != row)}: damaged')
    mend(tmp_path, out, before)


@pytest.mark.parametrize(
    'one, other', [(NAMES[0], NAMES[1]), (NAMES[0], NAMES[2]), (NAMES[1], NAMES[2]), (NAMES[2], NAMES[3])]
)
@pytest.mark.parametrize('seal', ['moves', 'stays'])
def test_shards_that_were_exchanged(tmp_path, keys, out, one, other, seal):
    before = contents(out)
    seals = {name: (out / f'{name}.rows').read_bytes()[-prepared.SEAL :] for name in (one, other)}
    exchange(out, one, other)
    if seal == 'stays':
        for name, own in seals.items():
            path = out / f'{name}.rows'
            path.write_bytes(path.read_bytes()[: -prepared.SEAL] + own)
    assert all_reads(keys) == without(one, other)
    assert [said.partition(',')[0] for said in damaged(out)] == [f'{out}/{name}.bin' for name in (one, other)]
    mend(tmp_path, out, before)


@pytest.mark.parametrize('endings', [['.bin', '.rows'], ['.bin'], ['.rows']])
@pytest.mark.parametrize('name', NAMES)
def test_a_shard_of_another_preparation(tmp_path, keys, out, endings, name):
    before = contents(out)
    make(tmp_path, 'x')
    for ending in endings:
        (out / f'{name}{ending}').write_bytes((tmp_path / 'outx' / f'{name}{ending}').read_bytes())
    assert all_reads(keys) == without(name)
    assert len(damaged(out)) == 1
    mend(tmp_path, out, before)


def exchange_splits(splits):
    splits['train'], splits['validation'] = splits['validation'], splits['train']


def exchange_entries(splits):
    splits['train'][0], splits['validation'][0] = splits['validation'][0], splits['train'][0]


def exchange_digests(splits):
    one, other = splits['train'][0], splits['validation'][0]
    one['digest'], other['digest'] = other['digest'], one['digest']


def exchange_names(splits):
    one, other = splits['train'][1], splits['validation'][1]
    one['file'], other['file'] = other['file'], one['file']


@pytest.mark.parametrize('change', [exchange_splits, exchange_entries, exchange_names])
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_a_description_that_names_files_of_another_split(keys, out, change, split):
    describe(out, change)
    with pytest.raises(
        DataError, match=r'tokens\.json: .*splits\.train names validation-.*, which belongs to another split'
    ):
        open_(keys, split)
    with pytest.raises(DataError, match='belongs to another split'):
        damaged(out)


@pytest.mark.parametrize('also_the_files', [False, True])
def test_a_description_whose_digests_were_exchanged(keys, out, also_the_files):
    describe(out, exchange_digests)
    if also_the_files:
        exchange(out, NAMES[0], NAMES[2])
    assert all_reads(keys) == without(NAMES[0], NAMES[2])


def test_a_seal_with_a_flipped_bit(tmp_path, keys, out):
    before, path = contents(out), out / f'{NAMES[0]}.rows'
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert all_reads(keys) == without(NAMES[0])
    [said] = damaged(out)
    assert said.startswith(f'{path}: damaged, or the notes of another shard')
    mend(tmp_path, out, before)


def test_notes_without_the_seal_they_should_have(keys, out):
    path = out / f'{NAMES[0]}.rows'
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: -prepared.SEAL])
    with pytest.raises(DataError, match=rf'{path}: {size - prepared.SEAL} bytes, not {size}$'):
        open_(keys)


# what a .rows file holds


def test_salts_are_those_of_splitmix64():
    """The first numbers of the published generator from the seed 1234567 (rosettacode.org, Vigna's splitmix64.c)."""
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    got = prepared.salts(np.full(5, 1234567, np.uint64), np.arange(5))
    np.testing.assert_array_equal(got, [number >> 32 for number in wanted])
    seal = (1234567).to_bytes(8, 'little') + bytes(8)
    np.testing.assert_array_equal(prepared.shard_salts(seal, np.array([3, 1])), [wanted[3] >> 32, wanted[1] >> 32])


@pytest.mark.parametrize('at_once', [1, 7, 20, 1000])
def test_a_checksum_is_that_of_the_row_with_its_salt(tmp_path, monkeypatch, at_once):
    """Whatever the number of notes that are sealed in one go."""
    monkeypatch.setattr(prepared, 'AT_ONCE', at_once)
    out = make(tmp_path).path
    for split, entries in prepared.description(out)['splits'].items():
        for shard in entries:
            rows, notes = (path.read_bytes() for path in files(tmp_path / 'out', shard['file'].removesuffix('.bin')))
            seal = prepared.seal(shard['file'], shard['digest'])
            assert shard['sealed'] and shard['notes'] == len(notes) == COUNT * NOTE + len(seal), split
            assert notes[COUNT * NOTE :] == seal
            for i, salt in enumerate(prepared.shard_salts(seal, np.arange(COUNT))):
                of_row = notes[i * NOTE : (i + 1) * NOTE]
                crc = zlib.crc32(rows[i * ROW : (i + 1) * ROW] + of_row[:-4])
                assert int.from_bytes(of_row[-4:], 'little') == crc ^ int(salt)


# folders made before


def age(out, names=NAMES):
    """Takes the seals of shards away, as if they were made before."""
    for name in names:
        entry = next(
            shard
            for entries in prepared.description(str(out))['splits'].values()
            for shard in entries
            if shard['file'] == f'{name}.bin'
        )
        path = out / f'{name}.rows'
        notes = np.frombuffer(path.read_bytes()[: -prepared.SEAL], prepared.note(T)).copy()
        notes['crc'] ^= prepared.shard_salts(prepared.seal(entry['file'], entry['digest']), np.arange(COUNT))
        path.write_bytes(notes.tobytes())
        split, number = name.split('-')[:2]
        counts = out / prepared.WORK / f'{split}-{number}.json'
        about = json.loads(counts.read_text())
        for one in (about, json.loads((out / 'tokens.json').read_text())):
            shard = one[split] if one is about else one['splits'][split][int(number)]
            del shard['sealed']
            shard['notes'] -= prepared.SEAL
            (counts if one is about else out / 'tokens.json').write_text(json.dumps(one))


@pytest.mark.parametrize('names', [NAMES, NAMES[:1], NAMES[1:3]])
def test_a_folder_made_before_is_read_and_sealed(tmp_path, keys, out, names, capsys):
    before, wanted = contents(out), open_(keys)
    rows = all_tokens(wanted)
    age(out, names)
    old = open_(keys)
    np.testing.assert_array_equal(all_tokens(old), rows)
    assert old.fingerprint == wanted.fingerprint and all_reads(keys) == WHOLE and not damaged(out)
    times = {path: path.stat().st_mtime_ns for path in out.glob('*.bin')}
    late = open_(keys)  # and reads first when the folder is sealed
    mend(tmp_path, out, before)
    assert times == {path: path.stat().st_mtime_ns for path in times}
    np.testing.assert_array_equal(all_tokens(late), rows)
    np.testing.assert_array_equal(all_tokens(old), rows)
    assert f'{len(names)} of 4 shards to prepare' in capsys.readouterr().out
    mend(tmp_path, out, before)
    assert 'to prepare' not in capsys.readouterr().out


def test_a_folder_made_before_has_no_seals_but_checksums(keys, out):
    age(out)
    move(out, NAMES[0], [*reversed(range(COUNT))])  # is not seen, as it was not
    assert all_reads(keys) == WHOLE
    assert [said.partition(':')[0] for said in damaged(out)] == [f'{out}/{NAMES[0]}.bin']
    path = out / f'{NAMES[0]}.bin'
    content = bytearray(path.read_bytes())
    content[ROW] ^= 1
    path.write_bytes(content)
    assert all_reads(keys)[NAMES[0]] == [0, *range(2, COUNT)]


def test_sealing_by_parts(tmp_path, keys, out):
    """By hosts, one of which is late: the folder can be read at any time, and what is sealed is checked."""
    before = contents(out)
    age(out)
    source = tmp_path / 'text'
    data = dataclasses.replace(keys, source='jsonl', path=f'{source}/[ab].jsonl')

    def run(part):
        words = {'format': 'tokens', 'seq_length': T, 'validation': f'{source}/[cd].jsonl', 'only': part}
        return command.prepare(data, str(out), **words)

    assert not run(slice(1, 2)) and (out / 'tokens.json').exists()
    assert [path.stem for path in out.glob('*.rows') if before[path.name] == path.read_bytes()] == [NAMES[1]]
    assert all_reads(keys) == WHOLE and not damaged(out)
    move(out, NAMES[1], [*reversed(range(COUNT))])
    assert all_reads(keys) == without(NAMES[1])
    move(out, NAMES[1], [*reversed(range(COUNT))])
    assert run(slice(0, 1))
    assert contents(out) == before


def test_sealing_that_is_killed_between_notes_and_counts(tmp_path, keys, out, monkeypatch):
    before = contents(out)
    age(out)

    write_json = outputs.write_json

    def killed(path, made):
        if path == out / prepared.WORK / 'train-00000.json':
            raise KeyboardInterrupt
        write_json(path, made)

    with monkeypatch.context() as patch:
        patch.setattr(outputs, 'write_json', killed)
        with pytest.raises(KeyboardInterrupt):
            mend(tmp_path, out, before)
    assert (out / f'{NAMES[0]}.rows').read_bytes() == before[f'{NAMES[0]}.rows']
    assert all_reads(keys) == WHOLE and not damaged(out)
    mend(tmp_path, out, before)


def test_other_rows_than_the_text_gives_are_not_sealed(tmp_path, keys, out):
    age(out)
    kept = contents(out)
    counts = out / prepared.WORK / 'train-00000.json'
    about = json.loads(counts.read_text())
    about['train']['digest'] = '0' * 32
    counts.write_text(json.dumps(about))
    with pytest.raises(UsageError, match='holds other rows than its text gives now'):
        mend(tmp_path, out, kept)
    assert contents(out) == kept

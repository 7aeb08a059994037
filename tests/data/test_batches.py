"""Batches: the order of rows, one process or many, and the reading ahead."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from corpora import T, Texts, assert_same, prepare_to, two_files

from mixln_jax.data import batches, examples, layout, rows, tokenizers
from mixln_jax.system.errors import DataError


class Numbered(examples.Rows):
    """Rows whose tokens are their number; the `bad` one cannot be read."""

    layout = layout.Layout('concat', 0, 0)
    fingerprint = {}

    def __init__(self, count, bad=None):
        self._count, self._bad = count, bad

    def __len__(self):
        return self._count

    def read(self, indices, sized=False):
        if self._bad in indices:
            raise DataError(f'row {self._bad} of a file: cannot be read')
        ids = np.repeat(np.asarray(indices)[:, None], T + 1, 1)
        return layout.Block(ids, np.zeros_like(ids, bool), 1 + np.asarray(indices) if sized else None)

    def origin(self, number):
        return f'row {number} of a file'


def shapes(batch):
    return {values.shape for values in batch.values()}


def numbers(batch):
    return batch['inputs'][:, 0].tolist()


def deviation(values, count):
    """How far values in range(count) are from equally frequent: chi-square in standard deviations from its mean."""
    found, wanted = np.bincount(values, minlength=count), len(values) / count
    return (((found - wanted) ** 2 / wanted).sum() - (count - 1)) / np.sqrt(2 * (count - 1))


def permutation(n, seed=0, epoch=0):
    return batches.permuted(np.arange(n), n, seed, epoch)


class TestOrder:
    SIZES = sorted({*range(1, 40), *(2**k + i for k in range(6, 15) for i in (-1, 0, 1)), 10**6})

    @pytest.mark.parametrize('seed', [0, 2**32 - 1])
    def test_permutation(self, seed):
        for n in self.SIZES:
            assert np.array_equal(np.sort(permutation(n, seed, 3)), np.arange(n)), n

    def test_any_places(self):
        places = np.array([999, 0, 500, 0])
        np.testing.assert_array_equal(batches.permuted(places, 1000, 1, 2), permutation(1000, 1, 2)[places])
        assert len(batches.permuted(places[:0], 1000, 1, 2)) == 0

    def test_every_seed_and_epoch_has_its_own(self):
        made = {(seed, epoch): tuple(permutation(50, seed, epoch)) for seed in range(20) for epoch in range(20)}
        assert len(set(made.values())) == 400

    def test_it_stays_the_same_forever(self):
        """Runs go on where they stopped with any later version: these numbers must never change."""
        assert permutation(10, 0, 0).tolist() == [9, 6, 5, 8, 7, 0, 1, 2, 3, 4]
        assert permutation(17, 2**32 - 1, 5).tolist() == [3, 12, 13, 14, 15, 0, 1, 2, 11, 6, 7, 10, 16, 4, 5, 9, 8]
        assert batches.permuted(np.array([0, 1, 10**9]), 365_000_000_000, 7, 1).tolist() == [
            185483608656,
            5354549435,
            214186118139,
        ]
        assert batches.order(Numbered(5), 3, np.arange(2, 15)).tolist() == [4, 1, 0, 2, 0, 4, 1, 3, 1, 4, 0, 2, 3]

    def test_every_place_gets_every_row_equally_often(self, monkeypatch):
        def check():
            images = np.array([permutation(10, seed) for seed in range(2000)])
            assert max(deviation(images[:, place], 10) for place in range(10)) < 5
            first, second = images[:, :1], images[:, 1:]
            assert max(deviation((column - first[:, 0]) % 10 - 1, 9) for column in second.T) < 5

        check()
        monkeypatch.setattr(batches, 'ROUNDS', 1)
        with pytest.raises(AssertionError):
            check()

    @pytest.mark.parametrize('n', [1000, 1024, 100_000])
    def test_neighbours_have_nothing_to_do_with_each_other(self, monkeypatch, n):
        def check():
            for seed, lag in itertools.product(range(5), (1, 2, 3)):
                images = permutation(n, seed)
                apart = (images[lag:] - images[:-lag]) % n
                assert deviation((apart - 1) * 50 // (n - 1), 50) < 5

        check()
        for rounds in (1, 3):
            monkeypatch.setattr(batches, 'ROUNDS', rounds)
            with pytest.raises(AssertionError):
                check()

    def test_places_in_a_large_data_set(self):
        n = 365_000_000
        images = [batches.permuted(np.array([0, 1, n // 2, n - 1]), n, seed, 0) for seed in range(2000)]
        assert max(deviation(column * 20 // n, 20) for column in np.array(images).T) < 5


class TestTraining:
    @pytest.mark.parametrize('batch_size', [1, 3, 7, 20, 35])
    def test_every_row_once_an_epoch(self, batch_size):
        dataset = batches.training(Numbered(10), seed=0, batch_size=batch_size)
        assert shapes(dataset[0]) == {(batch_size, T), (batch_size,)}
        read = [number for s in range(-(-50 // batch_size)) for number in numbers(dataset[s])][:50]
        epochs = [tuple(read[start : start + 10]) for start in range(0, 50, 10)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert len(set(epochs)) == 5

    @pytest.mark.parametrize('process_count', [1, 2, 4])
    def test_each_process_has_its_slice(self, process_count):
        whole = batches.training(Numbered(26), seed=5, batch_size=8)
        parts = [
            batches.training(Numbered(26), seed=5, batch_size=8, part=part)
            for part in np.arange(8).reshape(process_count, -1)
        ]
        read = []
        for s in range(13):
            read.append([number for part in parts for number in numbers(part[s])])
            assert [len(numbers(part[s])) for part in parts] == [8 // process_count] * process_count
            assert read[-1] == numbers(whole[s])
        assert sorted(np.concatenate(read)) == sorted([*range(26)] * 4)

    def test_the_order_follows_from_the_seed_and_not_from_the_batch_size(self):
        def read(seed, batch_size):
            dataset = batches.training(Numbered(100), seed=seed, batch_size=batch_size)
            return tuple(number for s in range(200 // batch_size) for number in numbers(dataset[s]))

        assert read(3, 5) == read(3, 10) == read(3, 200)
        assert len({read(seed, 5) for seed in (0, 1, 2, 3, 2**32 - 1)}) == 5

    def test_it_is_endless(self):
        for batch_size in (1, 1000):
            dataset = batches.training(Numbered(10), seed=0, batch_size=batch_size)
            wanted = batches.order(Numbered(10), 0, 10**15 * batch_size + np.arange(batch_size))
            assert numbers(dataset[10**15]) == wanted.tolist()


class TestEvaluation:
    @pytest.mark.parametrize('count, batch_size', [(10, 4), (10, 5), (3, 8), (1, 1)])
    def test_all_rows_once(self, count, batch_size):
        dataset = batches.evaluation(Numbered(count), batch_size)
        made = [dataset[i] for i in range(len(dataset))]
        assert len(made) == -(-count // batch_size)
        assert all(shapes(batch) == {(batch_size, T), (batch_size,)} for batch in made)
        assert {batch['loss_mask'].dtype for batch in made} == {np.dtype(np.float32)}
        assert np.concatenate([numbers(batch) for batch in made])[:count].tolist() == list(range(count))
        for name in ('loss_mask', 'example_mask'):
            mask = np.concatenate([batch[name] for batch in made])
            assert (mask[:count] == 1).all() and not mask[count:].any()
        places = np.concatenate([batch['place'] for batch in made])
        assert places.dtype == np.uint32 and places.tolist() == list(range(len(places)))

    def test_bytes_of_text_are_counted_once(self):
        made = list(batches.evaluation(Numbered(10), 4))
        assert sum(int(batch['num_bytes'].sum()) for batch in made) == sum(range(1, 11))
        assert 'num_bytes' not in batches.training(Numbered(10), seed=0, batch_size=4)[0]

    def test_every_example_is_read_in_its_epoch(self):
        """`epochs` of the examples at places 3 to 8 of a stream of 4; evaluation has none."""
        asked = []

        class Seen(Numbered):
            def batch(self, numbers, epochs=None):
                asked.append(None if epochs is None else epochs.tolist())
                return super().batch(numbers, epochs)

        batch = batches.batch_at(Seen(4), 0, np.arange(3, 9))
        assert asked == [[0, 1, 1, 1, 1, 2]] and batch['place'].tolist() == [3, 4, 5, 6, 7, 8]
        assert batches.evaluation(Seen(4), 4)[0] and asked[1:] == [None]
        assert batches.batch_at(Seen(4), 0, np.array([2**32 + 5]))['place'].tolist() == [5]

    def test_weights_are_the_rows_own(self):
        made = rows.Documents(Texts(['abc', 'defgh', 'i']), tokenizers.Bytes(), T)
        [batch] = batches.evaluation(made, 4)
        assert batch['loss_mask'].sum(1).tolist() == [3, 5, 1, 0]


class TestRead:
    @pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
    @pytest.mark.parametrize('start, batch_size', [(0, 1), (5, 3), (10**12, 3)])
    def test_batches(self, workers, start, batch_size):
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        dataset = batches.training(Numbered(10), seed=1, batch_size=batch_size)
        iterator = batches.read(dataset, start, workers)
        for s, batch in enumerate(itertools.islice(iterator, 7), start):
            assert_same(batch, dataset[s])
            assert {type(values) for values in batch.values()} == {np.ndarray}
        iterator.close()
        assert next(iterator, None) is None and not multiprocessing.active_children()
        assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))

    WORKERS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]

    @pytest.mark.parametrize('workers', WORKERS)
    @pytest.mark.parametrize('process_count', [1, 2])
    def test_all_processes_read_every_row_once_an_epoch(self, workers, process_count):
        read = []
        for part in np.arange(4).reshape(process_count, -1):
            dataset = batches.training(Numbered(40), seed=1, batch_size=4, part=part)
            with contextlib.closing(batches.read(dataset, 0, workers)) as iterator:
                read.append([numbers(batch) for batch in itertools.islice(iterator, 30)])
        epochs = np.concatenate(read, axis=1).reshape(3, 40)
        assert (np.sort(epochs) == np.arange(40)).all()

    @pytest.mark.parametrize('start', [1, 37])
    @pytest.mark.parametrize('mode', layout.FILL)
    @pytest.mark.parametrize('source', ['jsonl', 'tokens'])
    def test_going_on(self, tmp_path, source, mode, start):
        data = dataclasses.replace(two_files(tmp_path), mode=mode)
        if source == 'tokens':
            data = prepare_to(tmp_path / 'out', data, mode)

        def read(start, count):
            """As a process that has just started."""
            made = rows.open_rows(data, 'train', rows.open_tokenizer(data), T, 259)
            dataset = batches.training(made, seed=1, batch_size=4)
            with contextlib.closing(batches.read(dataset, start, 0)) as iterator:
                return list(itertools.islice(iterator, count))

        for got, wanted in zip(read(start, 50), read(0, start + 50)[start:], strict=True):
            assert_same(got, wanted)

    @pytest.mark.parametrize('workers', [0, pytest.param(2, marks=pytest.mark.slow)])
    @pytest.mark.parametrize('before', [0, 6])
    def test_a_row_that_cannot_be_read(self, workers, before):
        bad = int(permutation(10)[before])
        iterator = batches.read(batches.training(Numbered(10, bad), seed=0, batch_size=1), 0, workers)
        with contextlib.closing(iterator):
            assert len([next(iterator) for _ in range(before)]) == before
            with pytest.raises(DataError, match=f'row {bad} of a file: cannot be read'):
                next(iterator)

    def test_evaluation(self):
        dataset = batches.evaluation(Numbered(10), 4)
        with contextlib.closing(batches.read(dataset, 0, 0)) as iterator:
            for got, wanted in zip(iterator, dataset, strict=True):
                assert_same(got, wanted)


SCRIPT = """
import multiprocessing, os, signal, sys, threading, time
from mixln_jax.data import batches, rows, tokenizers

class Texts(list):
    fingerprint = '0'

    def __getitems__(self, indices):
        return [self[i] for i in indices]

def interrupt_all():
    while True:
        time.sleep(0.1)
        os.killpg(0, signal.SIGINT)
        os.killpg(0, signal.SIGTERM)

if __name__ == '__main__':
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    if sys.argv[2] == 'interrupt':
        threading.Thread(target=interrupt_all, daemon=True).start()
    documents = rows.Documents(Texts('abc'), tokenizers.Bytes(), 4)
    iterator = batches.read(batches.training(documents, seed=0, batch_size=1), 0, int(sys.argv[1]))
    for _ in range(1 if sys.argv[2] == 'leave' else 50):
        next(iterator)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[2] == 'interrupt':
        assert set(signals) == {signal.SIGINT, signal.SIGTERM}
        iterator.close()
    if sys.argv[2] == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
"""


def run(tmp_path, *args):
    """Exit code, worker ids and errors of SCRIPT in a session of its own."""
    (tmp_path / 'script.py').write_text(SCRIPT)
    environment = os.environ | {'PYTHONPATH': str(pathlib.Path(batches.__file__).parents[2])}
    command = [sys.executable, str(tmp_path / 'script.py'), *args]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, start_new_session=True)
    return done.returncode, [int(pid) for pid in done.stdout.split()], done.stderr


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
class TestProcesses:
    @pytest.mark.parametrize('workers', [0, 2])
    def test_an_open_iterator_ends_with_python(self, tmp_path, workers):
        code, pids, errors = run(tmp_path, str(workers), 'leave')
        assert (code, len(pids), errors) == (0, workers, '')
        assert not any(map(alive, pids))

    def test_workers_leave_signals_to_the_parent(self, tmp_path):
        code, pids, errors = run(tmp_path, '2', 'interrupt')
        assert (code, len(pids), errors) == (0, 2, '')
        assert not any(map(alive, pids))

    def test_workers_end_with_a_killed_parent(self, tmp_path):
        code, pids, _ = run(tmp_path, '2', 'kill')
        assert code == -signal.SIGKILL and len(pids) == 2
        deadline = time.monotonic() + 10
        while any(map(alive, pids)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(map(alive, pids))

"""Batches of examples and the order in which training reads them.

A batch is a dict of arrays [B, ...]: those of its examples (see examples.py), `example_mask` [B] float32, 0 in rows
that only fill the last batch of an evaluation, and `place` [B] uint32, each example's place in the endless stream of
epochs (modulo 2^32), from which random keys are made. Every array whose name ends in `_mask` is 0 in rows that only
fill.

The batch of step s follows from the examples, `data.seed` and s alone, so the place in the data is one integer,
whatever reads ahead.
"""

import atexit
import signal
import weakref
from collections.abc import Generator, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from mixln_jax.data import text_files, workers
from mixln_jax.data.examples import Batch, Examples
from mixln_jax.system import signals
from mixln_jax.system.errors import DataError

ROUNDS = 8  # of mixing in a permutation
MIXED = 0x4556414C  # seed of the order in which an evaluation reads rows that are ordered by length
SETTINGS = 'data.workers', 'data.workers=0'


def training(
    examples: Examples, *, seed: int, batch_size: int, part: np.ndarray | slice = slice(None)
) -> grain.MapDataset:
    """Returns the batches of training: `dataset[s]` is the batch of step s (from 0), or the rows `part` of it.

    Every example comes once an epoch, each epoch in another order; a batch may span two epochs. `batch_size` is that of
    all processes together.
    """
    part = np.arange(batch_size)[part]
    dataset = grain.MapDataset.range(2**62 // batch_size)  # as good as endless
    return dataset.map(lambda s: batch_at(examples, seed, s * batch_size + part))


def batch_at(examples: Examples, seed: int, places: np.ndarray) -> Batch:
    """Returns the batch of the examples at `places` (from 0) of the endless stream of epochs."""
    batch = examples.batch(order(examples, seed, places), places // len(examples))
    return batch | marks(places, np.ones(len(places), bool))


def order(examples: Examples, seed: int, places: np.ndarray) -> np.ndarray:
    """Returns the numbers of the examples at `places` (from 0) of the endless stream of epochs."""
    epochs, places = np.divmod(places, len(examples))
    numbers = np.empty(len(places), np.int64)
    for epoch in np.unique(epochs):
        numbers[epochs == epoch] = permuted(places[epochs == epoch], len(examples), seed, epoch)
    return numbers


def marks(places: np.ndarray, real: np.ndarray) -> Batch:
    """Returns the arrays that every batch has: `example_mask` and `place`, of places [B] and of which are real [B]."""
    return {'example_mask': real.astype(np.float32), 'place': (places % 2**32).astype(np.uint32)}


def permuted(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `places` under one permutation of range(n), drawn by seed and epoch, at no cost in memory.

    Rounds of multiply, add and xor-shift permute range(2^k), the smallest one with at least n members; what lands
    outside of range(n) is sent on until it is inside ("cycle walking", Black and Rogaway 2002).
    """
    bits = max(2, (n - 1).bit_length())
    mask, half = np.uint64(2**bits - 1), np.uint64((bits + 1) // 2)
    keys = np.random.SeedSequence([seed, epoch]).generate_state(2 * ROUNDS, np.uint64)
    images, outside = places.astype(np.uint64), np.arange(len(places))
    while len(outside):
        image = images[outside]
        for factor, offset in zip(keys[::2] | np.uint64(1), keys[1::2], strict=True):
            image = (image * factor + offset) & mask
            image ^= image >> half
        images[outside] = image
        outside = outside[image >= n]
    return images.astype(np.int64)


def evaluation(examples: Examples, batch_size: int, seed: int | None = None) -> grain.MapDataset:
    """Returns batches of all examples once, in order, or with a `seed` in the order of an epoch of training; rows that
    fill up the last batch have masks of 0. They have `num_bytes` [B] where it is known; see examples.py."""

    def batch(number: int) -> Batch:
        places = np.arange(batch_size) + number * batch_size
        real = places < len(examples)
        wanted = np.where(real, places, 0)
        arrays = examples.batch(wanted if seed is None else order(examples, seed, wanted))
        for name, values in arrays.items():
            if name.endswith('_mask') or name == 'num_bytes':
                arrays[name] = values * real.reshape(-1, *(1,) * (values.ndim - 1)).astype(values.dtype)
        return arrays | marks(places, real)

    return grain.MapDataset.range(-(-len(examples) // batch_size)).map(batch)


def mixed(examples: Examples, batch_size: int) -> grain.MapDataset:
    """Returns what `evaluation` does, with rows that are ordered by length mixed, always in the same way: where only
    the first batches are read, they are to be like all of them."""
    return evaluation(examples, batch_size, MIXED if getattr(examples, 'by_length', False) else None)


def read(dataset: grain.MapDataset, start: int, workers: int) -> Generator[Batch]:
    """The batches from step `start` on, read ahead by threads or by `workers` processes; the same ones either way.

    Each process holds a copy of the examples. Close the iterator (`.close()`) to end threads and processes; collecting
    it or leaving Python does so too. Where a process has ended, or cannot start, iterating raises what
    `workers.explained` says.
    """
    batches = _read(dataset, start, workers)
    _reading.add(batches)
    return batches


def _read(dataset: grain.MapDataset, start: int, num_workers: int) -> Generator[Batch]:
    flags.FLAGS.mark_as_parsed()  # grain reads its absl flags, which outside of app.run nobody has parsed
    ahead = dataset[start:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    processes = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
    batches, begun = None, False
    try:
        if num_workers:
            signals.end_if_imported()
            workers.start_tracker()
        batches = iter(ahead.mp_prefetch(processes, worker_init_fn=_start_worker))
        with workers.starting():
            batch = text_files.call_within(None, lambda: _first(batches))  # a signal ends this wait
        while True:
            begun = True
            batch = {name: np.array(values) for name, values in batch.items()}  # frees the worker's shared memory
            yield batch
            batch = next(batches)
    except StopIteration:
        return
    except DataError:
        raise
    except Exception as error:
        explained = workers.explained(error, SETTINGS, begun) if num_workers else error
        if explained is error:
            raise
        raise explained from error
    finally:
        if batches is not None:
            batches.close()


def _first(batches: Iterator[Batch]) -> Batch:
    """The first batch, for which threads and processes start. They inherit the mask of this thread: a signal that goes
    to all processes, as Ctrl-C does, must be handled by the main thread, also while a worker starts."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.signals())
    return next(batches)


_reading: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Later, during interpreter shutdown, grain can no longer free its shared memory."""
    for batches in list(_reading):
        batches.close()


def _start_worker(index: int, count: int) -> None:
    del index, count
    signals.end_with_parent()

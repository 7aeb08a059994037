"""Rows of tokens and the order in which training reads them.

A row is a dict of `inputs` [T] int32, `targets` [T] int32 and `weights` [T] float32. targets[t] is the token after
inputs[t], so the step shifts nothing; its weight is 1 if it is a real token, else 0. In a batch each is [B, T].
"""

import atexit
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from mixln_jax import config
from mixln_jax.data.sources import Source, open_source
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.exits import DataError, UsageError

Batch = dict[str, np.ndarray]


class Pad:
    """One document a row, made when asked for: its first T-1 ids, eos, padding up to T; so at most T-1 targets."""

    def __init__(self, source: Source, tokenizer: Tokenizer, seq_length: int):
        self.fingerprint = _fingerprint(source, tokenizer, 'pad', seq_length)
        self._source, self._tokenizer, self._length = source, tokenizer, seq_length

    def __len__(self):
        return len(self._source)

    def __getitem__(self, i) -> Batch:
        ids = self._tokenizer.encode(self._source[i])[: self._length - 1]
        tokens = np.full(self._length + 1, self._tokenizer.pad_id, np.int32)
        tokens[: len(ids)] = ids
        tokens[len(ids)] = self._tokenizer.eos_id
        weights = (np.arange(self._length) < len(ids)).astype(np.float32)
        return {'inputs': tokens[:-1], 'targets': tokens[1:], 'weights': weights}


class Concat:
    """Documents end to end, eos after each, tokenised once and cut every T tokens; every weight is 1.

    Row i holds tokens i*T .. i*T+T of the stream; what is left at its end is no row. Raises DataError where the text
    does not fill one row.
    """

    def __init__(self, source: Source, tokenizer: Tokenizer, seq_length: int):
        self.fingerprint = _fingerprint(source, tokenizer, 'concat', seq_length)
        self._length = seq_length
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        stream = bytearray()
        for i in range(len(source)):
            stream += np.append(tokenizer.encode(source[i]), tokenizer.eos_id).astype(dtype).tobytes()
        self._stream = np.frombuffer(stream, dtype)
        if len(self) < 1:
            raise DataError(
                f'{len(self._stream)} tokens of text are not enough for one row of config.seq_length={seq_length}'
            )

    def __len__(self):
        return (len(self._stream) - 1) // self._length

    def __getitem__(self, i) -> Batch:
        i = range(len(self))[i]  # raises IndexError
        tokens = self._stream[i * self._length : (i + 1) * self._length + 1].astype(np.int32)
        return {'inputs': tokens[:-1], 'targets': tokens[1:], 'weights': np.ones(self._length, np.float32)}


def open_rows(data: config.Data, split: str, tokenizer: Tokenizer, seq_length: int, vocab_size: int) -> Pad | Concat:
    """The rows of a split, as `data.mode` makes them; `vocab_size` is the model's.

    Raises UsageError where the tokenizer has more ids than the model, DataError as `open_source` and `Concat` do.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UsageError(
            f'config.data.tokenizer={data.tokenizer} has {tokenizer.vocab_size} ids, '
            f'more than config.model.vocab_size={vocab_size}'
        )
    rows = {'pad': Pad, 'concat': Concat}[data.mode]
    return rows(open_source(data, split), tokenizer, seq_length)


def training(rows: Pad | Concat, *, seed: int, batch_size: int) -> grain.MapDataset:
    """Batches for training: `dataset[s]` is the batch of step s (from 0) and follows from rows, seed and s alone.

    Every row comes once an epoch, each epoch in another order; batches run over the border of epochs.
    """
    epochs = 2**62 // len(rows)  # as good as endless; for endless ones grain cannot count batches of one row
    shuffled = grain.MapDataset.source(rows).seed(seed).shuffle()
    return shuffled.repeat(epochs, reseed_each_epoch=True).batch(batch_size)


def read(dataset: grain.MapDataset, start: int, workers: int) -> Iterator[Batch]:
    """The batches from step `start` on, read ahead by threads or by `workers` processes; the same ones either way.

    Each process holds a copy of the rows. Close the iterator (`.close()`) to end threads and processes; collecting it
    or leaving Python does so too.
    """
    batches = _read(dataset, start, workers)
    _reading.add(batches)
    return batches


def _read(dataset, start, workers):
    flags.FLAGS.mark_as_parsed()  # grain reads its absl flags, which outside of app.run nobody has parsed
    ahead = dataset[start:].to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    batches = iter(ahead.mp_prefetch(processes, worker_init_fn=_start_worker))
    signals = {signal.SIGINT, signal.SIGTERM}
    try:
        if workers:
            resource_tracker.ensure_running()  # its start, if left to multiprocessing, would undo the mask
        # Threads and processes inherit this mask: a signal that goes to all processes, as Ctrl-C does, is the main
        # thread's to answer, also while a worker starts.
        with ThreadPoolExecutor(1, 'data', signal.pthread_sigmask, (signal.SIG_BLOCK, signals)) as starter:
            first = [starter.submit(next, batches).result()]
        for batch in itertools.chain(first, batches):
            first.clear()
            batch = {name: np.array(values) for name, values in batch.items()}  # frees the worker's shared memory
            yield batch
    finally:
        batches.close()


_reading = weakref.WeakSet()


@atexit.register
def _close_all():
    """Later, while Python takes its modules apart, grain can no longer free its shared memory."""
    for batches in list(_reading):
        batches.close()


def _start_worker(index, count):
    del index, count
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()  # a parent that was killed tells nobody
    os._exit(1)


def evaluation(rows: Pad | Concat, batch_size: int) -> Iterator[Batch]:
    """All rows once, in order; the last batch is filled up with rows of weight 0."""
    for start in range(0, len(rows), batch_size):
        batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        batch += [batch[0] | {'weights': np.zeros_like(batch[0]['weights'])}] * (batch_size - len(batch))
        yield {name: np.stack([row[name] for row in batch]) for name in batch[0]}


def _fingerprint(source, tokenizer, mode, seq_length):
    parts = f'{source.fingerprint} {tokenizer.fingerprint} {mode} {seq_length}'
    return hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

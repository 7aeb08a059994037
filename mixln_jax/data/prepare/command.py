"""`python -m mixln_jax.data.prepare`: turns text or images into a TFDS data set, or text into rows of tokens.

Each file of the input becomes one shard of the output. Processes work on shards, a rerun leaves out the finished ones,
and `--shards` gives some of them to a host. The bytes of a shard follow from its file and the options alone.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import queue
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm

from mixln_jax import config
from mixln_jax.data import text_files, tokenizers
from mixln_jax.data import workers as worker_processes
from mixln_jax.data.prepare import job as jobs
from mixln_jax.data.prepare import shards
from mixln_jax.data.prepare.units import Unit, list_units, read
from mixln_jax.data.sources import HELD_OUT, first_for_training, rank
from mixln_jax.system import cli, console, signals
from mixln_jax.system.errors import UsageError

SAMPLE = 1_000_000  # bytes of text from which the size of the output is estimated
MARGIN = 1.1  # factor on this estimate
PAUSE = 0.2  # seconds between readings of the workers' reports
SOURCES = 'tfds', 'jsonl', 'text', 'stdlib', 'images'
NAME_OF_IMAGES = 'images:1.0.0'  # the data set that is written if --name gives no other
SETTINGS = '--workers', '--workers 1'
RANGES = {
    'workers': (1, config.WORKERS),
    'skip_bad': (0, 2**62),
    'seq_length': (2, config.LONGEST),
    'max_document': (1, 10**9),
}


def prepare(
    data: config.Data,
    out: str,
    *,
    format: str,
    seq_length: int = 256,
    validation: str = '',
    only: slice = slice(None),
    workers: int = 1,
    skip_bad: int = 0,
    max_document: int = text_files.LARGEST,
) -> bool:
    """Prepares `data` into `out`; returns whether the data set is complete now.

    Args:
        data: source, tokenizer and mode.
        out: the output folder.
        format: 'tfds' or 'tokens'.
        seq_length: positions in a row of tokens.
        validation: files for validation, or the split of a data set; empty: a hash of the text decides.
        only: the shards to prepare.
        workers: processes.
        skip_bad: malformed records to leave out in each file.
        max_document: bytes of a line or of a record; longer ones are malformed.

    Raises:
        UsageError: `out` holds another preparation, another process prepares one of these shards, or the disk is too
        small.
        DataError: as sources and tokenizers do.
        MemoryExhausted, UsageError, Exit: a worker process has ended, see `workers.ended`.
    """
    signals.end_if_imported()
    folder = jobs.folder(out, format, data.name)
    units = list_units(data, validation)
    tokenizer = tokenizers.open_tokenizer(data) if format == 'tokens' else None
    first = None if any(unit.split for unit in units) else _first_for_training(units, data, skip_bad, max_document)
    job = jobs.Job(data, format, out, str(folder), tokenizer, seq_length, first, skip_bad, max_document)
    job.check_plan(units)
    # The validation split is small: the host with the first shard prepares all of it.
    mine = [
        unit
        for unit in units
        if (not only.start if unit.split == 'validation' else unit.number in range(*only.indices(unit.count)))
    ]
    if not mine:
        raise UsageError(f'--shards {only.start or 0}:{only.stop or ""}: there are only {units[0].count} shards')
    with job.claimed(mine):
        return _complete(job, units, mine, workers)


def _complete(job: jobs.Job, units: Sequence[Unit], mine: Sequence[Unit], workers: int) -> bool:
    """Prepares the units `mine`; returns whether all units are complete now, and so a data set."""
    _verify(job, [unit for unit in mine if job.result(unit, notes=False)])
    pending = [unit for unit in mine if not job.result(unit)]
    if pending:
        workers = min(workers, len(pending))
        _check_room(job, pending)
        if job.lack_notes_alone(pending):
            console.say(f'writing the .rows files in {job.folder}: ends of documents, bytes of text and checksums')
        elif not job.repeats(pending):
            job.begin()
        console.say(f'{len(pending)} of {len(units)} shards to prepare into {job.folder}, {workers} processes')
        _write_all(job, pending, workers)
    results = [result for unit in units if (result := job.result(unit))]
    if len(results) < len(units):
        missing = [unit.name for unit in units if not job.result(unit)]
        named = ', '.join(missing[:8] + ['...'] * (len(missing) > 8))
        console.say(f'mixln_jax: {job.folder} still lacks {len(missing)} of {len(units)} shards: {named}')
        return False
    job.finish(results)
    _summarise(job, results)
    return True


def _first_for_training(units: Sequence[Unit], data: config.Data, skip_bad: int, max_document: int) -> int:
    """Returns the lowest rank of documents for training; for C4 this reads some thousand documents."""
    documents = (pair for unit in units for pair in read(data, unit, skip_bad, max_document).pairs())
    ranks = (rank(decides.encode()) for decides, _ in documents)
    return first_for_training(ranks, HELD_OUT[data.source], '--path', ', or --validation FILES')


def _verify(job: jobs.Job, finished: Sequence[Unit]) -> None:
    """Reads the rows of finished units and marks damaged units as not finished."""
    if job.format == 'tokens' and finished:
        console.say(f'checking the rows of {len(finished)} finished shards')
        for unit in finished:
            if damage := job.verify(unit):
                console.say(f'mixln_jax: {damage}; the shard is written again')


def _check_room(job: jobs.Job, pending: Sequence[Unit]) -> None:
    """Raises UsageError if the disk is too small: writes the first documents to a temporary folder and extrapolates."""
    free = shutil.disk_usage(job.folder).free
    with tempfile.TemporaryDirectory() as folder:
        sample = dataclasses.replace(job, folder=folder)
        seen = shards.write(sample, pending[0], lambda *_: None, limit=SAMPLE)
        pattern = '*.rows' if job.lack_notes_alone(pending) else '*-of-*'
        written = sum(path.stat().st_size for path in pathlib.Path(folder).glob(pattern))
    needed = int(MARGIN * written * sum(unit.size for unit in pending) / max(seen['position'], 1))
    console.say(f'about {_size(needed)} to write, {_size(free)} free')
    if needed > free:
        raise UsageError(
            f'{job.folder} has room for {_size(free)}, but about {_size(needed)} are needed; nothing was written'
        )


def _size(count: float) -> str:
    return f'{count / 1e9:,.2f} GB' if count >= 1e9 else f'{count / 1e6:,.2f} MB'


def _write_all(job: jobs.Job, pending: Sequence[Unit], workers: int) -> None:
    total = sum(unit.size for unit in pending)
    slow, counted = not sys.stderr.isatty(), 'images' if job.data.source == 'images' else 'docs'
    with tqdm.tqdm(total=total, unit='B', unit_scale=True, mininterval=10 if slow else 0.2, smoothing=0.05) as bar:
        counts, start = [0, 0], time.perf_counter()

        def report(position: int, num_documents: int, num_bytes: int) -> None:
            counts[0] += num_documents
            counts[1] += num_bytes
            seconds = max(time.perf_counter() - start, 1e-9)
            speed = f'{counts[0] / seconds:,.0f} {counted}/s, {counts[1] / seconds / 1e6:,.1f} MB/s'
            bar.set_postfix_str(speed, False)
            bar.update(position)

        if workers == 1:
            for unit in pending:
                shards.write(job, unit, report)
        else:
            _write_with_processes(job, pending, workers, report)


def _write_with_processes(
    job: jobs.Job, pending: Sequence[Unit], workers: int, report: Callable[[int, int, int], None]
) -> None:
    context = multiprocessing.get_context('spawn')
    others, started, begun = multiprocessing.active_children(), [], False
    try:
        worker_processes.start_tracker()
        reports = context.Queue()
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (reports,))
    except OSError as error:
        raise worker_processes.explained(error, SETTINGS, begun) from error
    try:
        running = {pool.submit(_write_in_worker, job, unit) for unit in pending}
        started = [worker for worker in multiprocessing.active_children() if worker not in others]
        while running:
            done, running = concurrent.futures.wait(running, PAUSE, concurrent.futures.FIRST_COMPLETED)
            report(0, 0, 0)
            while True:
                try:
                    report(*reports.get_nowait())
                    begun = True
                except queue.Empty:
                    break
            for future in done:
                future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        # The pool ends the other workers with SIGTERM. The exit codes are known after it has waited for all.
        pool.shutdown(cancel_futures=True)
        codes = [worker.exitcode for worker in started if worker.exitcode not in (None, -signal.SIGTERM)]
        raise worker_processes.ended(codes[0] if codes else -signal.SIGTERM, SETTINGS, begun) from error
    finally:
        for worker in multiprocessing.active_children():  # after an error or a signal in the middle of a shard
            if worker not in others:
                worker.kill()
        pool.shutdown(cancel_futures=True)
        reports.close()
        for unit in pending:
            job.clean(unit)


_reports: Any = None  # the queue of a worker


def _start_worker(reports: Any) -> None:
    signals.end_with_parent()
    global _reports
    _reports = reports


def _write_in_worker(job: jobs.Job, unit: Unit) -> None:
    shards.write(job, unit, lambda *new: _reports.put(new))


def _summarise(job: jobs.Job, results: Sequence[Mapping[str, Any]]) -> None:
    of_images = job.data.source == 'images'
    for split in ('train', 'validation'):
        counts = [result[split] for result in results if split in result]
        console.say(
            f'{split}: {sum(shard["documents"] for shard in counts):,} {"images" if of_images else "documents"} '
            f'in {len(counts)} shards'
            + (f', {sum(shard["rows"] for shard in counts):,} rows' if job.format == 'tokens' else '')
        )
    empty, bad = (sum(result[name] for result in results) for name in ('empty', 'bad'))
    left_out = f'{bad:,} bad images' if of_images else f'{empty:,} documents without text and {bad:,} bad records'
    console.say(f'{left_out} were left out')
    for line in [line for result in results for line in result['skipped']][:5]:
        console.say(f'  {line}')
    console.say(f'mixln_jax: complete: {job.usage()}')


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of `prepare` by name. Raises UsageError; --help prints and exits with 0."""
    parser = _parser()
    options = cli.parse(parser, argv)
    options.only = _shard_range(options.only)
    for name, (least, most) in RANGES.items():
        if not least <= (value := getattr(options, name)) <= most:
            must = f'at least {least}' if value < least else f'at most {most}'
            raise UsageError(f'--{name} must be {must}')
    if options.source in ('jsonl', 'text', 'images') and not options.path:
        raise UsageError(f'--source {options.source} needs --path FILES')
    if options.source == 'images' and options.format != 'tfds':
        raise UsageError('--source images goes with --format tfds')
    if options.source == 'tfds' and options.format == 'tfds':
        raise UsageError('--source tfds goes with --format tokens')
    if options.source == 'stdlib' and options.validation:
        raise UsageError('--validation does not go with --source stdlib, which has its own')
    arguments = vars(options)
    del arguments['traceback']
    keys = ('source', 'path', 'name', 'data_dir', 'split', 'tokenizer', 'tokenizer_path', 'mode')
    data = config.Data(**{key: arguments.pop(key) for key in keys})
    if data.source == 'images':
        name = NAME_OF_IMAGES if data.name == config.Data.name else data.name
        data = dataclasses.replace(data, name=name, validation_path=arguments.pop('validation'), held_out=0.01)
    return arguments | {'data': data}


def _shard_range(text: str) -> slice:
    """Returns the shards of `A:B` as a slice. Raises UsageError."""
    try:
        start, colon, end = text.partition(':')
        only = slice(int(start or 0), int(end) if end else None)
        if not colon or only.start < 0 or (end and only.stop <= only.start):
            raise ValueError
    except ValueError:
        raise UsageError('--shards is A:B, such as 0:8; A is the first shard, B the one after the last') from None
    return only


def _parser() -> argparse.ArgumentParser:
    choices = {field.name: field.metadata.get('choices') for field in dataclasses.fields(config.Data)}
    parser = argparse.ArgumentParser(prog='python -m mixln_jax.data.prepare', description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add('--source', required=True, choices=SOURCES)
    add(
        '--path',
        default='',
        metavar='FILES',
        help='jsonl, text: paths or globs, separated by commas; images: folder or archive',
    )
    add('--out', required=True, metavar='DIR', help='for tfds the later config.data.data_dir, for tokens data.path')
    add('--format', required=True, choices=('tfds', 'tokens'), help='text as ArrayRecord shards, or rows of tokens')
    add(
        '--validation',
        default='',
        metavar='FILES',
        help='files for validation, else 1 %% by a hash of the text; --source tfds: a split; images: folder or '
        'archive, or ARCHIVE,FILE with a file of classes',
    )
    add('--name', default='c4/en', metavar='NAME', help='data set to write, or to read with --source tfds [c4/en]')
    add('--data_dir', default='', metavar='DIR', help='--source tfds: folder or gs:// address that contains it')
    add('--split', default='train', metavar='SPLIT', help='--source tfds: the split for training [train]')
    add('--tokenizer', default='sentencepiece', choices=choices['tokenizer'], help='tokens: [sentencepiece]')
    add('--tokenizer_path', default='', metavar='FILE', help='tokens: as config.data.tokenizer_path [T5 vocabulary]')
    add('--mode', default='pad', choices=choices['mode'], help='tokens: how documents fill rows [pad]')
    add('--seq_length', type=int, default=256, metavar='T', help='tokens: positions in a row [256]')
    add(
        '--shards',
        default=':',
        dest='only',
        metavar='A:B',
        help='prepare only these shards, so that hosts share the work [all]',
    )
    add(
        '--workers',
        type=int,
        default=os.cpu_count(),
        metavar='N',
        help='processes, each works on a shard [one per core]',
    )
    add('--skip_bad', type=int, default=0, metavar='N', help='malformed records to leave out in each file [0]')
    add(
        '--max_document',
        type=int,
        default=text_files.LARGEST,
        metavar='BYTES',
        help='longer lines of a file, or documents of a data set, are malformed records [%(default)s]',
    )
    add('--traceback', action='store_true', help='show where an error comes from')
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""

    def job() -> None:
        arguments = parse(argv)
        with signals.stop.may_interrupt():
            prepare(**arguments)

    return cli.call(job, show_traceback='--traceback' in argv)

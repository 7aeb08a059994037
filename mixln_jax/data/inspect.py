"""`python -m mixln_jax.data.inspect --workdir DIR --step N`: the texts, ids and masks, or the images, that step N sees;
`--verify` with a run, or with a folder of prepared rows as --data_path: whether all of these rows are whole."""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, which take seconds

# ruff: noqa: E402
import argparse
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mixln_jax import config as configs
from mixln_jax.data import batches, layout, prompt_rows, rows, tokenizers
from mixln_jax.data import verify as verification
from mixln_jax.data.sources import OF_IMAGES
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system import cli, console, files, outputs
from mixln_jax.system.errors import DataError, UsageError


def inspect(
    workdir: str | pathlib.Path, step: int, num_rows: int | None = None, data_path: str | None = None
) -> Iterator[dict[str, Any]]:
    """Yields the first `num_rows` rows (None: all) of the batch of step `step` (from 1) of the run in `workdir`.

    Each is a dict: `row` in the batch, `origin` (file and record), `text` (a list, one piece of text for each document
    in the row; a conversation is a list of pairs instead, a part of its text and whether it is learned), for pairs
    `sides` (what each text is: chosen, rejected), and `inputs`, `targets`, `loss_mask`, for packed rows `segment_ids`
    and `positions`, each a list of T.
    `data_path` is where the run's data is now (None: where it was).

    Raises:
        UsageError: no run in `workdir`, no such step.
        DataError: the data cannot be read, or is not what the run saw, naming what differs.
    """
    workdir = files.local(workdir, '--workdir')
    config = configs.read(workdir / 'config.json')
    places = _places(config, step, num_rows)
    tokenizer = tokenizers.load(workdir / 'tokenizer', rows.seen_by_run(workdir)[0].get('tokenizer'))
    run_rows = rows.open_rows_of_run(workdir, config, config.data.split, tokenizer, data_path)
    batch = batches.batch_at(run_rows, config.data.seed, places)
    for i, number in enumerate(batches.order(run_rows, config.data.seed, places).tolist()):
        row = {name: values[i].tolist() for name, values in batch.items()}
        texts = SHOWN.get(config.task.name, _texts)(row, tokenizer)
        sides = {'sides': ['chosen', 'rejected'] * (len(texts) // 2)} if config.task.name in rows.OF_PAIRS else {}
        yield {'row': i, 'origin': run_rows.origin(number), 'text': texts, **sides, **row}


def _places(config: configs.Config, step: int, num_rows: int | None) -> np.ndarray:
    """Returns the places of the first rows of a step in the endless stream of epochs. Raises UsageError."""
    size = config.examples_per_step
    if not 1 <= step * size < 2**62:
        raise UsageError('--step counts from 1' if step < 1 else f'--step {step} is beyond any run')
    if num_rows is not None and num_rows < 0:
        raise UsageError('--rows must be at least 0')
    return ((step - 1) * size + np.arange(size))[:num_rows]


def inspect_images(
    workdir: pathlib.Path, config: configs.Config, step: int, num_rows: int | None, data_path: str | None, out: str
) -> Iterator[dict[str, Any]]:
    """Writes the contact sheet of a step to `out`, or to inspect/ in the folder of the run; yields its first rows.

    Raises UsageError and DataError as `inspect`, and UsageError if `out` cannot be written.
    """
    from mixln_jax.data.images import contact_sheet  # not for runs on text

    found, sheet = contact_sheet.inspect(workdir, config, _places(config, step, None), data_path)
    path = outputs.resolve(out or workdir / 'inspect' / f'step_{step}.png')
    with outputs.writing(path):
        outputs.write(path, sheet)
    console.say(f'{len(found)} images of step {step}: {path}', file=sys.stderr)
    yield from found[:num_rows]


def verify(workdir: str | pathlib.Path | None, data_path: str | None = None) -> None:
    """Reads every row of every split of a folder of prepared rows; prints what is damaged, and which splits are whole.

    The folder is that of the run in `workdir`, which must be what the run saw, or `data_path`.

    Raises UsageError if `workdir` is not a run on prepared rows; DataError if rows are damaged.
    """
    folder = data_path or ''
    if workdir:
        workdir = files.local(workdir, '--workdir')
        config = configs.read(workdir / 'config.json')
        if config.data.source != 'tokens':
            raise UsageError(f'--verify reads prepared rows; {workdir} has config.data.source={config.data.source}')
        folder = data_path or config.data.path
        tokenizer = tokenizers.load(workdir / 'tokenizer')
        for split in dict.fromkeys((config.data.split, config.eval.split)):
            rows.open_rows_of_run(workdir, config, split, tokenizer, data_path)
    count = 0
    for split, number, damaged in verification.damages(folder):
        console.say(*(damaged or [f'{split}: {number:,} rows are whole']))
        count += len(damaged)
    if count:
        raise DataError(
            f'{folder}: {count} shards are damaged; the command that made the folder, python -m mixln_jax.data.prepare '
            f'... --out {folder}, run once more, writes them again'
        )


def _texts(row: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Returns the text of each document of a row; ends and padding, which have no target, are left out."""
    segments = row.get('segment_ids', [1] * len(row['inputs']))
    tokens = [pair for *pair, real in zip(segments, row['inputs'], row['loss_mask'], strict=True) if real]
    return [
        tokenizer.decode([token for _, token in piece])
        for _, piece in itertools.groupby(tokens, key=lambda pair: pair[0])
    ]


def _parts(row: Mapping[str, Any], tokenizer: Tokenizer) -> list[list[tuple[str, bool]]]:
    """Returns the text of each conversation of a row, in parts that are learned or not; special tokens as <id>."""
    targets, mask = np.array(row['targets']), np.array(row['loss_mask']) > 0
    segments = np.array(row.get('segment_ids', np.ones_like(targets)))
    conversations = []
    for number in range(1, segments.max() + 1):
        places = np.flatnonzero(segments == number)
        places = places[: np.flatnonzero(mask[places])[-1] + 1]  # what comes after is padding
        ids = [row['inputs'][places[0]], *targets[places].tolist()]
        learned = [False, *mask[places].tolist()]
        runs = itertools.groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1])
        conversations.append([(_spelled([i for i, _ in run], tokenizer), is_learned) for is_learned, run in runs])
    return conversations


def _prompt(row: Mapping[str, Any], tokenizer: Tokenizer) -> list[str]:
    """Returns the prompt of a row, all of it: it has a target less than tokens."""
    return [_spelled(prompt_rows.context(*(np.array(row[name]) for name in ('inputs', 'loss_mask'))), tokenizer)]


def _spelled(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Returns the text of ids, with special tokens as <id>."""
    runs = itertools.groupby(ids, key=tokenizer.can_yield)
    return ''.join(tokenizer.decode(list(run)) if text else ''.join(f'<{i}>' for i in run) for text, run in runs)


# How the texts of a row are shown, where not as documents.
SHOWN: dict[str, Callable[[Mapping[str, Any], Tokenizer], list[Any]]] = {
    'instructions': _parts,
    'online': _prompt,
} | dict.fromkeys(rows.OF_PAIRS, _parts)


def _former(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arrays that had other names in earlier versions, under those names."""
    return {former: row[name] for former, name in layout.FORMER_NAMES.items() if name in row}


def show(row: Mapping[str, Any], colour: bool = False) -> list[str]:
    """Returns the lines that describe a row. What is learned of a conversation stands out by `colour`, else in
    brackets."""
    count, total = int(sum(row['loss_mask'])), len(row['inputs'])
    begin, end = ('\x1b[1;32m', '\x1b[0m') if colour else ('[[', ']]')
    lines = [f'row {row["row"]}: {row["origin"]}: {count} of {total} targets are real']
    names = row.get('sides', ['text'] * len(row['text']))
    for name, text in zip(names, row['text'], strict=True):
        if isinstance(text, str):
            lines.append(f'  {name:<11} {text!r}')
            continue
        parts = ((repr(part)[1:-1], learned) for part, learned in text)
        lines.append(f'  {name:<11} ' + ''.join(f'{begin}{part}{end}' if learned else part for part, learned in parts))
    for name in ('inputs', 'targets', 'loss_mask', 'segment_ids', 'positions'):
        if name in row:
            lines.append(f'  {name:<11} {_runs(row[name])}')
    return lines


def _runs(values: Sequence[float]) -> str:
    """Returns numbers separated by spaces; four or more equal neighbours are written as 0*17."""
    words = []
    for value, group in itertools.groupby(values):
        count, word = len(list(group)), f'{value:g}'
        words += [f'{word}*{count}'] if count > 3 else [word] * count
    return ' '.join(words)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog='python -m mixln_jax.data.inspect', description=__doc__, allow_abbrev=False)
    parser.add_argument('--workdir', metavar='DIR', help='folder of a run')
    parser.add_argument('--step', type=int, metavar='N', help='step, from 1; it need not have come yet')
    parser.add_argument('--verify', action='store_true', help='read all prepared rows instead, and name damaged ones')
    parser.add_argument('--rows', default=4, type=int, metavar='K', help='rows to show; 0: the whole batch [4]')
    parser.add_argument('--data_path', metavar='PATH', help=rows.MOVED)
    parser.add_argument('--out', default='', metavar='FILE', help='images: contact sheet [DIR/inspect/step_N.png]')
    parser.add_argument('--json', action='store_true', help='a JSON object a row')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')

    def job() -> None:
        options = cli.parse(parser, argv)
        if options.verify == (options.step is not None):
            raise UsageError('--step N or --verify is needed, one of them')
        if not (options.workdir or (options.verify and options.data_path)):
            raise UsageError(f'--workdir DIR{" or --data_path FOLDER" * options.verify} is missing')
        if options.verify:  # a signal ends it at once
            verify(options.workdir, options.data_path)
            return
        stop.started()
        workdir = files.local(options.workdir, '--workdir')
        config = configs.read(workdir / 'config.json')
        if config.data.source in OF_IMAGES or config.task.name == 'classification':
            rows_of_step = options.step, options.rows or None, options.data_path
            for row in inspect_images(workdir, config, *rows_of_step, options.out):
                console.say(json.dumps(row) if options.json else '{row}: {origin}: {label} ({class})'.format(**row))
            return
        if options.out:
            raise UsageError('--out is for runs on images; rows of text are printed')
        colour = sys.stdout.isatty() and not os.environ.get('NO_COLOR')
        for row in inspect(options.workdir, options.step, options.rows or None, options.data_path):
            console.say(*([json.dumps(row | _former(row))] if options.json else show(row, colour)))

    return cli.call(job, show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

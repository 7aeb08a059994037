"""Text from trained weights: `python -m mixln_jax.generate --checkpoint DIR --prompt TEXT`.

It goes to standard output as it is written, or with --out into a file of JSON lines; --prompts reads such a file.
"""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, and for good: what is written is whole or not there

# ruff: noqa: E402
import argparse
import contextlib
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import orjson

from mixln_jax import config as configs
from mixln_jax.distributed import mesh as meshes
from mixln_jax.evaluation.generation import FIELDS, Continuation, Writer, json_lines
from mixln_jax.models.sampler import Sampler
from mixln_jax.models.sampling import Sampling
from mixln_jax.runs import weights
from mixln_jax.system import cli, console, files, outputs
from mixln_jax.system.errors import CheckpointError, DataError, UsageError


def read_prompts(path: str) -> list[dict[str, Any]]:
    """Returns the records of a file of JSON lines, objects with a string `prompt`.

    Raises DataError, naming file and line, for anything else.
    """
    try:
        content = files.read(files.local(path, '--prompts'), DataError)
    except FileNotFoundError as error:
        raise DataError(f'--prompts: there is no file {path}') from error
    records = []
    for number, line in enumerate(content.split(b'\n'), 1):
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
        except ValueError as error:
            raise DataError(f'{path}:{number}: not JSON: {str(error).partition(":")[0]}') from None
        if not isinstance(record, dict) or not isinstance(record.get('prompt'), str):
            raise DataError(
                f'{path}:{number}: an object with a string `prompt` is needed, such as {{"prompt": "def "}}'
            )
        records.append(record)
    if not records:
        raise DataError(f'{path} holds no prompts')
    return records


def _prompts(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the records to continue, each `--num_samples` times."""
    if (options.prompt is None) == (options.prompts is None):
        raise UsageError('give either --prompt TEXT or --prompts FILE.jsonl')
    if options.prompt is not None:
        try:
            options.prompt.encode()
        except UnicodeEncodeError:
            raise UsageError('--prompt: the text contains bytes that are not UTF-8') from None
    records = [{'prompt': options.prompt}] if options.prompts is None else read_prompts(options.prompts)
    return [record for record in records for _ in range(options.num_samples)]


def _sampling(options: argparse.Namespace) -> Sampling:
    """Returns how to choose tokens. Raises UsageError for an option that is out of range."""
    for name in ('max_new_tokens', 'batch_size', 'num_samples'):
        if not 1 <= getattr(options, name) < 2**24:
            raise UsageError(f'--{name} must be at least 1')
    if not 0 <= options.seed < 2**32:
        raise UsageError('--seed must be from 0 to 2^32 - 1')
    if '' in options.stop:
        raise UsageError('--stop is empty')
    try:
        return Sampling(options.temperature, options.top_k, options.top_p)
    except UsageError as error:
        raise UsageError(f'--{error}') from None


def _place(out: str) -> pathlib.Path:
    """Returns where to write. Raises UsageError for a file that is there and was not written by this command."""
    path = outputs.resolve(out)
    if path.exists():
        first = files.read(path, UsageError).partition(b'\n')[0]
        try:
            ours = {*FIELDS} <= {*orjson.loads(first)}
        except (ValueError, TypeError):
            ours = False
        if not ours:
            raise UsageError(f'--out {out} is there already and holds no generated text; take another name')
    return path


def _open(options: argparse.Namespace, count: int) -> tuple[weights.TextEncoder, Writer, int]:
    """Returns the encoder and writer of the checkpoint, and its window, for batches of up to `count` rows."""
    found = weights.load(options.checkpoint, options.compute_dtype, options.norm_position)
    if not found.model.causal:
        raise CheckpointError(f'{found.where} sees both sides of a token, so it does not predict the next one')
    encoder = weights.text_encoder(found)
    devices = meshes.devices('auto')
    mesh = meshes.make_mesh(configs.Mesh(data=math.gcd(count, len(devices))), devices)
    sampler = Sampler(found.model, found.max_length, mesh)
    return encoder, Writer(sampler, sampler.to_devices(found.params), encoder), found.max_length


def _written(
    options: argparse.Namespace, records: Sequence[dict[str, Any]], writer: Writer, contexts: Sequence[list[int]]
) -> list[Continuation]:
    """Returns the continuation of every context. Without --out they are printed, a single one while it grows."""
    sampling, size, made = _sampling(options), min(options.batch_size, len(records)), []
    for first in range(0, len(records), size):
        rows, shown = range(first, min(first + size, len(records))), 0
        stream = writer.stream(
            contexts[first : first + size],
            [options.stop] * len(rows),
            max_new=options.max_new_tokens,
            sampling=sampling,
            seed=options.seed,
            rows=rows,
            size=size,
        )
        if options.out is None and len(records) == 1:
            console.say(records[0]['prompt'], end='')
        for batch in stream:
            if options.out is None and len(records) == 1:
                console.say(batch[0].text[shown:], end='')
                shown = len(batch[0].text)
        if options.out is None:
            for row, one in zip(rows, batch, strict=True) if len(records) > 1 else ():
                console.say(f'--- {row + 1} of {len(records)}', records[row]['prompt'] + one.text)
        made += batch
    return made


def _run(options: argparse.Namespace) -> None:
    _sampling(options)
    records = _prompts(options)
    with contextlib.ExitStack() as closing:
        if options.out is not None:  # before anything is computed
            closing.enter_context(outputs.writing(out := _place(options.out)))
        encoder, writer, window = _open(options, min(options.batch_size, len(records)))
        contexts = [encoder.encode(record['prompt']) for record in records]
        if cut := sum(len(context) >= window for context in contexts):
            longer = f'{cut:,} of {len(contexts):,} prompts fill the window of {window} tokens'
            console.say(f'mixln_jax: warning: {longer} and lose their beginning', file=sys.stderr)
        start = time.perf_counter()
        made = _written(options, records, writer, contexts)
        seconds, tokens = time.perf_counter() - start, sum(len(one.tokens.ids) for one in made)
        if options.out is not None:
            pairs = zip(records, made, strict=True)
            outputs.write(out, json_lines(record | one.record(record['prompt']) for record, one in pairs))
        elif len(records) == 1:
            console.say()
        place = f' in {out}' if options.out is not None else ''
        ends = ', '.join(f'{sum(one.tokens.finish == end for one in made):,} {end}' for end in ('stop', 'length'))
        said = f'{len(made):,} completions{place} ({ends}), {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s'
        console.say(f'{said} with compiling', file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m mixln_jax.generate', description='Continues prompts with trained weights.', allow_abbrev=False
    )
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='DIR', help='a run, <run>/checkpoints/<step> or a Hugging Face folder')
    add('--norm_position', metavar='P', help='placement of a Hugging Face folder that does not say it')
    add('--prompt', metavar='TEXT', help='what to continue; an empty one begins a new text')
    add('--prompts', metavar='FILE.jsonl', help='JSON lines with a field `prompt`; other fields are kept')
    add('--out', metavar='FILE.jsonl', help='write prompts and completions here instead of printing them')
    add('--max_new_tokens', type=int, default=128, metavar='N', help='tokens of a completion, at most [128]')
    add('--temperature', type=float, default=1.0, metavar='X', help='logits are divided by it; 0: the likeliest [1.0]')
    add('--top_k', type=int, default=0, metavar='K', help='draw from the K likeliest tokens; 0: all [0]')
    add('--top_p', type=float, default=1.0, metavar='P', help='draw from the likeliest that have this share [1.0]')
    add('--seed', type=int, default=0, metavar='N', help='of the draws [0]')
    add('--num_samples', type=int, default=1, metavar='N', help='completions of each prompt [1]')
    add('--stop', action='append', default=[], metavar='TEXT', help='end before this text; may be given several times')
    add('--batch_size', type=int, default=16, metavar='B', help='prompts at a time [16]')
    add('--compute_dtype', choices=('float32', 'bfloat16'), default='float32', help='type of activations [float32]')
    add('--traceback', action='store_true', help='show where an error comes from')
    return cli.call(lambda: _run(cli.parse(parser, argv)), show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

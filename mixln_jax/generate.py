"""Text from trained weights: `python -m mixln_jax.generate --checkpoint DIR --prompt TEXT`.

It goes to standard output as it is written, or with --out into a file of JSON lines; --prompts reads such a file.
"""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports, and for good: what is written is whole or not there

# ruff: noqa: E402
import argparse
import contextlib
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from mixln_jax import config as configs
from mixln_jax.distributed import mesh as meshes
from mixln_jax.evaluation import prompts
from mixln_jax.evaluation.generation import FIELDS, Continuation, Writer, json_lines
from mixln_jax.evaluation.prompts import Prompt
from mixln_jax.models.sampler import Sampler
from mixln_jax.models.sampling import Sampling
from mixln_jax.runs import encoder as encoders
from mixln_jax.runs import weights
from mixln_jax.system import cli, console, files, outputs
from mixln_jax.system.errors import CheckpointError, UsageError


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    """Returns the prompts to continue, each `--num_samples` times."""
    if (options.prompt is None) == (options.prompts is None):
        raise UsageError('give either --prompt TEXT or --prompts FILE.jsonl')
    if options.prompt is not None:
        try:
            options.prompt.encode()
        except UnicodeEncodeError:
            raise UsageError('--prompt: the text contains bytes that are not UTF-8') from None
    given = [prompts.from_text(options.prompt)] if options.prompts is None else prompts.read(options.prompts)
    return [prompt for prompt in given for _ in range(options.num_samples)]


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


@dataclasses.dataclass(frozen=True)
class _Job:
    """Prompts with what continues them.

    Attributes:
        prompts: one for each completion.
        contexts: their token ids.
        writer: of the checkpoint.
        shown: what is printed before each completion: the text that it continues, not a question that it answers.
    """

    prompts: list[Prompt]
    contexts: list[list[int]]
    writer: Writer
    shown: list[str]


def _open(options: argparse.Namespace, given: list[Prompt]) -> _Job:
    """Returns the job; warns of prompts that are cut."""
    found = weights.load(options.checkpoint, options.compute_dtype, options.norm_position)
    if found.model.obstacle:
        raise CheckpointError(f'{found.where} {found.model.obstacle}')
    encoder = encoders.of_weights(found)
    template = prompts.open_template(options.template, found.config, encoder.tokenizer, found.template)
    encoder = prompts.with_turn_end(encoder, template)
    contexts = prompts.contexts(given, encoder, template)
    window, devices = found.max_length, meshes.devices('auto')
    if cut := sum(len(context) >= window for context in contexts):
        longer = f'{cut:,} of {len(contexts):,} prompts fill the window of {window} tokens'
        console.say(f'mixln_jax: warning: {longer} and lose their beginning', file=sys.stderr)
    rows = min(options.batch_size, len(given))
    mesh = meshes.make_mesh(configs.Mesh(data=math.gcd(rows, len(devices))), devices)
    sampler = Sampler(found.model, window, mesh)
    writer = Writer(sampler, sampler.to_devices(found.params), encoder)
    return _Job(given, contexts, writer, ['' if template else prompt.text or '' for prompt in given])


def _write(options: argparse.Namespace, job: _Job) -> list[Continuation]:
    """Returns the continuation of every prompt. Without --out they are printed, a single one while it grows."""
    sampling, count, made = _sampling(options), len(job.prompts), list[Continuation]()
    size = min(options.batch_size, count)
    for first in range(0, count, size):
        rows, printed = range(first, min(first + size, count)), 0
        stream = job.writer.stream(
            job.contexts[first : first + size],
            [options.stop] * len(rows),
            max_new=options.max_new_tokens,
            sampling=sampling,
            seed=options.seed,
            rows=rows,
            size=size,
        )
        if options.out is None and count == 1:
            console.say(job.shown[0], end='')
        for batch in stream:
            if options.out is None and count == 1:
                console.say(batch[0].text[printed:], end='')
                printed = len(batch[0].text)
        if options.out is None:
            for row, one in zip(rows, batch, strict=True) if count > 1 else ():
                console.say(f'--- {row + 1} of {count}', job.shown[row] + one.text)
        made += batch
    return made


def _records(job: _Job, made: Sequence[Continuation]) -> Iterator[dict[str, Any]]:
    """Yields a record for each completion: the fields of its prompt, and FIELDS."""
    for prompt, context, one in zip(job.prompts, job.contexts, made, strict=True):
        text = job.writer.decode(context) if prompt.text is None else prompt.text
        yield prompt.fields | one.record(text)


def _run(options: argparse.Namespace) -> None:
    _sampling(options)
    given = _prompts(options)
    with contextlib.ExitStack() as closing:
        if options.out is not None:  # before anything is computed
            closing.enter_context(outputs.writing(out := _place(options.out)))
        job = _open(options, given)
        start = time.perf_counter()
        made = _write(options, job)
        seconds, tokens = time.perf_counter() - start, sum(len(one.tokens.ids) for one in made)
        if options.out is not None:
            outputs.write(out, json_lines(_records(job, made)))
        elif len(made) == 1:
            console.say()
        place = f' in {out}' if options.out is not None else ''
        ends = ', '.join(f'{sum(one.tokens.finish == end for one in made):,} {end}' for end in ('stop', 'length'))
        if empty := sum(not one.text for one in made):
            ends += f', {empty:,} empty'
        summary = f'{len(made):,} completions{place} ({ends}), {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s'
        console.say(f'{summary} with compiling', file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog='python -m mixln_jax.generate', description='Continues prompts with trained weights.', allow_abbrev=False
    )
    add = parser.add_argument
    add('--checkpoint', required=True, metavar='DIR', help='a run, <run>/checkpoints/<step> or a Hugging Face folder')
    add('--norm_position', metavar='P', help='placement of a Hugging Face folder that does not say it')
    add('--prompt', metavar='TEXT', help='what to continue; an empty one begins a new text')
    add(
        '--prompts',
        metavar='FILE.jsonl',
        help='JSON lines with `prompt`, `messages` or `instruction`; other fields are kept',
    )
    add(
        '--template',
        choices=prompts.TEMPLATES,
        default=prompts.AUTO,
        help='how a prompt becomes a question to answer, as config.data.template; auto: as the weights were taught to '
        'answer, none: it is a text to continue [auto]',
    )
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

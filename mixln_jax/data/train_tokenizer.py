"""Trains a byte-level BPE: `python -m mixln_jax.data.train_tokenizer --source ... --vocab_size N --out DIR`."""

from mixln_jax.system.signals import stop

if __name__ == '__main__':
    stop.install()  # before the imports; a signal ends the command at once: there is nothing to save before the end

# ruff: noqa: E402
import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mixln_jax import config
from mixln_jax.data.sources import Source, open_source
from mixln_jax.data.tokenizers import HuggingFace, Tokenizer, open_tokenizer
from mixln_jax.system import cli, console, files, outputs
from mixln_jax.system.errors import DataError, UsageError, reading

SPECIALS = ['<pad>', '</s>', '<s>']  # ids 0, 1, 2; no token for the unknown: every byte is known
FILES = 'tokenizer.json', 'tokenizer_config.json', 'fingerprint.json'
SMALLEST = len(SPECIALS) + 256 + 1  # specials, bytes and a merge
MEASURED = 10**7  # bytes of text over which the mean is taken


def train(source: Source, vocab_size: int) -> bytes:
    """Trains a byte-level BPE; returns its tokenizer.json.

    Equal texts give equal bytes. Documents are read one after the other; only their distinct words are kept in memory.

    Args:
        source: the documents.
        vocab_size: the largest number of ids; there are fewer if too few pairs of tokens occur twice.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((source[i] for i in range(len(source))), trainer)
    return tokenizer.to_str(pretty=True).encode() + b'\n'


def bytes_per_token(source: Source, tokenizer: Tokenizer) -> tuple[float, int]:
    """Returns the mean over the first documents (10 MB, or all if there are fewer) and the bytes of these documents."""
    size = ids = 0
    for i in range(len(source)):
        text = source[i]
        size += len(text.encode())
        ids += len(tokenizer.encode(text))
        if size >= MEASURED:
            break
    return size / ids, size


def run(options: argparse.Namespace) -> None:
    """Trains a tokenizer, writes it and prints a summary; `options` are from `parse`."""
    data = config.Data(source=options.source, path=options.path, name=options.name, data_dir=options.data_dir)
    out = outputs.resolve(options.out)
    path = out if out.suffix == '.json' else out / 'tokenizer.json'
    with outputs.writing_into(path.parent):  # fails before the work, not after it
        _check_replaceable(out)
        try:
            source = open_source(data, 'train')
        except DataError as error:
            raise DataError(str(error).replace('config.data.path', '--path')) from None
        _train(source, out, path, options)


def _check_replaceable(out: pathlib.Path) -> None:
    """Raises UsageError if `out` is a file, or contains a file, that `run` has not written."""
    with reading(f'--out {out}', UsageError, 'not a tokenizer of this command; give another name'):
        path: pathlib.Path | None = out
        if out.is_dir():
            for name in FILES:
                outputs.sweep(out / name)
            present = {item.name for item in out.iterdir()} - {outputs.LOCK}
            path = out / FILES[0] if present else None
            if others := sorted(present - {*FILES}):
                raise UsageError(
                    f'--out {out} has a file that this command does not write: {others[0]}; give another name'
                )
        if path and os.path.lexists(path):
            specials = [token['content'] for token in files.read_json(path, UsageError)['added_tokens']]
            if specials != SPECIALS:
                raise ValueError('other special tokens')


def _train(source: Source, out: pathlib.Path, path: pathlib.Path, options: argparse.Namespace) -> None:
    console.say(f'training on {len(source):,} documents')
    body = train(source, options.vocab_size)
    if path == out:
        outputs.write(path, body)
        tokenizer = open_tokenizer(config.Data(tokenizer='huggingface', tokenizer_path=str(path)))
    else:
        tokenizer = HuggingFace({'tokenizer.json': body, 'tokenizer_config.json': b'{}'}, str(out))
        tokenizer.save(out)
    if tokenizer.vocab_size < options.vocab_size:
        console.say(
            f'mixln_jax: warning: only {tokenizer.vocab_size:,} of {options.vocab_size:,} ids: no other pair of tokens '
            'occurs twice in a word of this text',
            file=sys.stderr,
        )
    mean, size = bytes_per_token(source, tokenizer)
    console.say(
        f'{tokenizer.vocab_size:,} ids, {mean:.2f} bytes per token on the first {size / 1e6:.1f} MB of the text',
        f'written to {out}; to use it:',
        f'--config.data.tokenizer=huggingface --config.data.tokenizer_path={path} '
        f'--config.model.vocab_size={tokenizer.vocab_size}',
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the options of the command line. Raises UsageError; --help prints and exits with 0."""
    parser = argparse.ArgumentParser(
        prog='python -m mixln_jax.data.train_tokenizer',
        description='Trains a byte-level BPE vocabulary on the training split of a source.',
        allow_abbrev=False,
    )
    defaults = config.Data()
    sources = 'stdlib', 'jsonl', 'text', 'tfds'
    parser.add_argument('--source', required=True, choices=sources, help='kind of source, as config.data.source')
    parser.add_argument('--path', default='', metavar='FILES', help='files of jsonl or text: paths or globs, commas')
    parser.add_argument('--name', default=defaults.name, help='name of a tfds data set [%(default)s]')
    parser.add_argument('--data_dir', default='', metavar='DIR', help='folder or gs:// bucket of tfds data sets')
    parser.add_argument('--vocab_size', required=True, type=int, metavar='N', help=f'ids, at least {SMALLEST}')
    parser.add_argument('--out', required=True, metavar='DIR|FILE.json', help='folder, or the tokenizer.json alone')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')
    options = cli.parse(parser, argv)
    if options.vocab_size > config.LARGEST_VOCABULARY:
        raise UsageError(f'--vocab_size must be at most {config.LARGEST_VOCABULARY}')
    if options.vocab_size < SMALLEST:
        raise UsageError(
            f'--vocab_size {options.vocab_size} is too small: special tokens, bytes and one merge need {SMALLEST}'
        )
    if options.source in ('jsonl', 'text') and not options.path:
        raise UsageError(f'--path FILES is missing; --source {options.source} needs it')
    return options


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    return cli.call(lambda: run(parse(argv)), show_traceback='--traceback' in argv)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))

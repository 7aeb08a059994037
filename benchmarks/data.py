"""Speed of the way from text to batches, in tokens a second and core, beside the bare tokenizer as the ceiling.

python -m benchmarks.data --path books.jsonl.gz --tokenizer_path t5.model [--documents 20000] [--rounds 5]
"""

import argparse
import contextlib
import gzip
import io
import itertools
import json
import pathlib
import tempfile
import time

import numpy as np
import sentencepiece

from mixln_jax import config
from mixln_jax.data import batches, rows, text_files, tokenizers
from mixln_jax.data.prepare.command import prepare

LENGTH, BATCH = 256, 512


def seconds(job):
    """CPU time of this process for `job()`: other programs on a shared machine count less."""
    start = time.process_time()
    job()
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--path', required=True)
    parser.add_argument('--tokenizer_path', required=True)
    parser.add_argument('--documents', type=int, default=20_000)
    parser.add_argument('--rounds', type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(options, pathlib.Path(folder))


def measure(options, folder):
    sample = folder / 'sample.jsonl.gz'
    records = (record for path in text_files.paths(options.path) for _, record in text_files.Reader('jsonl', path))
    texts = [record['text'] for record in itertools.islice(records, options.documents)]
    with gzip.open(sample, 'wt', encoding='utf-8') as file:
        file.writelines(json.dumps({'text': text}) + '\n' for text in texts)
    data = config.Data(source='jsonl', path=str(sample), tokenizer_path=options.tokenizer_path)
    tokenizer = tokenizers.open_tokenizer(data)
    processor = sentencepiece.SentencePieceProcessor(model_file=options.tokenizer_path)
    count = sum(len(tokenizer.encode(text)) for text in texts)
    rounds = itertools.count()

    def make(format, mode):
        out = folder / f'{format}-{mode}-{next(rounds)}'
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            of = config.Data(source='jsonl', path=str(sample), tokenizer_path=options.tokenizer_path, mode=mode)
            prepare(of, str(out), format=format, seq_length=LENGTH, workers=1)
        return out

    def bare():
        for text in texts:
            processor.encode(text)

    jobs = {
        'prepare --format tokens --mode pad': lambda: make('tokens', 'pad'),
        'prepare --format tokens --mode pack': lambda: make('tokens', 'pack'),
        'prepare --format tokens --mode concat': lambda: make('tokens', 'concat'),
        'prepare --format tfds': lambda: make('tfds', 'pad'),
    }
    table(bare, count, jobs, dict.fromkeys(jobs, count), options.rounds)

    tfds = make('tfds', 'pad')
    sources = {
        'tfds, pad': config.Data(data_dir=str(tfds), tokenizer_path=options.tokenizer_path),
        'jsonl, pad': data,
        **{
            f'tokens, {mode}': config.Data(source='tokens', path=str(make('tokens', mode)), mode=mode)
            for mode in ('pad', 'pack', 'concat')
        },
    }
    jobs, counts = {}, {}
    for name, of in sources.items():
        made = rows.open_rows(of, 'train', tokenizer, LENGTH, tokenizer.vocab_size)
        dataset, steps = batches.training(made, seed=0, batch_size=BATCH), 200 if of.source == 'tokens' else 8
        jobs[name] = lambda dataset=dataset, steps=steps: [dataset[s] for s in range(steps)]
        counts[name] = int(sum(dataset[s]['loss_mask'].sum() for s in range(steps)))
    table(bare, count, jobs, counts, options.rounds)


def table(bare, count, jobs, tokens, rounds):
    """Takes all jobs in turn, several times, the bare tokenizer before and after each: its speed on a shared machine
    wanders, so a job's time a token is compared with the mean of the two beside it."""
    ratios, speeds, ceiling = {name: [] for name in jobs}, {name: [] for name in jobs}, [seconds(bare)]
    for _ in range(rounds):
        for name, job in jobs.items():
            spent = seconds(job)
            ceiling.append(seconds(bare))
            speeds[name].append(tokens[name] / spent)
            ratios[name].append(spent / tokens[name] * count / np.mean(ceiling[-2:]))
    print("\n| | real tokens/s/core | time a token : the bare tokenizer's | lowest to highest |\n|---|---|---|---|")
    print(f'| the bare tokenizer | {count / np.median(ceiling):,.0f} | 1 | |')
    for name in jobs:
        of = np.array(ratios[name])
        shown = f'{np.median(of):.3g} | {of.min():.3g} to {of.max():.3g}'
        print(f'| {name} | {np.median(speeds[name]):,.0f} | {shown} |', flush=True)


if __name__ == '__main__':
    main()

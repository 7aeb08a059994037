"""Malformed files, values and options; strangers at the roll call."""

import contextlib
import io
import itertools
import re
import shutil
import signal

import malformed as of_readers
import strangers as visitors

from benchmarks.campaign.judging import command, expect, judged, refused
from benchmarks.campaign.run import QUICKSTART
from mixln_jax import config as configs
from mixln_jax import evaluate, export, generate, main, recipes, replay
from mixln_jax.analysis import angular, drop, gradients, variance
from mixln_jax.data import inspect, train_tokenizer
from mixln_jax.data.prepare import command as prepare
from mixln_jax.distributed import rollcall
from mixln_jax.plan import command as plan
from mixln_jax.report import command as report
from mixln_jax.system import errors

WORDS = (
    '',
    ' ',
    'x',
    '-1',
    '0',
    '1.5',
    'nan',
    'inf',
    '1e999',
    '1e30',
    '9' * 5000,
    '[' * 5000,
    '{}',
    '()',
    'None',
    'True',
)
WORDS += (
    '../x',
    '/dev/null/x',
    '日本',
    '1,2',
    'a=b',
    '--',
    "'",
    '%s',
    'x' * 5000,
    '\udcff',
    '1:2',
    ':',
    'http://',
    'hf:',
)
NEEDED = {
    main.main: ['--config', 'nowhere.py'],
    evaluate.main: ['--checkpoint', 'nowhere'],
    export.main: ['--checkpoint', 'nowhere', '--out', 'out'],
    plan.main: ['--config', QUICKSTART, '--topology', 'v5e:1x1'],
    report.main: ['nowhere'],
    replay.main: ['--workdir', 'nowhere'],
    generate.main: ['--checkpoint', 'nowhere', '--prompt', 'a'],
    angular.main: ['--checkpoint', 'nowhere'],
    drop.main: ['--checkpoint', 'nowhere'],
    gradients.main: ['--checkpoint', 'nowhere'],
    variance.main: ['--checkpoint', 'nowhere'],
    prepare.main: ['--source', 'jsonl', '--path', 'nowhere', '--out', 'out', '--format', 'tokens'],
    inspect.main: ['--workdir', 'nowhere', '--step', '1'],
    train_tokenizer.main: ['--source', 'jsonl', '--path', 'nowhere', '--vocab_size', '300', '--out', 'out.json'],
}
NOT_TRIED = {'--help', '--traceback', '--config', '--compile', '--tasks'}  # lm_eval looks through all it has for 10 s
TOKENS = ['--tokenizer', 'bytes', '--format', 'tokens', '--seq_length', '16', '--workers', '1', '--out', 'made']
JSONL = ['--source', 'jsonl', '--path']
WHOLE = {
    'a run': (inspect.main, ['--workdir', '{}', '--step', '1']),
    'jsonl': (prepare.main, [*JSONL, '{}/a.jsonl', *TOKENS]),
    'gzip': (prepare.main, [*JSONL, '{}/a.gz', *TOKENS]),
    'huggingface': (
        prepare.main,
        [*JSONL, '{}/good.jsonl', *TOKENS, '--tokenizer', 'huggingface', '--tokenizer_path', '{}/tokenizer.json'],
    ),
    'tokens.json': (inspect.main, ['--verify', '--data_path', '{}']),
    'rows': (inspect.main, ['--verify', '--data_path', '{}']),
    'hf config': (export.main, ['--checkpoint', '{}', '--out', 'out']),
    'recipe': (plan.main, ['--config', '{}/a.py', '--topology', 'v5e:1x1']),
}


def called(job, *args):
    try:
        job(*args)
    except (errors.Exit, Exception) as error:
        return refused(error)
    return 'accepted'


def overridden(key, word):
    configs.build(recipes.load(QUICKSTART, recipes.overrides([f'--config.{key}={word}'])))


def values(row, every):
    """Every key with odd values; every option of every command with them, where there is nothing else to do."""
    for key, word in [*itertools.product(configs.flatten(configs.Config()), WORDS)][::every]:
        yield judged(f'{row}: keys', f'{key}={word[:40]}', called, overridden, key, word)
    cases = []
    for job, needed in NEEDED.items():
        shown = command(job, ['--help'])[1]
        options = {*re.findall(r'(?<=[\s\[])--[a-z][\w-]*', shown)} - NOT_TRIED
        cases += [(job, [*needed, f'{option}={word}']) for option in sorted(options) for word in WORDS]
    for job, words in cases[::every]:
        yield judged(
            f'{row}: options', f'{job.__module__} {words[-1][:60]}', lambda *args: command(*args)[0], job, words
        )


def whole(folder, reader, content, job, words):
    for name, body in (reader.others | {reader.file: content, 'good.jsonl': b'{"text": "one"}\n'}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    shutil.rmtree('made', ignore_errors=True)
    return command(job, [word.format(folder) for word in words])[0]


def malformed(base, count=80):
    """What no reader should be given: each reader called here, and `count` of it as whole commands."""
    every, row = max(1, 80 // count), 'malformed'
    (folder := base.folder / 'malformed').mkdir()
    readers = of_readers.readers(folder)
    signal.signal(signal.SIGINT, lambda *_: None)  # as in a command: a KeyboardInterrupt is a recipe's own
    for reader_name, reader in readers.items():
        cases = [*reader.inputs()]
        for number, (name, content) in enumerate(cases[::every]):
            here = folder / f'{reader_name} {number}'
            yield judged(f'{row}: files', f'{reader_name}: {name}', called, reader.run, here, content)
            shutil.rmtree(here, ignore_errors=True)
        for name, content in cases[:: -(-len(cases) * len(WHOLE) // count)] if reader_name in WHOLE else ():
            here = folder / f'whole {reader_name} {name[:20]}'.replace('/', ' ')
            job = WHOLE[reader_name]
            yield judged(f'{row}: whole commands', f'{reader_name}: {name}', whole, here, reader, content, *job)
    yield from values(row, every)


def all_came(kind):
    expect([[*peers] for peers in visitors.met(kind)] == [[1], [0]], 'not both processes came to each other')
    return 'turned away'


def strangers(base, count=100):
    """Everybody who is not of the run, at the roll call of two processes."""
    rollcall.SOON, rollcall.PAUSE, rollcall.LATE = 0.2, 0.02, 1.0  # as the tests have it
    for kind in [*visitors.VISITORS, *visitors.FAKES][:count]:
        with contextlib.redirect_stderr(io.StringIO()):
            yield judged('strangers at the roll call', kind, all_came, kind)

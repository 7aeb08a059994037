"""Files that a user can damage: whatever is in one, its reader accepts it or says in one line which file it is."""

import contextlib
import copy
import errno
import functools
import io
import json
import os
import shutil

import numpy as np
import pytest
from analysis_results import result

from mixln_jax import config as configs
from mixln_jax import evaluate, export, recipes, replay
from mixln_jax.analysis import angular, command
from mixln_jax.data import rows, squad
from mixln_jax.models.hf import config as hf_config
from mixln_jax.models.hf import tensors
from mixln_jax.report import inputs, overview, results, sections
from mixln_jax.runs import checkpoint_folders, log, weights, workdir
from mixln_jax.system import cli, errors

CONFIG = configs.default().to_dict()
CONFIG['model'] |= {'norm_position': ['pre'] * 12, 'layer_index': [*range(1, 13)], 'depth': 12}
HF = {'vocab_size': 64, 'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 2}
ASKED = {'id': 'q', 'question': 'who?', 'answers': [{'text': 'he', 'answer_start': 0}]}
RAW = {
    'nothing': b'',
    'blank': b' \n',
    'NULs': bytes(100),
    'not UTF-8': b'{"a": "\xff"}',
    'half': b'{"model": {"a"',
    'two': b'{"step": 1}{"step": 2}',
    'deep lists': b'[' * 100_000 + b']' * 100_000,
    'deep objects': b'{"model":' * 50_000 + b'1' + b'}' * 50_000,
    'deep, but readable': b'{"data": ' + b'[' * 900 + b']' * 900 + b', "results": ' + b'[' * 900 + b']' * 900 + b'}',
    'list': b'[]',
    'list of a list': b'[["model", "data", "step", "checkpoint"]]',
    'number': b'7',
    'infinite': b'1e999',
    'NaN': b'NaN',
    'null': b'null',
    'text': b'"model data step checkpoint files"',
    'empty object': b'{}',
    'number of 5,000 digits': b'{"step": ' + b'9' * 5000 + b'}',
    'names': b'{"\\u0000": "\\ud800", "model": "\\u0000"}',
}
# What may stand where something else belongs.
VALUES = {
    'null': None,
    'true': True,
    'list': [],
    'lists': [[1], [2, 3]],
    'object': {'a': {}},
    'text': 'ab',
    'odd text': '\0\ud800\n' * 300,
    'negative': -3,
    'huge': 10**4000,
    'float': 1.5,
    'NaN': float('nan'),
    'infinite': float('inf'),
    'almost infinite': 1e308,
}


def places(content, most=20):
    """Ways (of keys and positions) into a JSON value, one at least of each kind."""
    found = [()]
    for way in found:
        at = functools.reduce(lambda value, part: value[part], way, content)
        parts = at if isinstance(at, dict) else range(min(2, len(at))) if isinstance(at, list) else ()
        found += [(*way, part) for part in parts]
    return found[1:] if len(found) < most else found[1 :: -(-len(found) // most)]


def damaged(content):
    """(name, bytes) of malformed versions of a JSON object."""
    yield from RAW.items()
    for number, way in enumerate(places(content)):
        for at, (name, value) in enumerate([*VALUES.items(), ('missing', None)]):
            if (number + at) % 5:
                continue
            changed = copy.deepcopy(content)
            owner = functools.reduce(lambda value, part: value[part], way[:-1], changed)
            if name == 'missing':
                del owner[way[-1]]
            else:
                owner[way[-1]] = value
            yield f'{".".join(map(str, way))}: {name}', json.dumps(changed).encode()


def read_report(path):
    """What the report does of the run of which `path` is a file, but for drawing."""
    folder = path.parents[len(path.parts) - path.parts.index('run') - 2]
    defaults = {'config.json': CONFIG, 'metrics.jsonl': {'step': 1, 'tokens': 2, 'eval/perplexity': 3.5}}
    for name, content in defaults.items():
        if not os.path.lexists(folder / name):
            (folder / name).write_text(json.dumps(content) + '\n')
    runs, problems, _ = inputs.read([str(folder)])
    for problem in problems:
        raise problem
    if runs:
        overview.overview(runs)
    for run in runs:
        _ = run.bad_step, run.steps, [run.results(name) for name in run.analyses]
    sections._runs(runs), sections._evaluations(runs)
    [sections._numbers(run.lines, 'eval/perplexity') for run in runs]


def metrics_lines(body):
    """Bytes of an object, as the line between two others."""
    return b'{"step": 1}\n' + body.replace(b'\n', b' ') + b'\n{"step": 9}\n'


READERS = {
    'config.json of a run': ('config.json', CONFIG, 2, lambda path: configs.read(path)),
    'config.json of a work directory': ('config.json', CONFIG, 2, lambda path: workdir._check_free(path.parent)),
    'environment.json': (
        'environment.json',
        {'data': {'a': 1}, 'eval_data': {}},
        2,
        lambda p: rows.seen_by_run(p.parent),
    ),
    'metrics.jsonl': ('metrics.jsonl', {'step': 2, 'a': 1}, 5, log.read_metrics),
    'seal of metrics.jsonl': (
        'metrics.jsonl',
        {'step': 2},
        5,
        lambda p: log.check_metrics(p, 9, {'lines': 2, 'digest': ''}),
    ),
    'result.json in --out': (
        'result.json',
        {'job': 'angular', 'figures': []},
        2,
        lambda p: command._check_free(angular, p.parent),
    ),
    '--out of evaluate': ('out.json', {'checkpoint': 'a', 'step': 1}, 2, evaluate._place),
    'export.json': (
        'export.json',
        {'data_mode': 'pad', 'tokenizer': 'ab'},
        5,
        lambda p: weights.about_export(p.parent),
    ),
    'export.json in --out': (
        'export.json',
        {'files': ['export.json']},
        2,
        lambda p: export._check_replaceable(p.parent),
    ),
    'config.json of Hugging Face': (
        'config.json',
        HF | {'rms_norm_eps': 1e-6, 'rope_scaling': {'type': 'default'}},
        5,
        hf_config.read,
    ),
    'index of shards': (tensors.INDEX, {'weight_map': {'a': 'b.safetensors'}}, 5, tensors._read_index),
    'SQuAD': ('squad.json', {'data': [{'paragraphs': [{'context': 'he is', 'qas': [ASKED]}]}]}, 4, squad.read),
    'tokenizer_config.json': (
        'tokenizer_config.json',
        {'do_lower_case': True},
        5,
        lambda p: squad.open_tokenizer(p.parent),
    ),
    'tokenizer.json': (
        'tokenizer.json',
        {'model': {'type': 'WordPiece', 'vocab': {'a': 0}}},
        5,
        lambda p: squad.open_tokenizer(p.parent),
    ),
    **{
        f'report: {name}': (
            f'run/analysis/{name}/result.json',
            {'results': [result(name)], 'definition': 'a'},
            5,
            read_report,
        )
        for name in results.ANALYSES
    },
    'report: config.json': ('run/config.json', CONFIG, 2, read_report),
    'report: metrics.jsonl': (
        'run/metrics.jsonl',
        {'step': 2, 'tokens': 3, 'eval/perplexity': 1.5, 'layers': [1.5]},
        5,
        read_report,
    ),
    'report: environment.json': (
        'run/environment.json',
        {'commit': 'ab', 'devices': {'count': 2, 'kind': 'a'}, 'data': {'mode': 'pad'}},
        5,
        read_report,
    ),
    'report: debug': ('run/debug/report.json', {'step': 2}, 5, read_report),
    'time of a checkpoint': (
        checkpoint_folders.METADATA,
        dict.fromkeys(checkpoint_folders.TIMES, 1),
        5,
        lambda p: checkpoint_folders.commit_time(p.parent),
    ),
}


@pytest.mark.parametrize('reader', READERS)
def test_damaged(reader, tmp_path):
    name, content, code, read = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / 'vocab.txt').write_text('[CLS]\n[SEP]\n[PAD]\na\n')
    if reader == 'export.json in --out':
        (tmp_path / 'vocab.txt').unlink()
    for what, body in damaged(content):
        path.write_bytes(metrics_lines(body) if path.name == 'metrics.jsonl' else body)
        fails_well(what, read, path, {code})
    for what in unreadable(path):
        fails_well(what, read, path, {code, 2})


def unreadable(path):
    """Makes of a path what is no file."""
    for what, make in {
        'a pipe': os.mkfifo,
        'a folder': os.mkdir,
        'a loop': lambda path: os.symlink(path, path),
    }.items():
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        make(path)
        yield what
        path.rmdir() if what == 'a folder' else path.unlink()


def fails_well(what, read, path, codes):
    try:
        read(path)
    except errors.Exit as error:
        said = errors.one_line(error)
        assert error.code in codes, (what, error)
        assert len(said) < 610 and str(path.parent) in said and 'internal' not in said, (what, said)
    except BaseException as error:
        raise AssertionError(what) from error


CONFIG_OF_BATCH = configs.Config(batch_size=2, seq_length=3, accumulate=1)
BATCH = {'inputs': np.zeros((2, 3), 'i4'), 'targets': np.zeros((2, 3), 'i4'), 'loss_mask': np.ones((2, 3), 'f4')}


def stored(**arrays):
    body = io.BytesIO()
    np.savez(body, **arrays)
    return body.getvalue()


def test_damaged_batches(tmp_path):
    path, read = tmp_path / 'batch_5.npz', lambda path: replay.read_batch(path, CONFIG_OF_BATCH)
    path.write_bytes(stored(**BATCH))
    assert read(path).keys() == BATCH.keys() | {'example_mask', 'place'}
    bodies = dict(RAW)
    for name, array in {
        'scalar': np.float32(1),
        'none': np.zeros((0, 3), 'i4'),
        'larger': np.zeros((200, 300), 'i4'),
        'objects': np.array([[None] * 3] * 2),
        'texts': np.array([['a'] * 3] * 2),
        'floats': np.zeros((2, 3)),
        'ids': np.full((2, 3), 2**30, 'i4'),
    }.items():
        bodies[f'{name} in place of inputs'] = stored(**BATCH | {'inputs': array})
    bodies |= {'others': stored(a=BATCH['inputs']), 'more': stored(**BATCH, a=BATCH['inputs']), 'empty': stored()}
    bodies |= {'half a file': stored(**BATCH)[:200], 'flipped': stored(**BATCH).replace(b'descr', b'\xffescr')}
    array = io.BytesIO()
    np.save(array, BATCH['inputs'])
    for what, body in (bodies | {'an .npy': array.getvalue()}).items():
        path.write_bytes(body)
        with pytest.raises(errors.CheckpointError) as caught:
            read(path)
        assert str(caught.value).startswith(f'{path}: not a batch: '), what
    for what in unreadable(path):
        fails_well(what, read, path, {5})


RECIPES = {
    'its own BaseException': 'class Own(BaseException): pass\nraise Own',
    'an exception without words': 'class Own(Exception):\n    def __str__(self): raise TypeError\nraise Own',
    'GeneratorExit': 'raise GeneratorExit',
    'an end': 'import sys\nsys.exit(0)',
    'NULs': 'def get_config():\n    return "\0"',
    'deep': f'x = {"[" * 5000}',
    'a long number': f'x = {"9" * 5000}',
    'endless': 'def f(): f()\nf()',
    'no text': '\xff\xfe',
    'a list': 'def get_config():\n    return []',
}


@pytest.mark.parametrize('body', RECIPES.values(), ids=RECIPES)
def test_a_bad_recipe(body, tmp_path):
    path = tmp_path / 'recipe.py'
    path.write_bytes(body.encode('latin-1'))
    with pytest.raises(errors.UsageError, match='recipe.py'):
        recipes.load(str(path))


def test_damaged_tensors(tmp_path):
    path = tmp_path / 'model.safetensors'
    for what, body in RAW.items():
        path.write_bytes(len(body).to_bytes(8, 'little') + body)
        fails_well(what, tensors._read_file, path, {5})
    for what in unreadable(path):
        fails_well(what, tensors._read_file, path, {5})


@pytest.mark.parametrize(
    'number', [errno.ELOOP, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ENOTCONN, errno.EMFILE]
)
def test_what_a_file_system_answers_is_not_our_fault(number, capsys):
    def job():
        raise OSError(number, os.strerror(number), '/a/file')

    assert cli.call(job) == 2 and "'/a/file'" in capsys.readouterr().err


def test_a_work_directory_that_is_moved_ends_its_run(tmp_path):
    """Lines after it would be lost with the folder, and a checkpoint would make another one."""
    folder = tmp_path / 'run'
    folder.mkdir()
    with contextlib.closing(log.Metrics(folder)) as lines:
        lines.add(1, {'tokens': 1})
        lines.flush()
        folder.rename(tmp_path / 'moved')
        lines.add(2, {'tokens': 2})
        for write in (lines.flush, lines.seal):
            with pytest.raises(errors.UsageError, match='run/metrics.jsonl is missing: the work directory was moved'):
                write()


@pytest.mark.parametrize(
    'error, code',
    [
        (OSError(5, 'a'), 2),
        (ValueError('tensorstore'), 2),
        (errors.CheckpointError('a'), 2),
        (errors.NumericsError('a'), 6),
    ],
)
def test_a_work_directory_that_is_removed_ends_its_run(tmp_path, error, code):
    folder = tmp_path / 'run'
    with pytest.raises(errors.Exit) as caught, workdir.open_workdir(folder, configs.Config()):
        shutil.rmtree(folder)
        raise error
    assert caught.value.code == code and (code == 6 or f'{folder} is missing' in str(caught.value))

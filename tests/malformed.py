"""Malformed files: for each reader of user files its inputs, as pairs (name, bytes), and how it is called.

`run` calls one of them. Every one must be accepted or end in an exits.Exit, in one line, with code 2, 4 or 5.
"""

import contextlib
import dataclasses
import gzip
import io
import json
import pathlib
import random
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator

import corpora
import data_sets
import hf_folders
import numpy as np
import pictures
import safetensors.numpy
import vocabularies

from mixln_jax import config, recipes, replay
from mixln_jax.data import chat, datasets, prepared, records, text_files, tokenizers, verify
from mixln_jax.data.images import examples
from mixln_jax.data.prepare import job as jobs
from mixln_jax.data.prepare import units
from mixln_jax.models.hf import config as hf_config
from mixln_jax.models.hf import tensors
from mixln_jax.models.hf import vit as hf_vit
from mixln_jax.runs import weights

ODD = (None, True, -1, 0, 1.5, float('nan'), float('inf'), 1e308, 10**30, 2**63, '', 'x', '\0', '../x', [], {}, [[]])
DEEP = (b'[' * 100_000, b'{"a":' * 100_000, b'[' * 900 + b']' * 900, b'{"text":' * 900 + b'1' + b'}' * 900)
TEXTS = (b'', b' ', b'\n', b'\0' * 100, b'\xff\xfe{\0}\0', b'\xef\xbb\xbf{}', b'\xed\xa0\x80', b'null', b'true', b'0')
TEXTS += (b'[]', b'{}', b'""', b'{', b'{"a"', b'NaN', b'-', b'1e999', b'"\\ud800"', b'{"a": 1, "a": 2}', b'[{}]')
TEXTS += (b'9' * 5000, b'{"a": %s}' % (b'9' * 5000), b'{"a": 1e%s}' % (b'9' * 400), b'"%s"' % (b'x' * 10**6), b'<html>')
RECORD = b'{"messages": [{"role": "user", "content": "a"}]}'
TEMPLATE = (
    b'{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}'
)
Inputs = Iterator[tuple[str, bytes]]


def plain() -> Inputs:
    """What is no file of any kind."""
    yield from ((f'text {number}', text) for number, text in enumerate(TEXTS))
    yield from ((f'deep {number}', text) for number, text in enumerate(DEEP))


def damaged(good: bytes, cuts: int = 8, flips: int = 16) -> Inputs:
    """A good file, cut short, with bytes changed, longer."""
    rng = random.Random(0)
    for number in range(cuts):
        yield f'cut {number}', good[: len(good) * number // cuts]
    for number in range(flips):
        content = bytearray(good)
        content[rng.randrange(min(len(good), 10 ** rng.randrange(2, 7)))] ^= rng.randrange(1, 256)
        yield f'flip {number}', bytes(content)
    yield 'twice', good * 2
    yield 'zeros after it', good + bytes(1000)


def values(good: dict, limit: int) -> Inputs:
    """A JSON object with one value that is another, or missing: `limit` of them, spread over all."""
    found = [(path, odd) for path in _paths(good) for odd in (*ODD, 'missing')]
    for path, odd in found[:: max(1, len(found) // limit)]:
        changed = json.loads(json.dumps(good))
        group = changed
        for part in path[:-1]:
            group = group[part]
        if odd == 'missing':
            del group[path[-1]]
        else:
            group[path[-1]] = odd
        yield f'{".".join(map(str, path))} is {odd!r}', json.dumps(changed).encode()


def _paths(value, above=()):
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs)[:40]:
        yield (*above, key)
        yield from _paths(inner, (*above, key))


class Reader:
    """One reader: the name of its file in a folder, what else is there, a good file, how it is called."""

    def __init__(self, file: str, good: bytes, call: Callable, others: dict = None, inputs: Callable = None):
        self.file, self.good, self.call, self.others = file, good, call, others or {}
        self._inputs = inputs or (lambda good: [])

    def inputs(self) -> Inputs:
        """Its malformed files."""
        yield from plain()
        yield from damaged(self.good)
        yield from self._inputs(self.good)

    def run(self, folder: pathlib.Path, content: bytes | None):
        """Calls it on a file of this content; None: on what is there already."""
        for name, body in (self.others | {self.file: content}).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name != self.file or content is not None:
                (folder / name).write_bytes(body)
        with contextlib.redirect_stdout(io.StringIO()):
            self.call(folder)


def json_values(limit: int) -> Callable:
    """The inputs of a reader of JSON: `values` of its good file."""
    return lambda good: values(json.loads(good), limit)


def _archives(good):
    """Batches that are no batches."""

    def packed(**arrays):
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        return file.getvalue()

    arrays = dict(np.load(io.BytesIO(good)))
    for name in arrays:
        yield f'{name}: missing', packed(**{key: value for key, value in arrays.items() if key != name})
        for odd in (
            np.zeros((3, 3)),
            np.float32(1),
            np.array(['x']),
            np.zeros((8, 5), complex),
            np.zeros((8, 5), bool),
        ):
            yield f'{name}: {odd.dtype} {odd.shape}', packed(**arrays | {name: odd})
        yield f'{name}: objects', packed(**arrays | {name: np.array([{}, []], object)})
        yield f'{name}: a bomb', packed(**arrays | {name: np.zeros(10**6)})
        yield f'{name}: ids', packed(**arrays | {name: arrays[name] - 7})
        yield f'{name}: large', packed(**arrays | {name: arrays[name] + 10**6})
    for header in ("{'descr': '<f8', 'fortran_order': False, 'shape': (10**12,)}", "{'descr': '|O'}", '(' * 999, '1+'):
        for shape in ('(1000000000000,)', '(-1,)', '(8, 5'):
            body = header.replace('(10**12,)', shape).ljust(118).encode() + b'\n'
            file = io.BytesIO()
            with zipfile.ZipFile(file, 'w') as archive:
                for name in arrays:
                    archive.writestr(f'{name}.npy', b'\x93NUMPY\1\0' + struct.pack('<H', len(body)) + body)
            yield f'header {header[:30]} {shape}', file.getvalue()


def _tensor_files(good):
    """Headers of safetensors."""
    for header in (*TEXTS, *DEEP):
        yield f'header {header[:20]!r}', struct.pack('<Q', len(header)) + header
    for odd in ('F9', None, 3):
        for shape, ends in (([2], [0, 8]), ([-1], [0, 8]), ([2**40, 2**40], [0, 8]), ([2], [0, 2**60]), ([2], [8, 0])):
            header = json.dumps({'a': {'dtype': odd or 'F32', 'shape': shape, 'data_offsets': ends}}).encode()
            yield f'{odd} {shape} {ends}', struct.pack('<Q', len(header)) + header + bytes(8)
    for size in (0, 1, 2**40, 2**63, 2**64 - 1):
        yield f'size {size}', struct.pack('<Q', size) + b'{}'


def _tokenizers(good):
    """Parts of a tokenizer.json that its library takes, or panics over."""
    spec = json.loads(good)
    for part, of in {
        'normalizer': ({'type': 'Precompiled', 'precompiled_charsmap': 'AAEC'},),
        'pre_tokenizer': ({'type': 'FixedLength', 'length': 0}, {'type': 'Split', 'behavior': 'Isolated'}),
        'decoder': ({'type': 'Strip', 'content': 'a', 'start': 10**6, 'stop': 0},),
        'model': (
            {'type': 'Unigram', 'unk_id': 5, 'vocab': [['a', -1.0]]},
            {'type': 'Unigram', 'unk_id': None, 'vocab': [['</s>', -1.0]]},
            {'type': 'WordLevel', 'unk_token': 'none', 'vocab': {'</s>': 0}},
            {'type': 'WordLevel', 'unk_token': '</s>', 'vocab': {'</s>': 2**32 - 1}},
        ),
        'truncation': ({'max_length': 0, 'strategy': 'LongestFirst', 'stride': 5, 'direction': 'Right'},),
    }.items():
        for number, value in enumerate(of):
            yield f'{part} {number}', json.dumps(spec | {part: value}).encode()
    empty = {'type': 'Replace', 'pattern': {'String': ''}, 'content': 'x'}
    yield 'an empty pattern', json.dumps(spec | {'normalizer': empty}).encode()
    yield from values(spec | {'model': {key: spec['model'][key] for key in ('type', 'vocab', 'merges')}}, 60)


def _lines(good):
    """Lines among good ones."""
    for name, text in plain():
        yield f'{name} as a line', good + text + b'\n' + good
    for odd in ODD:
        yield f'text is {odd!r}', json.dumps({'text': odd}).encode()


def _packed(good):
    yield 'zeros', gzip.compress(bytes(7 * 10**7), 1)
    yield 'twice', gzip.compress(good)
    for name, text in plain():
        yield f'{name}, packed', gzip.compress(text)


def readers(folder: pathlib.Path) -> dict[str, Reader]:
    """All of them; `folder` is for what they need."""
    data = corpora.two_files(folder)
    made = folder / 'made'
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        corpora.prepare_to(made, data)
    rows = _contents(made, made)
    tokenizer = vocabularies.byte_level()
    saved = {name: body for name, body in rows.items() if name.startswith('tokenizer/')}
    of_run = config.Config(batch_size=8, seq_length=5)
    batch = {name: np.ones((8, 5), np.int32) for name in ('inputs', 'targets')} | {'loss_mask': np.ones((8, 5), 'f4')}
    stored, network = io.BytesIO(), json.dumps(_network()).encode()
    np.savez(stored, **batch)
    run = json.dumps(_run()).encode()
    lines = b'{"text": "one"}\n{"text": "two"}\n'
    index = json.dumps({'weight_map': dict.fromkeys('ab', 'part.safetensors')}).encode()
    tensor = safetensors.numpy.save({'a': np.ones(3, np.float32), 'b': np.ones((2, 2), np.float16)})
    first = json.loads(rows['.prepare/plan.json'])['first for training']
    job = jobs.Job(data, 'tokens', '', '', tokenizers.Bytes(), corpora.T, first, 0)
    of_files = units.list_units(data, '')

    data_sets.write(folder)
    of_dataset = _contents(folder, folder / 'c4')
    info, features = (of_dataset[f'c4/en/3.1.0/{name}.json'] for name in ('dataset_info', 'features'))

    def dataset(path):
        made = datasets.Dataset('c4/en', 'train', str(path))
        made.__getitems__(range(len(made)))

    def rows_of(path):
        for split in prepared.description(str(path))['splits']:
            made = prepared.Prepared(str(path), split)
            made.read(range(len(made)), sized=True)
        list(verify.damages(str(path)))

    def prepare(path):
        here = dataclasses.replace(job, folder=str(path))
        here.check_plan(of_files)
        for unit in of_files:
            if here.result(unit, notes=False):
                here.verify(unit)

    def read(kind, name):
        return lambda path: list(text_files.Reader(kind, str(path / name)))

    def opened(kind, name):
        def call(path):
            made = vocabularies.open_file(path / name, kind)
            made.decode(made.spans('one two\n\tÜ 日本')[0])
            tokenizers.check_fits(made, 2**24, 'x')

        return call

    def read_records(path):
        return list(records.read([str(path / 'a.json')]))

    def chat_of(path):
        template = chat.open_template('chat', vocabularies.open_file(path / 'tokenizer.json'))
        template.tokens([{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}])

    return (
        _of_images()
        | _of_vits(folder)
        | {
            'a run': Reader('config.json', run, lambda path: config.read(path / 'config.json'), {}, json_values(60)),
            'jsonl': Reader('a.jsonl', lines, read('jsonl', 'a.jsonl'), {}, _lines),
            'records': Reader('a.json', RECORD, read_records, {}, json_values(60)),
            'chat template': Reader('chat_template.jinja', TEMPLATE, chat_of, {'tokenizer.json': tokenizer}),
            'text': Reader('a.txt', b'one\n\ntwo\n', read('text', 'a.txt')),
            'kind': Reader('a', lines, lambda path: text_files.kind(str(path / 'a'))),
            'gzip': Reader('a.gz', gzip.compress(lines * 999), read('jsonl', 'a.gz'), {}, _packed),
            'huggingface': Reader(
                'tokenizer.json', tokenizer, opened('huggingface', 'tokenizer.json'), {}, _tokenizers
            ),
            'settings': Reader(
                'tokenizer_config.json',
                b'{"eos_token": {"content": "</s>"}, "pad_token": "<pad>"}',
                opened('huggingface', 'tokenizer.json'),
                {'tokenizer.json': tokenizer},
                json_values(40),
            ),
            'sentencepiece': Reader('a.model', vocabularies.content('t5'), opened('sentencepiece', 'a.model')),
            'a saved tokenizer': Reader(
                'tokenizer/fingerprint.json',
                saved['tokenizer/fingerprint.json'],
                lambda path: tokenizers.load(path / 'tokenizer'),
                saved,
                json_values(40),
            ),
            'tokens.json': Reader('tokens.json', rows['tokens.json'], rows_of, rows, json_values(150)),
            'rows': Reader('train-00000-of-00002.bin', rows['train-00000-of-00002.bin'], rows_of, rows),
            'notes': Reader('train-00000-of-00002.rows', rows['train-00000-of-00002.rows'], rows_of, rows),
            'plan': Reader('.prepare/plan.json', rows['.prepare/plan.json'], prepare, rows, json_values(40)),
            'counts': Reader(
                '.prepare/both-00000.json', rows['.prepare/both-00000.json'], prepare, rows, json_values(60)
            ),
            'dataset_info': Reader('c4/en/3.1.0/dataset_info.json', info, dataset, of_dataset, json_values(60)),
            'features': Reader('c4/en/3.1.0/features.json', features, dataset, of_dataset, json_values(40)),
            'replay': Reader(
                'batch_5.npz',
                stored.getvalue(),
                lambda path: replay.read_batch(path / 'batch_5.npz', of_run),
                {},
                _archives,
            ),
            'hf config': Reader(
                'config.json', network, lambda path: hf_config.read(path / 'config.json'), {}, json_values(150)
            ),
            'safetensors': Reader('model.safetensors', tensor, tensors.read, {}, _tensor_files),
            'index': Reader(
                'model.safetensors.index.json', index, tensors.read, {'part.safetensors': tensor}, json_values(20)
            ),
            'recipe': Reader(
                'a.py', b'from mixln_jax import config\nget_config = config.default\n', _recipe, {}, _recipes
            ),
        }
    )


def _of_images():
    """Readers of images: an image in a folder, archives of them, arrays."""
    images, arrays = {f'set/{name}': body for name, body in pictures.set_of().items()}, io.BytesIO()
    np.savez(arrays, images=np.arange(300, dtype=np.uint8).reshape(10, 6, 5), labels=np.arange(10) % 3)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, body in images.items():
            archive.writestr(name, body)
    tars = pictures.tar_of(
        {'a.tar': pictures.tar_of({'1.jpg': pictures.plain('cat')}), 'b/2.jpg': pictures.plain('dog')}
    )
    labels = {'train-labels-idx1-ubyte': pictures.idx_of(np.arange(10, dtype=np.uint8) % 3)}
    pixels = pictures.idx_of(np.arange(300, dtype=np.uint8).reshape(10, 6, 5))

    def read(source, name):
        def call(path):
            keys = {'source': source, 'path': str(path / name), 'held_out': 0.0}
            made = examples.open_examples(config.Data(**keys), 'train', 8)
            made.batch(range(len(made)))

        return call

    jpeg, png = images.pop('set/cat/cat0.jpg'), pictures.encoded(pictures.pixels())
    return {
        'jpeg': Reader('set/cat/cat0.jpg', jpeg, read('images', 'set'), images),
        'png': Reader('set/cat/cat0.png', png, read('images', 'set'), images),
        'zip': Reader('set.zip', packed.getvalue(), read('images', 'set.zip')),
        'tar': Reader('set.tar', tars, read('images', 'set.tar')),
        'idx': Reader('train-images-idx3-ubyte', pixels, read('idx', ''), labels),
        'npz': Reader('set.npz', arrays.getvalue(), read('npz', 'set.npz')),
    }


def _contents(root, folder):
    """{name from `root` on: content} of all files in a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def _recipe(path):
    before = signal.signal(signal.SIGINT, lambda *_: None)  # as in a command: a KeyboardInterrupt is the recipe's own
    try:
        config.build(recipes.load(str(path / 'a.py')))
    finally:
        signal.signal(signal.SIGINT, before)


def _recipes(good):
    for raised in (
        'SystemExit(3)',
        'KeyboardInterrupt',
        'BaseException("own")',
        'GeneratorExit',
        'MemoryError',
        'StopIteration',
        'Own()',
    ):
        own = b'class Own(BaseException):\n    def __str__(self): raise KeyError\n'
        yield raised, own + b'raise %s\n' % raised.encode()
        yield f'{raised} inside', own + b'def get_config(): raise %s\n' % raised.encode()
    for made in ('None', '3', '{}', 'dict()', 'config', 'lambda: 0', 'config.default().model', '[].x', '1 / 0'):
        yield made, b'from mixln_jax import config\ndef get_config(): return %s\n' % made.encode()
    for key in ('seq_length', 'model', 'optim', 'data'):
        for odd in ('None', '[]', '10**30', '"x"', 'float("nan")', 'object()', 'b"x"'):
            line = f'def get_config():\n    c = config.default()\n    c.{key} = {odd}\n    return c\n'
            yield f'{key} = {odd}', b'from mixln_jax import config\n' + line.encode()


def _of_vits(folder):
    """Readers of the files of ViT folders: stock, with a modelling file, of timm."""
    found = {}
    for layout, norm_position in (('vit', 'pre'), ('mixln_vit', 'mix'), ('timm', 'pre')):
        network = hf_folders.network(
            norm_position, family='vit', hidden_size=8, intermediate_size=12, num_heads=2, image_size=8, patch_size=4,
            num_classes=3, pool='tok', positions='learned',
        )  # fmt: skip
        options = {'layout': 'timm'} if layout == 'timm' else {}
        hf_vit.save(folder / layout, *network, names=list('abc'), images=config.Images(), **options)
        files = _contents(folder / layout, folder / layout)
        call = lambda path: weights.load(path).class_names  # noqa: E731
        for name in sorted(name for name in files if name.endswith('.json')):
            found[f'{layout}/{name}'] = Reader(name, files[name], call, files, json_values(120))
    return found


def _network():
    """config.json of LLaMA, with all that it may have."""
    return {
        'model_type': 'llama',
        'vocab_size': 320,
        'hidden_size': 64,
        'intermediate_size': 128,
        'num_hidden_layers': 4,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'head_dim': 16,
        'rms_norm_eps': 1e-6,
        'rope_theta': 1e4,
        'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e4},
        'tie_word_embeddings': False,
        'attention_bias': False,
        'norm_position': ['pre', 'pre', 'post', 'pre'],
        'layer_index': [1, 2, 3, 4],
        'depth': 4,
        'norm_groups': 4,
    }


def _run():
    """config.json of a run."""
    content = config.default().to_dict()
    model = dict(content['model'], num_layers=2, norm_position=['pre', 'pre'], layer_index=[1, 2], depth=2)
    return content | {'model': model}

"""A small run that the parts of the campaign damage copies of."""

import contextlib
import functools
import hashlib
import json
import pathlib
import shutil
import tempfile

import corpora
import jax
import numpy as np
import vocabularies

from benchmarks.campaign import ROOT
from benchmarks.campaign.judging import command
from mixln_jax import config as configs
from mixln_jax import main, recipes
from mixln_jax.program.program import Program
from mixln_jax.runs import checkpoint
from mixln_jax.system import cli
from mixln_jax.training import run as training

QUICKSTART = str(ROOT / 'configs/quickstart.py')
LAST = 3  # steps of the small run


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def bits(tree):
    """A digest of all that is in a tree of arrays."""
    digest = hashlib.blake2b()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        value = np.asarray(
            jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        )
        digest.update(f'{jax.tree_util.keystr(path)} {value.dtype} {value.shape}'.encode() + value.tobytes())
    return digest.hexdigest()


def lines_of(workdir):
    read = map(json.loads, (workdir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines())
    return [{name: value for name, value in line.items() if not name.startswith('perf/')} for line in read]


class Base:
    """A small run of three steps, each saved, and what it should be; the parts damage copies of it."""

    def __init__(self, folder):
        self.folder = folder
        (folder / 'text').mkdir()
        text = corpora.write(folder / 'text/a.jsonl', corpora.texts(0, 400))
        (folder / 'tokenizer.json').write_bytes(vocabularies.byte_level())
        (folder / 'other.json').write_bytes(vocabularies.wordpiece())
        changes = {'source': 'jsonl', 'path': text, 'tokenizer': 'huggingface', 'mode': 'pad', 'workers': 0}
        small = {'hidden_size': 32, 'intermediate_size': 48, 'num_layers': 2, 'num_heads': 2, 'vocab_size': 1000}
        words = [f'data.{key}={value}' for key, value in changes.items()]
        words += [f'model.{key}={value}' for key, value in small.items()]
        words += ['seq_length=32', f'num_steps={LAST}', 'log_every=1', 'checkpoint.every=1', 'eval.tokens=400']
        self.words = [f'--config.{word}' for word in (*words, 'eval.every=0', 'analysis.tokens=0', 'device=cpu')]
        main.Program = functools.cache(Shared)
        self.run, self.other = folder / 'run', folder / 'other'
        self.train(self.run)
        self.train(self.other, 'other.json', 1)
        self.values = configs.build(self.config())
        self.like = Program(self.values, training._start_jax(self.values)).state
        self.states, self.about, self.params = {}, {}, {}
        with contextlib.closing(checkpoint.Checkpoints(self.run / 'checkpoints', read_only=True)) as kept:
            for step in range(1, LAST + 1):
                state, self.about[step] = kept.read(step, self.like)
                self.states[step], self.params[step] = bits(state), bits(state.params)

    def config(self, tokenizer='tokenizer.json', seed=0):
        words = [*self.words, f'--config.data.tokenizer_path={self.folder / tokenizer}', f'--config.seed={seed}']
        return recipes.load(QUICKSTART, recipes.overrides(words))

    def train(self, workdir, *args):
        """What a command says of a start in `workdir`."""
        return command(cli.call, main.run, self.config(*args), workdir)[0]

    @contextlib.contextmanager
    def copy(self):
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            yield pathlib.Path(shutil.copytree(self.run, pathlib.Path(folder, 'run'), symlinks=True))


class Shared(Program):
    """Runs of one configuration share what is compiled."""

    compile = functools.cache(Program.compile)

"""Opening weights: a run, one of its checkpoints, a Hugging Face folder, and what is none of them."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import mixln_jax
from mixln_jax import config as configs
from mixln_jax import evaluate, export, main, recipes
from mixln_jax.analysis import angular, subjects
from mixln_jax.data import inspect
from mixln_jax.models import bert
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.runs import checkpoint, checkpoint_folders, start_weights, weights
from mixln_jax.system.errors import CheckpointError, DataError, UsageError

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    keys = {
        'num_steps': 4, 'batch_size': 4, 'seq_length': 16, 'checkpoint.every': 2, 'eval.tokens': 50, 'eval.every': 0,
        'model.num_layers': 3, 'model.hidden_size': 16, 'model.num_heads': 2, 'model.intermediate_size': 24,
        'mesh.data': 1, 'model.norm_position': 'post,pre*2', 'analysis.tokens': 0,
    }  # fmt: skip
    main.run(recipes.load(f'{ROOT}/configs/quickstart.py', [(key, str(value)) for key, value in keys.items()]), folder)
    return folder


def test_a_run_is_its_newest_checkpoint(run):
    newest, last, before = (weights.load(run / path) for path in ('', 'checkpoints/4', 'checkpoints/2'))
    assert (newest.step, last.step, before.step) == (4, 4, 2)
    assert newest.where == str(run / 'checkpoints/4') and newest.config.num_steps == 4
    assert newest.model.norm_position == ('post', 'pre', 'pre') and newest.tokenizer.kind == 'bytes'
    same, other = (
        [bool(np.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, pair), strict=True)]
        for pair in ((newest.params, last.params), (newest.params, before.params))
    )
    assert all(same) and not all(other)
    logits, _ = newest.model.apply({'params': newest.params}, np.zeros((1, 5), np.int32))
    assert logits.shape == (1, 5, 259) and np.isfinite(logits).all()


def test_a_hugging_face_folder():
    found = weights.load(GOLDEN / 'mix', norm_position='mix')
    assert found.model.norm_position == ('post',) * 2 + ('pre',) * 6 and found.config is None


@pytest.mark.parametrize(
    'path, message',
    [('nowhere', 'nowhere is not a folder'), ('', 'neither a run of ours .* nor a Hugging Face folder')],
)
def test_nothing_there(tmp_path, path, message):
    with pytest.raises(UsageError, match=message):
        weights.load(tmp_path / path)


def test_no_checkpoint_yet(tmp_path):
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(UsageError, match='holds no checkpoint'):
        weights.load(tmp_path)


def test_a_run_knows_its_placement(run):
    with pytest.raises(UsageError, match='knows its placement'):
        weights.load(run, norm_position='pre')


def test_a_changed_config_is_damage(run, tmp_path):
    shutil.copytree(run, tmp_path / 'copy')
    about = tmp_path / 'copy/checkpoints/4/about/metadata'
    content = json.loads(about.read_text())
    content['config']['model']['norm_position'] = ['pre'] * 3
    about.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match='checkpoints/4: its JSON has changed'):
        weights.load(tmp_path / 'copy')
    assert weights.load(tmp_path / 'copy/checkpoints/2').step == 2  # and nothing is renamed
    assert (tmp_path / 'copy/checkpoints/4').is_dir()


class TestWhereACheckpointIs:
    """Folders of every kind, named and linked in every way: what is in a folder decides, not its name."""

    def write(self, folder):
        (folder / 'about').mkdir(parents=True)
        (folder / 'commit_success.txt').write_text('')

    @pytest.fixture
    def here(self, tmp_path, monkeypatch):
        """Two runs, one named by digits in a folder called checkpoints; a run inside another's checkpoints/; links."""
        for run in ('run', 'checkpoints/4711', 'run/checkpoints/77'):
            for step in (9, 20):
                self.write(tmp_path / f'{run}/checkpoints/{step}')
            (tmp_path / run / 'config.json').write_text('{}')
        for folder in ('run/checkpoints/30.corrupt', 'run/checkpoints/31.orbax-checkpoint-tmp', 'big/40'):
            self.write(tmp_path / folder)
        (tmp_path / 'run/checkpoints/10').mkdir()  # damaged: nothing in it
        for folder in ('checkpoints/500', 'both'):
            (tmp_path / folder / 'checkpoints' if folder == 'both' else tmp_path / folder).mkdir(parents=True)
            (tmp_path / folder / 'config.json').write_text('{"model_type": "llama"}')
            (tmp_path / folder / 'model.safetensors').write_text('')
        (tmp_path / 'away').mkdir()
        shutil.move(tmp_path / 'run', tmp_path / 'away/run')
        links = {
            'run': 'away/run', 'latest': 'run/checkpoints/20', 'newest': 'checkpoints/4711', 'again': 'latest',
            'run/checkpoints/best': '9', 'run/checkpoints/99': '20', 'run/checkpoints/40': '../../../big/40',
        }  # fmt: skip
        for link, to in links.items():
            (tmp_path / link).symlink_to(to)
        (tmp_path / 'third').mkdir()
        (tmp_path / 'disk/one').mkdir(parents=True)
        shutil.copytree(tmp_path / 'away/run/checkpoints', tmp_path / 'disk/one/ck', symlinks=True)
        (tmp_path / 'third/checkpoints').symlink_to('../disk/one/ck')  # on a larger disk, say
        (tmp_path / 'of_third').symlink_to('third/checkpoints/20')
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        'path, expected',
        [
            ('run', 'run/checkpoints/40'),
            ('run/', 'run/checkpoints/40'),
            ('./run//checkpoints/9/', 'run/checkpoints/9'),
            ('away/../run', 'run/checkpoints/40'),
            ('run/checkpoints/10', 'run/checkpoints/10'),
            ('checkpoints/4711', 'checkpoints/4711/checkpoints/20'),
            ('checkpoints/4711/checkpoints/9', 'checkpoints/4711/checkpoints/9'),
            ('newest', 'newest/checkpoints/20'),
            ('newest/checkpoints/9', 'newest/checkpoints/9'),
            ('latest', 'away/run/checkpoints/20'),
            ('again/', 'away/run/checkpoints/20'),
            ('latest/../9', 'away/run/checkpoints/9'),
            ('run/checkpoints/best', 'away/run/checkpoints/9'),
            ('run/checkpoints/99', 'away/run/checkpoints/20'),
            ('run/checkpoints/40', 'run/checkpoints/40'),
            ('run/checkpoints/77', 'run/checkpoints/77/checkpoints/20'),
            ('third', 'third/checkpoints/40'),
            ('third/checkpoints/9', 'third/checkpoints/9'),
            ('of_third', 'third/checkpoints/20'),
            ('checkpoints/500', None),
            ('both', None),
        ],
    )
    def test_of_a_path(self, here, path, expected):
        found = weights.checkpoint_folder(path)
        assert (found and found.resolve()) == (expected and (here / expected).resolve())
        if found:  # and it says of which run
            assert (found.parent.name, found.parents[1].resolve().name) == (
                'checkpoints',
                pathlib.Path(expected).parents[1].resolve().name,
            )

    @pytest.mark.parametrize('inside, path', [('run/checkpoints', '9'), ('run/checkpoints/9', '.'), ('run', '.')])
    def test_from_inside(self, here, monkeypatch, inside, path):
        monkeypatch.chdir(inside)
        found = weights.checkpoint_folder(path)
        assert found.resolve() == here / ('big/40' if inside == 'run' else 'away/run/checkpoints/9')
        assert found.parents[1].resolve() == here / 'away/run'

    @pytest.mark.parametrize(
        'path, message',
        [
            ('run/checkpoints/30.corrupt', 'is a checkpoint outside of its run: <run>/checkpoints/<step> is needed'),
            ('moved', 'moved is a checkpoint outside of its run'),
            ('dangling', 'dangling is not a folder'),
            ('empty', 'empty/checkpoints holds no checkpoint'),
        ],
    )
    def test_of_none(self, here, path, message):
        shutil.copytree('run/checkpoints/9', 'moved')
        (here / 'dangling').symlink_to('nowhere')
        (here / 'empty/checkpoints').mkdir(parents=True)
        with pytest.raises(UsageError, match=message):
            weights.checkpoint_folder(path)

    def test_steps_are_those_of_the_run(self, here):
        assert checkpoint_folders.steps(here / 'run/checkpoints') == [9, 20, 40]
        assert checkpoint_folders.steps(here / 'checkpoints') == []

    @pytest.mark.parametrize('inside, name', [('run', '77'), ('run', '40'), ('.', '4711'), ('.', '500')])
    def test_who_trains_among_them_loses_none(self, here, inside, name):
        """A run, a link or a folder of Hugging Face would be removed as an old checkpoint."""
        folder = here / inside / 'checkpoints'
        for path in list(folder.iterdir()):
            if path.name.isdecimal() and path.name != name:
                path.unlink() if path.is_symlink() else shutil.rmtree(path)
        before = sorted(folder.rglob('*'))
        with pytest.raises(UsageError, match=f'checkpoints/{name} is not a checkpoint of this run: move it'):
            checkpoint.Checkpoints(folder)
        assert sorted(folder.rglob('*')) == before

    def test_what_is_measured_is_measured_once_and_named_after_its_run(self, here):
        found = subjects.places(['run/checkpoints/20', 'latest', 'checkpoints/4711', 'newest', 'run/checkpoints/9'])
        assert [place.label for place in found] == ['run step 20', '4711', 'run step 9']
        assert [place.run.resolve() for place in found] == [
            here / name for name in ('away/run', 'checkpoints/4711', 'away/run')
        ]
        assert [place.label for place in subjects.places(['newest'], 'all')] == ['4711 step 9', '4711 step 20']


def test_a_run_named_by_digits_and_a_link(run, tmp_path, monkeypatch, capsys):
    shutil.copytree(run, tmp_path / 'checkpoints/4711')
    monkeypatch.chdir(tmp_path)
    os.symlink('checkpoints/4711/checkpoints/2', 'latest')
    assert (weights.load('checkpoints/4711').step, weights.load('latest').step) == (4, 2)
    assert weights.load('latest').tokenizer.kind == 'bytes'
    for path in ('checkpoints/4711', 'latest'):
        assert evaluate.main(['--checkpoint', path]) == 0
    before, after = (line for line in capsys.readouterr().out.splitlines() if 'perplexity' in line)
    assert before != after
    values = json.loads((run / 'config.json').read_text())
    values = configs.from_resolved(values | {'resume_from': 'latest'})
    main.run(dataclasses.asdict(values), 'next')
    for one, other in zip(*(jax.tree.leaves(weights.load(at).params) for at in (run, 'next')), strict=True):
        np.testing.assert_array_equal(one, other)
    model = weights.load(run).model
    jax.tree.map(np.testing.assert_array_equal, start_weights.initial('latest', model), weights.load('latest').params)
    with pytest.raises(UsageError, match='is a run or a checkpoint of ours'):
        start_weights.initial('hf:latest', model)


class TestOneNameForPeople:
    def test_a_run_a_checkpoint_and_folders_of_hugging_face(self, run, tmp_path):
        found = mixln_jax.load(str(run))
        assert (found.step, found.config.num_steps) == (4, 4)
        assert found.tokenizer.decode(found.tokenizer.encode('a b')) == 'a b'
        logits, out = found.model.apply({'params': found.params}, np.zeros((1, 5), np.int32), capture=True)
        assert logits.shape == (1, 5, 259) and out['hidden'].shape == (4, 1, 5, 16)
        assert mixln_jax.load(run / 'checkpoints/2').step == 2
        hf_llama.save(tmp_path / 'out', found.model, found.params)
        again = mixln_jax.load(tmp_path / 'out', compute_dtype='bfloat16')
        assert (again.step, again.config, again.model.compute_dtype) == (None, None, 'bfloat16')
        jax.tree.map(np.testing.assert_array_equal, again.params, found.params)
        assert mixln_jax.load(GOLDEN / 'mix', norm_position='mix').model.norm_position[:3] == ('post', 'post', 'pre')
        assert isinstance(mixln_jax.load(GOLDEN / 'squad').model, bert.Bert)
        with pytest.raises(UsageError, match='BERT, which has Post-LN'):
            mixln_jax.load(GOLDEN / 'squad', norm_position='post')

    def test_importing_it_is_cheap(self):
        line = 'import sys, mixln_jax; assert mixln_jax.load.__doc__ and not {"jax", "numpy"} & {*sys.modules}'
        subprocess.run([sys.executable, '-c', line], cwd=ROOT, check=True)

    def test_who_opens_a_run_as_a_hugging_face_folder_hears_of_it(self, run):
        for path in (run, run / 'checkpoints/4'):
            with pytest.raises(UsageError, match=f'{path} is a run or .* of ours, which mixln_jax.load opens'):
                hf_llama.load(path)


class TestAnotherTokenizer:
    """Of the same size, in tokenizer/: its text, bytes and words would be wrong without a word."""

    @pytest.fixture
    def swapped(self, run, tmp_path, opened):
        """Folders of a run and of its export, whose tokenizer is another one, whole."""
        export.export(run, tmp_path / 'export')
        shutil.copytree(run, tmp_path / 'run')
        for folder in ('run', 'export'):
            shutil.rmtree(tmp_path / folder / 'tokenizer')
            opened('llama').save(tmp_path / folder / 'tokenizer')
        return tmp_path

    @pytest.mark.parametrize('folder', ['run', 'run/checkpoints/4', 'export'])
    def test_is_named_by_every_reader(self, swapped, folder):
        with pytest.raises(DataError, match='tokenizer is not the tokenizer that the weights were trained with'):
            weights.load(swapped / folder)

    def test_commands(self, swapped, capsys):
        run = str(swapped / 'run')
        inspects = inspect.main(['--workdir', run, '--step', '1'])
        assert [inspects, evaluate.main(['--checkpoint', run]), angular.main(['--checkpoint', run])] == [4, 4, 4]
        assert all('tokenizer' in line for line in capsys.readouterr().err.splitlines())

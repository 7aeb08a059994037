"""Opening weights: a run, one of its checkpoints, a Hugging Face folder, and what is none of them."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import main, weights
from mixln_jax.exits import CheckpointError, UsageError

GOLDEN = pathlib.Path(__file__).parent / 'golden'
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    keys = {
        'num_steps': 4, 'batch_size': 4, 'seq_length': 16, 'checkpoint.every': 2, 'eval.tokens': 50, 'eval.every': 0,
        'model.num_layers': 3, 'model.hidden_size': 16, 'model.num_heads': 2, 'model.intermediate_size': 24,
        'mesh.data': 1, 'model.norm_position': 'post,pre*2', 'analysis.tokens': 0,
    }  # fmt: skip
    main.run(configs.load(f'{ROOT}/configs/quickstart.py', [(key, str(value)) for key, value in keys.items()]), folder)
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

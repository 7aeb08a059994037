"""Runs that train a part of a network: what they write, that they go on exactly, and that tools read their folder."""

import functools
import shutil

import jax
import numpy as np
import pytest
from corpora import write
from short_runs import SIZES, WORDS, StopAtTwo, lines_of, recipe

from mixln_jax import config as configs
from mixln_jax import main, trees
from mixln_jax.evaluation import loop as evaluation
from mixln_jax.models import families
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.program import lora
from mixln_jax.runs import checkpoint, weights
from mixln_jax.system.errors import CheckpointError, Stopped

METHODS = {
    'lora': {
        'tune.method': 'lora', 'tune.rank': 2, 'tune.dropout': 0.2, 'optim.name': 'adamw', 'optim.weight_decay': 0.1,
    },
    'lora and head': {
        'tune.method': 'lora', 'tune.rank': 3, 'tune.matrices': 'q,mlp/down', 'tune.train': 'head/*, norm/scale',
        'tune.base_dtype': 'bfloat16', 'optim.ema': 0.5,
    },
    'lisa': {'tune.method': 'lisa', 'tune.layers': 1, 'tune.interval': 1},
    'probe': {'tune.train': 'head/kernel'},
}  # fmt: skip


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp('data') / 'train.json.gz'
    return write(path, [' '.join(rng.choice(WORDS, rng.integers(2, 12))) for _ in range(120)])


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """An exported Mix-LN network."""
    path = tmp_path_factory.mktemp('exported') / 'base'
    model = families.from_config(configs.Model(norm_position='mix', **SIZES))
    hf_llama.save(path, model, jax.jit(model.init)(jax.random.key(77))['params'])
    return path


@pytest.fixture(scope='module')
def finished(corpus, base, tmp_path_factory):
    """Returns the finished run of a method, by its name; their base is gone."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp('runs')
        own = shutil.copytree(base, folder / 'base')
        main.run(changed(corpus, own, **METHODS[name]), folder / 'run')
        shutil.rmtree(own)
        return folder / 'run'

    return made


def changed(corpus, base, **changes):
    return recipe(
        corpus, **{'init_from': f'hf:{base}', 'optim.warmup_ratio': 0.0, 'optim.learning_rate': 0.01} | changes
    )


def equal(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def bits(workdir):
    """Returns types, shapes and checksums of the last state, by leaf."""
    return checkpoint.read_about(workdir / 'checkpoints/4')['leaves']


@pytest.mark.parametrize('name', METHODS)
def test_goes_on_exactly(name, corpus, base, finished, tmp_path, monkeypatch):
    values = changed(corpus, base, **METHODS[name])
    with pytest.raises(Stopped):
        main.run(values, tmp_path / 'run', stop=StopAtTwo())
    values.init_from = 'hf:/elsewhere'  # the frozen weights are those of the run, whatever it says
    main.run(values, tmp_path / 'run')
    whole = finished(name)
    assert lines_of(tmp_path / 'run') == lines_of(whole)
    assert bits(tmp_path / 'run') == bits(whole)


@pytest.mark.parametrize('name', METHODS)
def test_only_what_is_trained_moves_and_is_saved(name, base, finished):
    before = dict(trees.named_leaves(hf_llama.read(base)[1]))
    params = dict(trees.named_leaves(checkpoint.read_params(finished(name) / 'checkpoints/4', average=False)[0]))
    moved = {leaf for leaf in params if leaf in before and not np.array_equal(params[leaf], before[leaf])}
    if name == 'lisa':
        assert {*params} == {*before} and {'head/kernel', 'norm/scale', 'embed/embedding'} <= moved
    elif name == 'probe':
        assert {*params} == moved == {'head/kernel'}
    else:
        assert moved == ({'head/kernel', 'norm/scale'} if 'head' in name else set())
        assert all(lora.is_adapter(leaf) for leaf in {*params} - moved)
        assert all(np.abs(values).max() > 0 for leaf, values in params.items() if leaf.endswith('lora_b'))
    after = dict(trees.named_leaves(weights.load(finished(name)).params))
    if name == 'lora':  # norms and the like are the base's, matrices have moved
        assert {leaf for leaf in before if not np.array_equal(after[leaf], before[leaf])} == {
            leaf for leaf in before if leaf.startswith('layers/') and leaf.endswith('kernel')
        }


@pytest.mark.parametrize('name', METHODS)
def test_the_folder_alone_gives_the_evaluation_again(name, finished):
    found = weights.load(finished(name))
    values = evaluation.evaluate_run(found)
    assert values['eval/loss'] == pytest.approx(lines_of(finished(name))[-1]['eval/loss'], rel=2e-6)


def test_goes_on_in_another_folder(corpus, finished, tmp_path):
    whole = finished('lora')
    values = recipe(corpus, **METHODS['lora'], resume_from=str(whole / 'checkpoints/2'))
    values.update_from_flattened_dict({'optim.warmup_ratio': 0.0, 'optim.learning_rate': 0.01})
    main.run(values, tmp_path / 'other')
    assert bits(tmp_path / 'other') == bits(whole)
    assert equal(weights.load(tmp_path / 'other').params, weights.load(whole).params)


class TestFrozenWeights:
    @pytest.fixture
    def run(self, finished, tmp_path):
        return shutil.copytree(finished('lora'), tmp_path / 'run')

    def check(self, run, message, corpus):
        with pytest.raises(CheckpointError, match=message):
            weights.load(run)
        shutil.rmtree(run / 'checkpoints/4')
        with pytest.raises(CheckpointError, match=message):
            main.run(changed(corpus, '/elsewhere', **METHODS['lora']), run)

    def test_missing(self, run, corpus):
        shutil.rmtree(run / 'frozen')
        self.check(run, 'frozen is missing', corpus)

    def test_of_another_run(self, run, corpus, finished):
        shutil.rmtree(run / 'frozen')
        shutil.copytree(finished('lora and head') / 'frozen', run / 'frozen')
        self.check(run, 'frozen holds other weights', corpus)

    def test_damaged(self, run, corpus):
        path = max((run / 'frozen/0/state').rglob('d/*'), key=lambda path: path.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        self.check(run, 'frozen/0', corpus)


@pytest.mark.parametrize('name, trained', [('lisa', 1), ('probe', 0), ('lora', 3)])
def test_layers_that_do_not_train_have_no_gradient_norm(name, trained, finished):
    lines = [line for line in lines_of(finished(name)) if line['step']]
    assert all(sum(norm is not None for norm in line['layers/grad_norm']) == trained for line in lines)


def test_a_finished_run_names_another_start(corpus, base, finished, tmp_path, capsys):
    run = shutil.copytree(finished('probe'), tmp_path / 'run')
    main.run(changed(corpus, '/elsewhere', **METHODS['probe']), run)
    assert 'warning: it started with config.init_from=hf:' in (said := capsys.readouterr()).err
    assert 'not with hf:/elsewhere' in said.err and 'already finished' in said.out

"""Factors of the learning rate, by names of weights and by placements of layers."""

import functools

import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.data.batches import marks
from mixln_jax.distributed import mesh as meshes
from mixln_jax.program.program import Program
from mixln_jax.system.errors import UsageError

SMALL = {
    'batch_size': 8, 'seq_length': 6, 'compute_dtype': 'float32', 'device': 'cpu', 'model.vocab_size': 11,
    'model.hidden_size': 8, 'model.intermediate_size': 12, 'model.num_layers': 3, 'model.num_heads': 2,
    'model.norm_position': 'post,post,pre', 'model.scan_unroll': '1', 'optim.name': 'adamw',
    'optim.weight_decay': 0.3, 'optim.learning_rate': 0.01, 'optim.warmup_ratio': 0.0,
}  # fmt: skip


def program(**changes):
    values = configs.default()
    values.update_from_flattened_dict(SMALL | changes)
    return Program(configs.build(values), meshes.make_mesh(configs.Mesh(1, 1, 1), jax.devices('cpu')[:1]))


@functools.cache
def moved(text):
    """What one update adds to each weight, in float64."""
    ours, rng = program(**{'optim.rate_factors': text}), np.random.default_rng(0)
    before = jax.device_get(ours.init(jax.random.key(0)).params)
    ids = rng.integers(0, 11, (8, 7)).astype(np.int32)
    batch = {'inputs': ids[:, :-1], 'targets': ids[:, 1:], 'loss_mask': np.ones((8, 6), np.float32)}
    after, _ = ours.train_step(ours.init(jax.random.key(0)), batch | marks(np.arange(8), np.ones(8, bool)))
    pairs = zip(trees.named_leaves(before), jax.tree.leaves(jax.device_get(after.params)), strict=True)
    return {name: new.astype(np.float64) - old for (name, old), new in pairs}


def factor(name):
    """Of post=0.25,layers/*/attention/q/kernel=0.5,*norm/scale=2: the last match counts."""
    if name.endswith('norm/scale') and not name.startswith('layers'):
        return 2.0
    if name.startswith('layers') and name.endswith('attention/q/kernel'):
        return 0.5
    return 0.25 if name.startswith('layers/segment_0/') else 1.0


def test_every_weight_moves_by_its_factor():
    """Weight decay too."""
    plain, scaled = moved(''), moved('post=0.25, layers/*/attention/q/kernel=0.5,norm/scale=2')
    assert {factor(name) for name in plain} == {0.25, 0.5, 1.0, 2.0}
    for name, step in plain.items():
        np.testing.assert_allclose(scaled[name], factor(name) * step, rtol=0, atol=2e-7, err_msg=name)
        assert np.abs(step).max() > 1e-3, name


def test_placements_match_as_names_do():
    ours = program(**{'optim.rate_factors': 'p*t=0.1', 'model.norm_position': 'post,sandwich,pre'})
    assert ours is not None  # post, though no weight has such a name


@pytest.mark.parametrize(
    'text, words',
    [
        ('post', r"config.optim.rate_factors: 'post' is not PATTERN=FACTOR above 0"),
        ('post=', "'post=' is not PATTERN"),
        ('=2', "'=2' is not PATTERN"),
        ('post=zero', 'is not PATTERN'),
        ('post=0', 'is not PATTERN.*config.tune.train'),
        ('post=-1', 'is not PATTERN'),
        ('post=nan', 'is not PATTERN'),
        ('post=inf', 'is not PATTERN'),
        ('post=1,post=2', "'post=2' is not PATTERN=FACTOR above 0, each pattern once"),
        ('post=1, ', 'is not PATTERN'),
        ('pots=1', "'pots' matches no trained weight and no placement.*post, pre, did you mean post"),
        ('layers/*/atention/*=1', 'matches no trained weight'),
    ],
)
def test_wrong_ones_are_named(text, words):
    with pytest.raises(UsageError, match=words) as error:
        program(**{'optim.rate_factors': text})
    assert len(str(error.value).splitlines()) == 1


def test_what_is_not_trained_matches_nothing():
    with pytest.raises(UsageError, match="'post' matches no trained weight"):
        program(**{'optim.rate_factors': 'post=2', 'tune.train': 'head/*'})

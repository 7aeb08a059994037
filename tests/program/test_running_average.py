"""The running average of the weights (`optim.ema`): its values, and that evaluation and exports use it."""

import contextlib
import functools
import json

import corpora
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import main
from mixln_jax.evaluation import loop as evaluation
from mixln_jax.models import families
from mixln_jax.program import optim, step
from mixln_jax.runs import checkpoint, weights
from mixln_jax.system.errors import Stopped
from mixln_jax.tasks.language import Language

SIZES = dict(vocab_size=259, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2)


def leaves(tree):
    return [np.float64(leaf) for leaf in jax.tree.leaves(tree)]


def test_values():
    """a <- 0.9 a + 0.1 w, from the initial weights on; a bad step changes nothing."""
    model = families.from_config(configs.Model(norm_position='pre', **SIZES), 'float32')
    task, optimizer = Language(model), optim.optimizer(configs.Optim())
    state = step.init_state(task, optimizer, jax.random.key(0), ema=0.9)
    update = jax.jit(
        functools.partial(step.train_step, task=task, optimizer=optimizer, schedule=lambda _: 0.1, ema=0.9)
    )
    ids = np.arange(24, dtype=np.int32).reshape(4, 6)
    batch = {'inputs': ids, 'targets': ids + 1, 'loss_mask': np.ones((4, 6), np.float32)}
    batch['place'] = np.arange(4, dtype=np.uint32)
    average = leaves(state.params)
    for _ in range(3):
        state, _ = update(state, batch)
        average = [0.9 * a + 0.1 * w for a, w in zip(average, leaves(state.params), strict=True)]
    for found, expected, weight in zip(leaves(state.ema), average, leaves(state.params), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert np.abs(found - weight).max() > 1e-3
    bad, _ = update(state, batch | {'loss_mask': batch['loss_mask'] * np.nan})
    jax.tree.map(np.testing.assert_array_equal, bad.ema, state.ema)
    assert bad.bad_step == 4
    half = state.with_network(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params))
    assert {leaf.dtype for leaf in jax.tree.leaves(half.ema)} == {jnp.dtype('float32')}
    for anew, weight in zip(leaves(half.ema), leaves(half.params), strict=True):
        np.testing.assert_array_equal(anew, weight)  # from given weights the average starts again


def recipe(corpus, ema):
    config = configs.default()
    config.update(batch_size=8, seq_length=16, num_steps=4, log_every=1, compute_dtype='float32')
    config.model.update(norm_position='mix', **SIZES)
    config.data.update(source='jsonl', path=str(corpus), tokenizer='bytes')
    config.optim.update(learning_rate=3e-2, ema=ema)
    config.eval.update(every=2, tokens=200)
    config.analysis.tokens = 0
    return config


class StopAtThree(main.stop.__class__):
    """A signal that comes in step 3."""

    def reached(self, step):
        self.requested = 'SIGTERM' if step == 3 else None
        return step == 3


def lines_of(workdir):
    lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith('perf/')} for line in lines]


@pytest.mark.parametrize(
    'mesh', [{}, pytest.param({'fsdp': 2, 'tensor': 2}, marks=pytest.mark.slow)], ids=['one', 'fsdp and tensor']
)
def test_a_run(tmp_path, mesh):
    corpora.write(tmp_path / 'text.jsonl', [f'text number {n} of several' for n in range(90)])
    for name, ema in (('plain', 0.0), ('averaged', 0.5)):
        config = recipe(tmp_path / 'text.jsonl', ema)
        config.mesh.update(**({'data': 1} | mesh))
        if name == 'averaged':
            with pytest.raises(Stopped):
                main.run(config, tmp_path / name, StopAtThree())
        main.run(config, tmp_path / name)
    plain, averaged = (lines_of(tmp_path / name) for name in ('plain', 'averaged'))
    losses = [[line['train/loss'] for line in lines] for lines in (plain, averaged)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # the average takes no part in training
    assert averaged[-1]['eval/loss'] != plain[-1]['eval/loss']
    config.init_from, config.num_steps = str(tmp_path / 'plain'), 1  # from where the average starts again
    main.run(config, tmp_path / 'again')
    assert len(lines_of(tmp_path / 'again')) == 1
    found = weights.load(tmp_path / 'averaged')
    values = evaluation.evaluate_run(found)
    assert values['eval/loss'] == pytest.approx(averaged[-1]['eval/loss'], rel=1e-6)
    own, _ = checkpoint.read_params(tmp_path / 'averaged/checkpoints/4', average=False)
    other = weights.load(tmp_path / 'plain').params
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), own, other)


def test_states_without_an_average_have_the_structure_of_earlier_ones(tmp_path):
    """A field that is None is no part of a checkpoint, so those from before the field existed are read."""
    state = step.State(jnp.int32(1), {'layers': jnp.ones(2)}, {'mu': jnp.ones(2)}, jnp.int32(0))
    with contextlib.closing(checkpoint.Checkpoints(tmp_path)) as kept:
        kept.save(1, state, {})
        kept.wait()
        restored, _ = kept.restore(jax.eval_shape(lambda: state))
    assert isinstance(restored, step.State) and restored.ema is None and restored.frozen is None
    metadata = json.loads((tmp_path / '1/state/_METADATA').read_text())
    assert {name.split("'")[1] for name in metadata['tree_metadata']} == {'step', 'params', 'opt_state', 'bad_step'}

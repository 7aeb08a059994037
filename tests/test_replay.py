"""The replay of a bad step: rows and layers by their numbers, against the float64 reference, and bad folders."""

import contextlib
import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import SIZES, branches, make, text, to_jax

from mixln_jax import config as configs
from mixln_jax import replay
from mixln_jax.program import step
from mixln_jax.runs import checkpoint

NAMES = ('pre', 'post', 'pre')
HEADS = {'heads': 4, 'kv_heads': 2}


@pytest.fixture
def weights():
    return reference.init(np.random.default_rng(0), NAMES, **SIZES)


@pytest.fixture
def batch():
    """Eight rows of different losses; row 7 is shorter."""
    return text(np.random.default_rng(10), B=8)


@pytest.fixture
def replayed(tmp_path, capsys):
    """What the command says of a network before step 5, two micro-batches, and that step's batch."""

    def of(weights, batch):
        model = make(','.join(NAMES))
        config = configs.Config(batch_size=8, seq_length=5, accumulate=2, model=model.config)
        resolved = dataclasses.asdict(config)
        resolved['model'] |= {'norm_position': list(NAMES), 'layer_index': [1, 2, 3], 'depth': 3}
        state = step.State(jnp.int32(4), to_jax(model, weights), {}, jnp.int32(0))
        with contextlib.closing(checkpoint.Checkpoints(tmp_path / 'debug/checkpoints', keep=1)) as kept:
            kept.save(4, state, {'config': resolved})
        np.savez(tmp_path / 'debug/batch_5.npz', **batch)
        assert replay.main(['--workdir', str(tmp_path)]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith('weights of step 4, float32, 3 layers\n\nbatch 5: ')
        return shown

    return of


def losses(weights, batch):
    """Of every row alone."""
    rows = [[batch[name][row : row + 1] for name in ('inputs', 'targets', 'loss_mask')] for row in range(8)]
    return np.array([reference.loss(weights, *row, NAMES, **HEADS) for row in rows])


def table(shown):
    """[layer, (attention adds, MLP adds, stream, gradient)]."""
    rows = [line.split() for line in shown.splitlines() if re.match(r' +\d  (pre|post) ', line)]
    assert [row[:2] for row in rows] == [[str(number), name] for number, name in enumerate(NAMES, 1)]
    return np.array([[float(number) for number in row[2:]] for row in rows])


def test_a_step_that_was_good(weights, batch, replayed, monkeypatch):
    shown, expected = replayed(weights, batch), losses(weights, batch)
    assert 'batch 5: all finite\n' in shown and 'not finite' not in shown
    [(highest, row, mean)] = re.findall(r'highest loss of a row ([\d.]+) \(row (\d)\), mean ([\d.]+)', shown)
    assert int(row) == expected.argmax() not in (0, 7)
    np.testing.assert_allclose([float(highest), float(mean)], [expected.max(), expected.mean()], atol=1e-4)
    # Micro-batches are rows 0, 2, 4, 6 and 1, 3, 5, 7; of each number the larger one is told, which is in either.
    norms = []
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        micro = [batch[name][rows] for name in ('inputs', 'targets', 'loss_mask')]
        grads = reference.gradients(weights, *micro, NAMES, **HEADS)['layers']
        norms.append([np.sqrt(sum(np.square(leaf).sum() for leaf in layer.values())) for layer in grads])
    hidden, added = branches(monkeypatch, weights, batch['inputs'], NAMES)
    of_rows = np.array([np.linalg.norm(values, axis=-1).max(axis=-1) for values in (*added, *hidden[1:])])
    largest, micro = of_rows.max(axis=-1), of_rows.argmax(axis=-1) % 2
    wanted = np.column_stack([largest[0:6:2], largest[1:6:2], largest[6:], np.max(norms, axis=0)])
    np.testing.assert_allclose(table(shown), wanted, rtol=2e-5)
    for of in (micro[0:6:2], micro[1:6:2], micro[6:], np.argmax(norms, axis=0)):
        assert {*of} == {0, 1}


@pytest.mark.parametrize('rows', [[5], [2, 7]])
def test_poisoned_rows_are_named(weights, batch, replayed, rows):
    poisoned = batch | {'loss_mask': batch['loss_mask'].copy()}
    poisoned['loss_mask'][rows, 1] = np.nan
    shown, expected = replayed(weights, poisoned), losses(weights, batch)
    assert f'batch 5: loss not finite in rows {", ".join(map(str, rows))}\n' in shown
    expected[rows] = -np.inf
    assert f'highest loss of a row {expected.max():.4f} (row {expected.argmax()})' in shown
    found = table(shown)
    assert np.isfinite(found[:, :3]).all() and np.isnan(found[:, 3]).all()
    assert 'the first number' not in shown  # every stream is finite, the loss alone is not


@pytest.mark.parametrize(
    'layer, tensors, column, named',
    [(3, 'vo', 0, 'attention of layer 3'), (2, ['down'], 1, 'MLP of layer 2'), (1, ['embed'], 2, 'stream .* layer 1')],
)
def test_a_poisoned_layer_is_named(weights, batch, replayed, layer, tensors, column, named):
    """The first number that is too large for float32, and nothing before it."""
    for name in tensors:
        owner = weights if name in weights else weights['layers'][layer - 1]
        owner[name] = owner[name] * 1e25
    shown = replayed(weights, batch)
    [said] = re.findall('the first number that is not finite: (.*)\n', shown)
    assert re.fullmatch(named, said)
    bad = ~np.isfinite(table(shown)[:, :3])
    assert not bad[: layer - 1].any() and bad[layer - 1].tolist()[: column + 1] == [False] * column + [True]


def test_bad_folders(weights, batch, replayed, tmp_path, capsys):
    replayed(weights, batch)
    (tmp_path / 'debug/batch_5.npz').write_bytes(b'nothing')
    assert replay.main(['--workdir', str(tmp_path)]) == 5
    assert 'batch_5.npz: not a batch: ' in capsys.readouterr().err
    (tmp_path / 'debug/report.json').write_text('{"step": 6}')
    assert replay.main(['--workdir', str(tmp_path)]) == 5
    assert 'batch_6.npz is missing: the batch of the step' in capsys.readouterr().err
    (tmp_path / 'debug/batch_5.npz').unlink()
    assert replay.main(['--workdir', str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f'{tmp_path}/debug holds no batches and weights of a bad step' in error and error.count('\n') == 1

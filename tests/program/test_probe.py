"""What a forward pass hides: attention logits and log Z against the float64 reference, on meshes, and of every task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from builders import batch_of, to_jax

from mixln_jax import config as configs
from mixln_jax.data.batches import marks
from mixln_jax.distributed import mesh as meshes
from mixln_jax.program.program import Program
from mixln_jax.tasks import build

SIZES = {'V': 11, 'D': 8, 'H': 4, 'K': 2, 'F': 12}
NAMES = ['post', 'post', 'pre']
SMALL = {
    'batch_size': 8, 'seq_length': 6, 'compute_dtype': 'float32', 'device': 'cpu', 'stability.rows': 8,
    'model.vocab_size': 11, 'model.hidden_size': 8, 'model.intermediate_size': 12, 'model.num_layers': 3,
    'model.num_heads': 4, 'model.num_kv_heads': 2, 'model.norm_position': ','.join(NAMES), 'model.scan_unroll': '1',
}  # fmt: skip
BATCH = batch_of(np.random.default_rng(0)) | marks(np.arange(8), np.ones(8, bool))
# In two documents, which do not read each other.
BATCH |= {
    'segment_ids': np.repeat([[0] * 4 + [1] * 2], 8, 0).astype(np.int32),
    'positions': np.repeat([[0, 1, 2, 3, 0, 1]], 8, 0).astype(np.int32),
}


def program(mesh=(1, 1, 1), **changes):
    values = configs.default()
    values.update_from_flattened_dict(SMALL | changes)
    devices = jax.devices('cpu')[: int(np.prod(mesh))]
    return Program(configs.build(values), meshes.make_mesh(configs.Mesh(*mesh), devices))


@functools.cache
def weights():
    drawn = reference.init(np.random.default_rng(7), NAMES, **SIZES)  # the largest logits are not of seen keys alone
    for layer in drawn['layers']:
        layer['q'] = 5 * layer['q']  # logits that differ
    return drawn


def probed(ours):
    batch = meshes.to_devices(BATCH, meshes.batch_sharding(ours.mesh))
    params = jax.device_put(to_jax(ours.model, weights()), jax.tree.map(lambda leaf: leaf.sharding, ours.state.params))
    return jax.device_get(ours.probe(params, batch, jnp.int32(3)))


@functools.cache
def expected(rows):
    """(largest absolute logit of each layer, mean of log Z over real tokens) of the first of every 8 / rows rows."""
    found, part = [], {name: values[:: 8 // rows] for name, values in BATCH.items()}
    how = dict(positions=part['positions'], segments=part['segment_ids'])
    hidden, logits = reference.forward(weights(), part['inputs'], NAMES, heads=4, kv_heads=2, **how)
    seen = (part['segment_ids'][:, :, None] == part['segment_ids'][:, None]) & np.tri(6, dtype=bool)
    for name, x, w in zip(NAMES, hidden, weights()['layers'], strict=False):
        x = reference.rms_norm(x, w['attention_in'], 1e-6) if name == 'pre' else x
        q, k = ((x @ w[one]).reshape(rows, 6, -1, 2) for one in 'qk')
        q, k = (reference.rotary(one, 10_000.0, part['positions']) for one in (q, k))
        scores = np.einsum('bthd,bshd->bhts', q, np.repeat(k, 2, 2)) / np.sqrt(2)
        found.append(np.abs(np.where(seen[:, None], scores, 0)).max())
    log_z = np.log(np.exp(logits).sum(-1))
    return np.array(found), (log_z * part['loss_mask']).sum() / part['loss_mask'].sum()


@pytest.mark.parametrize('mesh, rows', [((1, 1, 1), 8), ((1, 1, 1), 2), ((2, 2, 2), 1)])
def test_equals_the_reference(mesh, rows):
    """On a mesh each part of the rows gives at least one."""
    measured = probed(program(mesh, **{'stability.rows': rows}))
    largest, log_z = expected(max(rows, mesh[0] * mesh[1]))
    np.testing.assert_allclose(measured['attention_logits'], largest, rtol=2e-6)
    np.testing.assert_allclose(measured['log_z'], log_z, rtol=2e-6)


BERT = {'model.family': 'bert', 'model.num_positions': 6, 'model.num_kv_heads': 0, 'model.norm_position': 'post'}
VIT = {
    'model.family': 'vit', 'model.norm_position': 'pre', 'model.image_size': 8, 'model.patch_size': 4,
    'model.num_kv_heads': 0, 'seq_length': 256, 'model.vocab_size': configs.Model.vocab_size,
   
}  # fmt: skip
START = {'init_from': 'x'}
ONLINE = {f'task.online.{name}': value for name, value in dict(reward='x', max_new_tokens=2, completions=2).items()}
TASKS = {
    'language': (True, {}),
    'masked_language': (True, BERT),
    'instructions': (True, {}),
    'preference': (True, START),
    'online': (
        True,
        START | ONLINE,
    ),
    'reward': (False, {}),
    'classification': (False, VIT),
}


def test_every_task_is_here():
    assert sorted(TASKS) == sorted(build.TASKS)


@pytest.mark.parametrize('task', TASKS)
def test_every_task_has_logits_and_those_that_predict_tokens_log_z(task):
    predicts, changes = TASKS[task]
    ours = program(**{'task.name': task}, **changes)
    shapes = jax.eval_shape(ours.probe, ours.state.network, ours.batch(8), ours.state.step)
    assert {name: shape.shape for name, shape in shapes.items()} == (
        {'attention_logits': (3,)} | ({'log_z': ()} if predicts else {})
    )

"""What weight decay shrinks in a ViT: what timm decays, all but vectors, positions and the class token."""

import functools

import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import trees
from mixln_jax.distributed import mesh as meshes
from mixln_jax.models import families
from mixln_jax.program import optim
from mixln_jax.program.program import Program

VIT = {
    'model.family': 'vit', 'model.image_size': 8, 'model.patch_size': 4, 'model.num_classes': 3, 'model.num_layers': 2,
    'model.hidden_size': 8, 'model.intermediate_size': 12, 'model.num_heads': 2, 'model.norm_position': 'post,pre',
    'model.positions': 'learned', 'model.pool': 'tok', 'model.representation': True, 'task.name': 'classification',
    'batch_size': 4, 'num_steps': 4, 'compute_dtype': 'float32', 'optim.warmup_ratio': 0.0, 'device': 'cpu',
    'optim.learning_rate': 0.1, 'optim.schedule': 'constant', 'optim.name': 'sgd', 'data.source': 'digits',
}  # fmt: skip
SPARED = ('positions/embedding', 'token/embedding')


def decays(path):
    """timm 1.0.31, param_groups_weight_decay with VisionTransformer.no_weight_decay."""
    return path not in SPARED and path.rsplit('/')[-1] not in ('bias', 'scale')


def ramp(leaf):
    return np.linspace(0.5, 1.5, leaf.size, dtype=np.float32).reshape(leaf.shape)


def config(**changes):
    values = configs.default()
    values.update_from_flattened_dict(VIT | changes)
    return configs.build(values)


@pytest.mark.parametrize('name', ['adamw', 'sgd', 'lion', 'adafactor', 'muon', 'galore'])
def test_without_gradients(name):
    model = families.from_config(config().model, 'float32')
    params = jax.tree.map(ramp, model.shapes()['params'])
    optimizer = optim.optimizer(configs.Optim(name=name, weight_decay=0.1), model.undecayed)
    updates, _ = jax.jit(optimizer.update)(jax.tree.map(np.zeros_like, params), optimizer.init(params), params)
    assert {*SPARED, 'patch/kernel', 'classes/kernel'} < {path for path, _ in trees.named_leaves(params)}
    for path, update in trees.named_leaves(updates):
        assert np.any(update) == decays(path), path


@functools.cache
def trained(weight_decay):
    """The parameters after one step from those of `ramp`."""
    program = Program(
        config(**{'optim.weight_decay': weight_decay}),
        meshes.make_mesh(configs.Mesh(1, 1, 1), jax.devices('cpu')[:1]),
    )
    state = program.init(jax.random.key(0))
    state = state.replace(params=jax.tree.map(ramp, state.params))
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    batch = {'images': images, 'labels': np.array([0, 1, 2, 0], np.int32)}
    batch |= {'example_mask': np.ones(4, np.float32), 'place': np.arange(4, dtype=np.uint32)}
    state, _ = program.train_step(state, meshes.to_devices(batch, meshes.batch_sharding(program.mesh)))
    return jax.device_get(state.params)


def test_a_step_of_a_run():
    for (path, with_decay), without in zip(
        trees.named_leaves(trained(0.5)), jax.tree.leaves(trained(0.0)), strict=True
    ):
        shrunk = 0.1 * 0.5 * decays(path) * ramp(without)
        np.testing.assert_allclose(without - with_decay, shrunk, rtol=0, atol=1e-5, err_msg=path)

"""The task of learning from generated text: rows, losses against TRL's and plain log-softmax, summary."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import PLACEMENTS, network

from mixln_jax import config as configs
from mixln_jax.distributed import mesh as meshes
from mixln_jax.kernels.cross_entropy import TokenLogProbs
from mixln_jax.models.sampler import Sampler
from mixln_jax.models.sampling import Sampling
from mixln_jax.tasks.online import Online, Rollout
from mixln_jax.tasks.task import Context

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'golden/trl/online.json').read_text())
T = 12


ALL = [*PLACEMENTS, 'mix+prores', 'sandwich+prores']


def task(norm_position='mix', **changes):
    ramp = '+prores' in norm_position
    model, params = network(norm_position, **({'ramp_steps': 10} if ramp else {}))
    model = model.clone(trained_steps=17 if ramp else None)
    return Online(model, 'pad', T, configs.Online(reward='a:b', **changes)), params


def rollouts(rng, rows=8):
    return [
        Rollout(
            rng.integers(0, 11, rng.integers(1, 5)), rng.integers(0, 11, rng.integers(1, 7)), float(rng.normal()), 0.5,
            bool(row % 2), 100 + row,
        )
        for row in range(rows)
    ]  # fmt: skip


def test_rows():
    one = Rollout([1, 2, 3], [4, 5], 0.5, 0.25, True, 7)
    batch = task()[0].collect([one, dataclasses.replace(one, prompt=[6], completion=[7], ended=False)], 3)
    assert batch['inputs'][:, :5].tolist() == [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0], [0] * 5]
    assert batch['targets'][:, :5].tolist() == [[2, 3, 4, 5, 0], [7, 0, 0, 0, 0], [0] * 5]
    assert batch['loss_mask'][:, :5].tolist() == [[0, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0] * 5]
    assert batch['reward'].tolist() == [0.5, 0.5, 0] and batch['baseline'].tolist() == [0.25, 0.25, 0]
    assert batch['ended'].tolist() == [1, 0, 0] and batch['example_mask'].tolist() == [1, 1, 0]
    spec = task()[0].batch_spec(3)
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        name: (like.shape, like.dtype) for name, like in spec.items()
    }


@pytest.mark.parametrize(
    'name, keys',
    [('grpo', {'algorithm': 'grpo', 'beta': 0.0}), ('rloo', {'algorithm': 'rloo', 'beta': 0.0}),
     ('grpo_kl', {'algorithm': 'grpo', 'beta': GOLDEN['beta']})],
)  # fmt: skip
def test_losses_and_gradients_are_trls(name, keys, monkeypatch):
    log_probs, old, reference, mask, advantages = (
        np.float32(GOLDEN[part]) for part in ('log_probs', 'old', 'reference', 'mask', 'advantages')
    )
    batch = {
        'loss_mask': mask, 'old_log_probs': old, 'reference_log_probs': reference, 'advantage': advantages,
        'reward': advantages, 'ended': advantages, 'baseline': advantages,
    }  # fmt: skip
    ours, _ = task(clip=GOLDEN['clip'], **keys)
    monkeypatch.setattr(Online, 'log_probs', lambda self, params, *_, **__: TokenLogProbs(params, params, None))

    def loss(log_probs):
        found = ours.losses(log_probs, batch, Context(train=True))
        return found.sum / found.weight

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(log_probs))
    assert float(value) == pytest.approx(GOLDEN[name]['loss'], abs=1e-6)
    np.testing.assert_allclose(gradient, GOLDEN[name]['gradient'], rtol=0, atol=1e-6)


def test_the_ramps_of_the_reference_stand_where_training_began():
    """`reference_log_probs` are those of step 0, in training and evaluation, whatever step the network has come to."""
    ours, params = task('mix+prores', beta=0.1)
    batch = jax.tree.map(jnp.asarray, ours.collect(rollouts(np.random.default_rng(0)), 8))
    at = lambda step: ours.log_probs(params, batch, Context(step=jnp.int32(step))).log_probs  # noqa: E731
    found = ours.recorded(params, batch, Context(train=True, step=jnp.int32(9), reference=params))
    np.testing.assert_array_equal(found['reference_log_probs'], at(0))
    np.testing.assert_array_equal(found['old_log_probs'], at(9))
    kl = ours.losses(params, batch, Context(step=jnp.int32(9), reference=params)).metrics['kl']
    assert kl > 1e-3 and ours.losses(params, batch, Context(step=jnp.int32(0), reference=params)).metrics['kl'] == 0


def plain(model, params, batch, temperature):
    """Log-probabilities of the targets, by log-softmax over all logits."""
    logits = model.apply({'params': params}, batch)[0][..., :11] / temperature
    return jnp.take_along_axis(jax.nn.log_softmax(logits), batch['targets'][..., None], -1)[..., 0]


@pytest.mark.parametrize('temperature', [1.0, 0.7])
def test_gradient_is_that_of_plain_log_softmax(temperature):
    """RLOO before an update: -sum A log p over the number of completions."""
    ours, params = task(completions=4, temperature=temperature, beta=0.0)
    batch = jax.tree.map(jnp.asarray, ours.collect(rollouts(np.random.default_rng(0)), 8))

    def loss(params):
        found = ours.losses(params, ours.with_advantages(ours.recorded(params, batch, Context())), Context(train=True))
        return found.sum / found.weight

    def reinforce(params):
        rewards = batch['reward'].reshape(2, 4)
        advantages = ((rewards - rewards.mean(1, keepdims=True)) * 4 / 3).reshape(-1)
        log_probs = plain(ours.model, params, batch, temperature) * batch['loss_mask']
        return -(advantages * log_probs.sum(-1)).mean()

    got, expected = jax.grad(loss)(params), jax.grad(reinforce)(params)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    assert largest > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest), got, expected)


@pytest.mark.parametrize('keys', [{}, {'algorithm': 'grpo'}, {'algorithm': 'remax'}, {'kl': 'loss'}], ids=str)
def test_masked_rows_change_nothing(keys):
    ours, params = task(completions=4, **keys)
    other = jax.tree.map(lambda leaf: leaf * 1.01, params)
    context = Context(train=True, reference=other)
    batch = ours.collect(rollouts(np.random.default_rng(1), 4), 8)
    few = {name: values[:4] for name, values in batch.items()}

    def found(batch):
        def loss(params):
            losses = ours.losses(params, recorded, context)
            return losses.sum, losses

        recorded = ours.with_advantages(ours.recorded(params, jax.tree.map(jnp.asarray, batch), context))
        (_, losses), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return losses.sum, losses.weight, losses.metrics, gradient

    largest = lambda values: max(1.0, np.abs(values).max())  # noqa: E731
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * largest(b)), found(batch), found(few)
    )


def test_the_reference_counts_where_the_keys_say():
    ours, params = task(completions=4, beta=0.3)
    reference = jax.tree.map(lambda leaf: leaf * 1.1, params)
    batch = jax.tree.map(jnp.asarray, ours.collect(rollouts(np.random.default_rng(2), 4), 4))
    differences = (plain(ours.model, params, batch, 1) - plain(ours.model, reference, batch, 1)) * batch['loss_mask']
    context = Context(train=True, reference=reference)

    def recorded(**keys):
        ours, _ = task(completions=4, beta=0.3, **keys)
        return ours, ours.with_advantages(ours.recorded(params, batch, context))

    rewards = np.asarray(batch['reward'] - 0.3 * differences.sum(-1))
    _, in_reward = recorded()
    np.testing.assert_allclose(in_reward['advantage'], (rewards - rewards.mean()) * 4 / 3, atol=1e-5)
    ours, in_loss = recorded(kl='loss')
    rewards = np.asarray(batch['reward'])
    np.testing.assert_allclose(in_loss['advantage'], (rewards - rewards.mean()) * 4 / 3, atol=1e-5)
    estimates = ((np.expm1(-differences) + differences) * batch['loss_mask']).sum()
    losses = ours.losses(params, in_loss, context)
    np.testing.assert_allclose(losses.sum, -in_loss['advantage'].sum() + 0.3 * estimates, rtol=1e-4)
    np.testing.assert_allclose(losses.metrics['kl'], estimates, rtol=1e-4)
    evaluated = ours.losses(params, batch, context._replace(train=False))
    np.testing.assert_allclose(evaluated.sum, 0.3 * estimates - rewards.sum(), rtol=1e-4)


def test_summary():
    ours, _ = task()
    totals = {
        'sum': 3.0, 'weight': 4.0, 'tokens': 10.0, 'completions': 4.0, 'reward': 2.0, 'reward_squared': 2.0, 'kl': 1.0,
        'entropy': 5.0, 'ended': 3.0, 'clipped': 1.0,
    }  # fmt: skip
    assert ours.summary(totals) == {
        'loss': 0.75, 'reward': 0.5, 'reward_std': 0.5, 'kl': 0.25, 'entropy': 0.5, 'length': 2.5, 'ended': 0.75,
        'clipped': 0.25,
    }  # fmt: skip
    assert task(beta=0.0)[0].summary(totals)['kl'] is None


def test_prompts_alone_are_measured_as_text():
    ours, params = task()
    batch = {'inputs': np.arange(8).reshape(2, 4), 'targets': np.arange(8).reshape(2, 4) + 1}
    batch |= {'loss_mask': np.float32([[1, 1, 0, 0], [1, 0, 0, 0]])}
    losses = ours.losses(params, batch)
    assert float(losses.sum) == pytest.approx(-float((plain(ours.model, params, batch, 1) * batch['loss_mask']).sum()))


@pytest.mark.parametrize('norm_position', ALL)
def test_log_probs_of_samples_are_those_of_the_training_pass(norm_position):
    ours, params = task(norm_position)
    mesh = meshes.make_mesh(configs.Mesh(1, 1, 1), jax.devices('cpu'))
    generator = Sampler(ours.model, T, mesh)
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 1]]
    made = generator.generate(
        generator.to_devices(params), prompts, max_new=[6, 3, 5, 1], sampling=Sampling(1.3), seed=3
    )
    batch = ours.collect([Rollout(a, one.ids, 0, 0, True, 0) for a, one in zip(prompts, made, strict=True)], 4)
    found = jax.jit(ours.log_probs)(params, jax.tree.map(jnp.asarray, batch)).log_probs
    for row, one in enumerate(made):
        np.testing.assert_allclose(found[row][batch['loss_mask'][row] > 0], one.log_probs, rtol=0, atol=1e-5)

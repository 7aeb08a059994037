"""Classification of images: losses and shares by hand, how images are mixed, and that a batch is mixed as a whole."""

import functools

import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax.models import families
from mixln_jax.program import optim, step
from mixln_jax.tasks import classification
from mixln_jax.tasks.classification import Classification
from mixln_jax.tasks.task import Context

C, S = 7, 12
SIZES = dict(
    family='vit', hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, image_size=S, patch_size=4,
    num_classes=C, norm_position='mix', post_ratio=0.5,
)  # fmt: skip


def task(**keys):
    return Classification(families.from_config(configs.Model(**SIZES), 'float32'), configs.Classification(**keys))


def rows(count=6, seed=0):
    rng = np.random.default_rng(seed)
    return {
        'images': rng.integers(0, 256, (count, S, S, 3)).astype(np.uint8),
        'labels': rng.integers(0, C, count).astype(np.int32),
        'example_mask': np.ones(count, np.float32),
        'place': np.arange(count, dtype=np.uint32),
    }


def random_params(of):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), of.model.shapes()['params'])


def prepared(of, batch, number, train=True):
    return jax.device_get(_prepare(of, batch, step.step_key(0, number), train))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _prepare(of, batch, key, train):
    return of.prepare(batch, key, train)


# --- Losses


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_losses_by_hand():
    of = task(label_smoothing=0.3)
    params, batch = random_params(of), rows() | {'example_mask': np.array([1, 1, 0, 1, 1, 1], np.float32)}
    batch |= {'other_labels': np.roll(batch['labels'], 1), 'other_share': np.full(6, 0.25, np.float32)}
    logits, _ = of.model.apply({'params': params}, batch)
    targets = np.zeros((6, C))
    for i in range(6):
        targets[i, batch['labels'][i]] += 0.75
        targets[i, batch['other_labels'][i]] += 0.25
    smooth = 0.7 * targets + 0.3 / C
    own = -(smooth * log_softmax(logits)).sum(-1) * batch['example_mask']
    losses = of.losses(params, batch, Context(train=True))
    np.testing.assert_allclose(losses.per_example, own, rtol=1e-5)
    assert losses.sum == pytest.approx(own.sum(), rel=1e-6) and losses.weight == 5
    plain = of.losses(params, batch)  # labels are not smoothed in an evaluation
    np.testing.assert_allclose(
        plain.per_example, -(targets * log_softmax(logits)).sum(-1) * batch['example_mask'], rtol=1e-5
    )


def test_shares_of_right_answers():
    logits = np.array([[0.0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 1, 2, 0, 0, 0, 0]])
    found = classification.ranks(logits, np.array([0, 0, 5, 1]))
    np.testing.assert_array_equal(found, [6, 0, 5, 2])  # of equal logits the first is the likeliest, as argmax has it
    of = task()
    params, batch = random_params(of), rows(200)
    logits, _ = of.model.apply({'params': params}, batch)
    losses = of.losses(params, batch)
    assert losses.metrics['accuracy'] == (np.argmax(logits, -1) == batch['labels']).sum()
    five = np.argsort(-np.asarray(logits), -1)[:, :5]
    assert losses.metrics['top5'] == (five == batch['labels'][:, None]).sum()
    totals = {'sum': 20.0, 'weight': 10.0, 'accuracy': 4.0, 'top5': 7.0}
    assert of.summary(totals) == {'loss': 2.0, 'accuracy': 0.4, 'top5': 0.7}


def test_a_head_of_zeros_is_as_good_as_chance():
    of, batch = task(), rows(70) | {'labels': np.repeat(np.arange(C), 10).astype(np.int32)}
    params = of.model.init(jax.random.key(0))['params']
    losses = of.losses(params, batch)
    assert losses.sum / 70 == pytest.approx(np.log(C), rel=1e-6)
    assert losses.metrics['accuracy'] == 10 and losses.metrics['top5'] == 50


def test_baseline():
    labels = np.array([0, 0, 0, 1], np.int32)
    batch = {'labels': labels, 'example_mask': np.array([1, 1, 1, 1.0])}
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) + 1 / 8
    assert task().baseline([batch]) == pytest.approx(entropy)


# --- Mixing


def test_an_evaluation_mixes_nothing():
    batch = rows()
    seen = prepared(task(mixup=0.2, cutmix=1.0), batch, 0, train=False)
    assert seen.keys() == batch.keys()
    np.testing.assert_array_equal(seen['images'], batch['images'])


def test_mixup():
    """Each image with the one before it, all with one share, of which the larger part is the image's own."""
    batch, of = rows(), task(mixup=0.2)
    for number in range(5):
        seen = prepared(of, batch, number)
        share = seen['other_share'][0]
        assert 0 <= share <= 0.5 and (seen['other_share'] == share).all()
        images = batch['images'].astype(np.float64)
        np.testing.assert_allclose(seen['images'], (1 - share) * images + share * np.roll(images, 1, axis=0), atol=1e-3)
        np.testing.assert_array_equal(seen['other_labels'], np.roll(batch['labels'], 1))


def test_shares_of_mixup_are_those_of_the_beta_distribution():
    """Mean and variance of min(a, 1-a), a from Beta(0.8, 0.8), against numpy's draws."""
    of, batch = task(mixup=0.8), rows(2)
    one = jax.jit(lambda number: of.prepare(batch, step.step_key(0, number), True)['other_share'][0])
    shares = np.array(jax.lax.map(one, np.arange(10_000)))
    a = np.random.default_rng(0).beta(0.8, 0.8, 400_000)
    wanted = np.minimum(a, 1 - a)
    assert abs(shares.mean() - wanted.mean()) < 5 * wanted.std() / 100
    assert shares.std() == pytest.approx(wanted.std(), rel=0.03)


def test_cutmix():
    """A rectangle of each image comes from the one before it, and its area is the other's share of the label."""
    batch, of, areas = rows(), task(cutmix=1.0), []
    for number in range(200):
        seen = prepared(of, batch, number)
        other = np.roll(batch['images'], 1, axis=0)
        changed = (seen['images'] != batch['images']).any((0, 3))
        area = seen['other_share'][0] * S * S
        inside = np.argwhere(changed)
        if len(inside):
            (top, left), (bottom, right) = inside.min(0), inside.max(0) + 1
            assert changed[top:bottom, left:right].all() and changed.sum() == (bottom - top) * (right - left)
            np.testing.assert_array_equal(seen['images'][:, top:bottom, left:right], other[:, top:bottom, left:right])
        assert area == pytest.approx(changed.sum(), abs=1e-3)
        areas.append(area / S / S)
    # a box of area b around a uniform centre keeps less: E over b of (sqrt(b) - b/4)^2 = 1/2 - 1/5 + 1/48
    assert abs(np.mean(areas) - (1 / 2 - 1 / 5 + 1 / 48)) < 5 * np.std(areas) / 200**0.5 + 0.03


def test_both():
    """One of the two at random."""
    batch, of = rows(2), task(mixup=0.8, cutmix=1.0)
    kinds = []
    for number in range(60):
        images = prepared(of, batch, number)['images']
        kinds.append((images == batch['images']).mean() > 0.02 or (images == np.roll(batch['images'], 1, 0)).all())
    assert 15 < sum(kinds) < 45


def test_partners_are_of_the_whole_batch():
    """Micro-batches are cut after images are mixed: gradients do not depend on their number."""
    of, batch = task(mixup=0.8, label_smoothing=0.1), rows(8)
    optimizer = optim.optimizer(configs.Optim(name='sgd'))
    state = step.init_state(of, optimizer, jax.random.key(0))
    update = functools.partial(step.train_step, task=of, optimizer=optimizer, schedule=lambda number: np.float32(0.1))
    one, metrics = jax.jit(update)(state, batch)
    four, others = jax.jit(functools.partial(update, accumulate=4))(state, batch)
    assert metrics['loss'] == pytest.approx(float(others['loss']), rel=1e-6)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_positions():
    of, batch = task(), rows(3) | {'example_mask': np.array([1, 1, 0], np.float32)}
    np.testing.assert_array_equal(of.position_mask(batch), np.repeat([[1], [1], [0]], 9, axis=1))
    assert of.losses(random_params(of), batch).metrics['tokens'] == 18
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in of.batch_spec(6).items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in rows().items()
    }

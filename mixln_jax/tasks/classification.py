"""Classification of images: softmax cross-entropy over C classes, with mixed images and smoothed labels in training.

B images of S x S pixels, T positions of the network.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixln_jax import config as configs
from mixln_jax.models.network import Network
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks.language import unigram_entropy
from mixln_jax.tasks.task import EVALUATION, Batch, Context, Losses, Task

NEAR = 5  # an image counts for `top5` if its class is among as many that the network holds likeliest
ENOUGH = 10_000  # labels, for their frequencies; their images are decoded for them


@dataclasses.dataclass(frozen=True)
class Classification(Task):
    """Tells images apart by their classes; the loss is the mean over images of the cross-entropy with their labels.

    In training labels are smoothed and images mixed, as `config.task.classification` says; see `mixed`. `accuracy` and
    `top5` are the shares of images whose class is the likeliest one, or among the five likeliest; of mixed images
    the class is that of the larger part.
    """

    classification: configs.Classification = dataclasses.field(default_factory=configs.Classification)

    reads: ClassVar[str] = 'images'
    unit: ClassVar[str] = 'images'
    short_unit: ClassVar[str] = 'img'
    headline: ClassVar[str] = 'accuracy'
    label: ClassVar[str] = 'accuracy'
    digits: ClassVar[int] = 4
    metrics: ClassVar[tuple[str, ...]] = ('tokens', 'accuracy', 'top5')

    @classmethod
    def from_config(cls, config: configs.Config, model: Network) -> Task:
        """Returns the task of a run. Raises UsageError if keys of texts are set, which have no meaning."""
        for name in ('compat', 'seq_length'):
            if (value := getattr(config, name)) != getattr(configs.Config, name):
                raise UsageError(
                    f'config.{name}={value} has no meaning for config.task.name=classification: leave it out'
                )
        return cls(model, config.task.classification)

    def units(self, tokens: float) -> float:
        return tokens / self.model.row_length(0)

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        size, row = self.model.config.image_size, (batch_size,)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            'images': ((*row, size, size, 3), 'u1'),
            'labels': (row, 'i4'),
            'example_mask': (row, 'f4'),
            'place': (row, 'u4'),
        }
        return {name: jax.ShapeDtypeStruct(shape, np.dtype(kind)) for name, (shape, kind) in shapes.items()}

    def position_mask(self, batch: Mapping[str, Any]) -> Any:
        mask = batch['example_mask']
        array = np if isinstance(mask, np.ndarray) else jnp
        return array.broadcast_to(mask[:, None], (len(mask), self.model.row_length(0)))

    def prepare(self, batch: Batch, key: jax.Array, train: bool) -> Batch:
        """Returns the batch, in training with its images mixed: `other_labels` [B] and their `other_share` [B]."""
        keys = self.classification
        if not train or not (keys.mixup or keys.cutmix):
            return batch
        return mixed(batch, key, keys.mixup, keys.cutmix)

    def losses(self, params: Any, batch: Batch, context: Context = EVALUATION) -> Losses:
        variables = {'params': params, **context.collections}
        logits, _ = self.model.apply(variables, batch, context.layer_mask, step=context.step)
        smoothing = self.classification.label_smoothing if context.train else 0.0
        losses = cross_entropy(logits, batch['labels'], smoothing)
        if 'other_labels' in batch:
            share = batch['other_share']
            losses = (1 - share) * losses + share * cross_entropy(logits, batch['other_labels'], smoothing)
        mask = batch['example_mask']
        losses = jnp.where(mask > 0, losses, 0)
        rank = ranks(logits, batch['labels'])
        metrics = {
            'tokens': mask.sum() * self.model.row_length(0),
            'accuracy': (mask * (rank < 1)).sum(),
            'top5': (mask * (rank < NEAR)).sum(),
        }
        return Losses(losses.sum(), mask.sum(), losses, mask, metrics)

    def likeliest(self, params: Any, batch: Batch, step: jax.Array | None = None) -> jax.Array:
        """Returns the likeliest class [B] of each image; of equal logits the first one. `step` as in Context."""
        logits, _ = self.model.apply({'params': params}, batch, step=step)
        return logits.argmax(-1)

    def summary(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        count = max(totals['weight'], 1e-9)
        values = {'loss': totals['sum'] / count, 'accuracy': totals['accuracy'] / count}
        return values | ({'top5': totals['top5'] / count} if self.model.config.num_classes > NEAR else {})

    def baseline(self, batches: Iterable[Mapping[str, np.ndarray]]) -> float | None:
        """Returns the entropy of the labels in nats, of as many batches as it takes."""
        counts = np.zeros(self.model.config.num_classes)
        for batch in batches:
            counts += np.bincount(batch['labels'][batch['example_mask'] > 0], minlength=len(counts))
            if counts.sum() > ENOUGH:
                break
        return unigram_entropy(counts)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Returns the cross-entropy [B] in nats of logits [B,C] with labels [B], of which `smoothing` is spread over all
    classes alike."""
    own = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if not smoothing:
        return own
    return (1 - smoothing) * own - smoothing * jax.nn.log_softmax(logits).mean(-1)


def ranks(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how many classes [B] are likelier than the labels [B]; of equal logits the first is the likeliest."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(-1)


def mixed(batch: Batch, key: jax.Array, mixup: float, cutmix: float) -> Batch:
    """Returns a batch in which image i and the one before it are mixed, all in the same way.

    mixup: (1 - s) times the image plus s times the other one, where 1 - s is the larger of a and 1 - a, for a from
    Beta(mixup, mixup): Zhang et al. 2018 (arXiv 1710.09412), as in big_vision. cutmix: a box around a pixel comes from
    the other image; its sides are sqrt(b) of the image's, before the image's borders cut it, for b from Beta(cutmix,
    cutmix), and s is its share of the area: Yun et al. 2019 (arXiv 1905.04899). With both, each has half a chance.

    Args:
        batch: `images` [B,S,S,3] and `labels` [B].
        key: of the step.
        mixup, cutmix: parameters of the beta distributions; 0: never.

    Returns:
        The batch with `images` in float32, `other_labels` [B] and s as `other_share` [B].
    """
    which, key_share, key_box = jax.random.split(key, 3)
    images = batch['images'].astype(jnp.float32)
    others = jnp.roll(images, 1, axis=0)
    size = images.shape[1]

    def blend() -> tuple[jax.Array, jax.Array]:
        a = jax.random.beta(key_share, mixup, mixup)
        share = jnp.minimum(a, 1 - a)
        return (1 - share) * images + share * others, share

    def cut() -> tuple[jax.Array, jax.Array]:
        side = jnp.sqrt(jax.random.beta(key_share, cutmix, cutmix)) * size
        centre = jax.random.randint(key_box, (2,), 0, size)
        first = jnp.clip(jnp.floor(centre - side / 2), 0, size)
        end = jnp.clip(jnp.floor(centre + side / 2), 0, size)
        at = jnp.arange(size)[:, None]
        row, column = ((at >= first) & (at < end)).T
        inside = row[:, None] & column
        return jnp.where(inside[..., None], others, images), inside.mean(dtype=jnp.float32)

    if mixup and cutmix:
        images, share = jax.lax.cond(jax.random.bernoulli(which), blend, cut)
    else:
        images, share = blend() if mixup else cut()
    return {
        **batch,
        'images': images,
        'other_labels': jnp.roll(batch['labels'], 1),
        'other_share': jnp.full(batch['labels'].shape, share),
    }

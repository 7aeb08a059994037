"""Keys of the classification of images."""

import dataclasses

from mixln_jax.keys.field import key


@dataclasses.dataclass(frozen=True)
class Classification:
    """classification: images are told apart by their classes; see docs/vision.md."""

    label_smoothing: float = key(
        0.0,
        'classification: share of each label that is spread over all classes in training (Szegedy et al. 2016)',
        at_least=0.0,
        below=1.0,
    )
    mixup: float = key(
        0.0,
        'classification: each image is mixed with another one of its batch, by shares drawn from the beta distribution '
        'with both parameters of this value (Zhang et al. 2018); 0: not at all',
        at_least=0.0,
        at_most=1e3,
    )
    cutmix: float = key(
        0.0,
        'classification: a box of each image comes from another one of its batch, of an area drawn in the same way '
        '(Yun et al. 2019); with mixup one of both at random; 0: not at all',
        at_least=0.0,
        at_most=1e3,
    )

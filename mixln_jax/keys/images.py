"""Keys of images: their size, and how training varies them."""

import dataclasses

from mixln_jax.keys.field import key


@dataclasses.dataclass(frozen=True)
class Images:
    """How images become what the network sees; see docs/vision.md."""

    interpolation: str = key(
        'bilinear',
        'images: how they are resized; bilinear: without antialiasing (opencv), as big_vision does; bicubic: with '
        'antialiasing (Pillow), as timm does',
        choices=('bilinear', 'bicubic'),
    )
    eval_crop: float = key(
        0.875,
        'images: share of the smaller side that evaluation keeps, around the centre; 0.875 of 256 pixels are 224',
        at_least=0.1,
        at_most=1.0,
    )
    crop: str = key(
        'inception',
        'images: what training sees of an image; inception: a rectangle of random area and aspect (Szegedy et al. '
        '2015); none: what evaluation sees',
        choices=('inception', 'none'),
    )
    min_area: float = key(0.05, 'images: least share of the area in an inception crop', above=0.0, at_most=1.0)
    flip: float = key(0.5, 'images: probability of a flip from left to right', at_least=0.0, at_most=1.0)
    policy: str = key(
        'none',
        'images: RandAugment (Cubuk et al. 2020); randaug(2,10): 2 operations of magnitude 10, as big_vision does; '
        'rand-m9-mstd0.5-inc1: magnitude 9 with a deviation of 0.5, as timm does',
    )
    color_jitter: float = key(
        0.0, 'images: largest change of brightness, contrast and saturation, as a share', at_least=0.0, at_most=1.0
    )
    erasing: float = key(
        0.0,
        'images: probability that a rectangle becomes noise (Zhong et al. 2020)',
        at_least=0.0,
        at_most=1.0,
    )

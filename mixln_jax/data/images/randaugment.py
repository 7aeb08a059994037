"""RandAugment (Cubuk et al. 2020) in the two forms in which published recipes use it.

Both draw operations with replacement. `randaug(N,M)` is big_vision's: N operations of magnitude M on a scale to 10,
always applied. `rand-mM-mstdS-inc1` is timm's: two operations, each applied with probability 0.5, whose magnitude is
normal with mean M and deviation S; the larger, the stronger, of every operation.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from mixln_jax.system.errors import UsageError

SCALE = 10.0  # magnitudes are tenths of the largest
GRAY = (128, 128, 128)  # what big_vision fills with
MEAN = (124, 116, 104)  # the mean color of ImageNet, what timm fills with
KEY = 'config.data.images.policy'

Operation = Callable[[Image.Image, Any, 'Policy'], Image.Image]
Argument = Callable[[float, np.random.Generator], Any]  # (magnitude as a share of SCALE, random) -> for the operation


@dataclasses.dataclass(frozen=True)
class Policy:
    """How images are distorted."""

    operations: tuple[tuple[Operation, Argument], ...]
    count: int  # operations on an image
    magnitude: float  # on a scale to 10
    deviation: float  # of the magnitude
    probability: float  # that an operation is applied
    resample: Image.Resampling
    fill: tuple[int, int, int]

    def __call__(self, pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Returns distorted pixels [S, S, 3] uint8."""
        image = Image.fromarray(pixels)
        for _ in range(self.count):
            operation, argument = self.operations[random.integers(len(self.operations))]
            if random.random() >= self.probability:
                continue
            magnitude = self.magnitude
            if self.deviation:
                magnitude = min(max(random.normal(magnitude, self.deviation), 0.0), SCALE)
            image = operation(image, argument(magnitude / SCALE, random), self)
        return np.asarray(image)


def parse(text: str) -> Policy | None:
    """Returns the policy of a name; None for `none`. Raises UsageError for an unknown name."""
    if text == 'none':
        return None
    if match := re.fullmatch(r'randaug\((\d),(\d{1,2})\)', text.replace(' ', '')):
        return Policy(BIG_VISION, int(match[1]), float(match[2]), 0.0, 1.0, Image.Resampling.NEAREST, GRAY)
    if match := re.fullmatch(r'rand-m(\d|10)-mstd(\d(?:\.\d+)?)-inc1', text):
        return Policy(TIMM, 2, float(match[1]), float(match[2]), 0.5, Image.Resampling.BICUBIC, MEAN)
    raise UsageError(f'{KEY}={text!r} is not none, randaug(N,M) or rand-mM-mstdS-inc1, such as rand-m9-mstd0.5-inc1')


def _affine(image: Image.Image, matrix: tuple[float, ...], policy: Policy) -> Image.Image:
    """Returns the image whose pixel (x, y) is that of the given one at (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, policy.resample, fillcolor=policy.fill)


def _shift(image: Image.Image, right: float, down: float, policy: Policy) -> Image.Image:
    return _affine(image, (1, 0, right, 0, 1, down), policy)


def _posterize(image: Image.Image, bits: int, policy: Policy) -> Image.Image:
    mask = 0xFF << (8 - min(max(bits, 0), 8)) & 0xFF
    return image.point([value & mask for value in range(256)] * 3)


def _solarize_add(image: Image.Image, amount: int, policy: Policy) -> Image.Image:
    return image.point([min(255, value + amount) if value < 128 else value for value in range(256)] * 3)


def _contrast_of_big_vision(image: Image.Image, factor: float, policy: Policy) -> Image.Image:
    """Blends with gray of number of pixels / 256, at most 255: the mean of the histogram's counts, where the mean of
    the gray values was meant. Results were published with it."""
    level = int(min(image.width * image.height / 256, 255))
    return Image.blend(Image.new('RGB', image.size, (level,) * 3), image, factor)


def _cutout(image: Image.Image, place: tuple[int, float, float], policy: Policy) -> Image.Image:
    """Fills a square of twice `half` around a point, as far as it is inside the image."""
    half, x, y = place[0], int(place[1] * image.width), int(place[2] * image.height)
    if half:
        ImageDraw.Draw(image).rectangle((x - half, y - half, x + half - 1, y + half - 1), fill=policy.fill)
    return image


def _enhanced(kind: Any) -> Operation:
    return lambda image, factor, policy: kind(image).enhance(factor)


def _signed(largest: float) -> Argument:
    """Returns magnitudes up to `largest`, of either sign."""
    return lambda share, random: share * largest * (1 if random.random() < 0.5 else -1)


def _whole(largest: int) -> Argument:
    return lambda share, random: int(share * largest)


def _strength(share: float, random: np.random.Generator) -> float:
    """Returns a factor, of which 1 changes nothing."""
    return 1.8 * share + 0.1


def _away_from_1(share: float, random: np.random.Generator) -> float:
    return max(0.1, 1 + _signed(0.9)(share, random))


def _none(share: float, random: np.random.Generator) -> None:
    """An operation without magnitude."""


_color, _contrast = _enhanced(ImageEnhance.Color), _enhanced(ImageEnhance.Contrast)
_brightness, _sharpness = _enhanced(ImageEnhance.Brightness), _enhanced(ImageEnhance.Sharpness)
_COMMON: tuple[tuple[Operation, Argument], ...] = (
    (lambda image, _, policy: ImageOps.autocontrast(image), _none),
    (lambda image, _, policy: ImageOps.equalize(image), _none),
    (lambda image, _, policy: ImageOps.invert(image), _none),
    (lambda image, degrees, policy: image.rotate(degrees, policy.resample, fillcolor=policy.fill), _signed(30)),
    (lambda image, slope, policy: _affine(image, (1, slope, 0, 0, 1, 0), policy), _signed(0.3)),
    (lambda image, slope, policy: _affine(image, (1, 0, 0, slope, 1, 0), policy), _signed(0.3)),
)
BIG_VISION: tuple[tuple[Operation, Argument], ...] = (
    *_COMMON,
    (_posterize, lambda share, random: max(1, int(4 * share))),  # of 0 bits TensorFlow keeps the highest
    (lambda image, limit, policy: ImageOps.solarize(image, limit), _whole(256)),
    (_solarize_add, _whole(110)),
    (_color, _strength),
    (_contrast_of_big_vision, _strength),
    (_brightness, _strength),
    (_sharpness, _strength),
    (lambda image, pixels, policy: _shift(image, pixels, 0, policy), _signed(100)),
    (lambda image, pixels, policy: _shift(image, 0, pixels, policy), _signed(100)),
    (_cutout, lambda share, random: (int(40 * share), random.random(), random.random())),
)
TIMM: tuple[tuple[Operation, Argument], ...] = (
    *_COMMON,
    (_posterize, lambda share, random: 4 - int(4 * share)),
    (lambda image, limit, policy: ImageOps.solarize(image, limit), lambda share, random: 256 - int(256 * share)),
    (_solarize_add, _whole(110)),
    (_color, _away_from_1),
    (_contrast, _away_from_1),
    (_brightness, _away_from_1),
    (_sharpness, _away_from_1),
    (lambda image, share, policy: _shift(image, share * image.width, 0, policy), _signed(0.45)),
    (lambda image, share, policy: _shift(image, 0, share * image.height, policy), _signed(0.45)),
)

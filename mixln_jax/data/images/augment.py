"""What the network sees of an image: a crop of S x S pixels, in training varied at random.

The variation of example i in epoch e follows from (data.seed, e, i) alone; see `generator`.
"""

import math
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageEnhance

from mixln_jax import config
from mixln_jax.data.images import randaugment

TAG = 0x1336  # keeps these random numbers apart from those of the order of examples
ASPECTS = math.log(3 / 4), math.log(4 / 3)  # of an inception crop
TRIES = 10  # rectangles drawn before one that certainly fits is taken
ERASED = 0.02, 1 / 3  # share of the area
ERASED_ASPECTS = math.log(0.3), math.log(1 / 0.3)
MEAN, STD = (np.array(values) * 255 for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # of ImageNet
ENHANCEMENTS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def generator(seed: int, epoch: int, number: int) -> np.random.Generator:
    """Returns the random numbers with which an example is varied in an epoch."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([TAG, seed, epoch, number])))


class Augmentation:
    """Makes of pixels [H, W, 3] uint8, of any size, what the network sees, [S, S, 3] uint8."""

    def __init__(self, keys: config.Images, size: int):
        """Raises UsageError for a policy that does not exist. `size`: S."""
        self._keys, self._size, self._policy = keys, size, randaugment.parse(keys.policy)

    def __reduce__(self) -> tuple[Any, ...]:
        # Worker processes make their own: a policy has functions without names.
        return Augmentation, (self._keys, self._size)

    def training(self, pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Returns a crop, varied: flip, RandAugment, color jitter and erasing, in this order."""
        keys = self._keys
        if keys.crop == 'inception':
            box = inception_box(pixels.shape[0], pixels.shape[1], keys.min_area, random)
            pixels = resize(pixels, box, self._size, keys.interpolation)
        else:
            pixels = self.evaluation(pixels)
        if random.random() < keys.flip:
            pixels = cv2.flip(pixels, 1)
        if self._policy:
            pixels = self._policy(pixels, random)
        if keys.color_jitter:
            pixels = jitter(pixels, keys.color_jitter, random)
        if random.random() < keys.erasing:
            pixels = erase(pixels, random)
        return pixels

    def evaluation(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the central crop: the smaller side is resized to S / eval_crop, and S x S pixels are cut out.

        Sides are rounded, where the crop begins is rounded down. Where bilinear makes images smaller, it averages
        areas, as big_vision's `resize_small` does.
        """
        keys = self._keys
        pixels = _middle(_middle(pixels, 0), 1)
        height, width = pixels.shape[:2]
        factor = max(round(self._size / keys.eval_crop), self._size) / min(height, width)
        height, width = (max(round(side * factor), self._size) for side in (height, width))
        pixels = resize_to(pixels, height, width, keys.interpolation)
        top, left = (height - self._size) // 2, (width - self._size) // 2
        return pixels[top : top + self._size, left : left + self._size]


Box = tuple[int, int, int, int]  # top, left, height, width


def inception_box(height: int, width: int, min_area: float, random: np.random.Generator) -> Box:
    """Returns a random rectangle of an image: its share of the area is uniform, its aspect log-uniform, as torchvision
    and timm draw them. If ten of them do not fit, the largest central one of an allowed aspect is taken."""
    for _ in range(TRIES):
        area, aspect = height * width * random.uniform(min_area, 1), math.exp(random.uniform(*ASPECTS))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    low, high = map(math.exp, ASPECTS)
    h, w = min(height, max(1, round(width / low))), min(width, max(1, round(height * high)))
    return (height - h) // 2, (width - w) // 2, h, w


def _middle(pixels: np.ndarray, axis: int) -> np.ndarray:
    """Returns the middle of a side that is over 4 times the other, whose resized image might not fit into memory."""
    length, most = pixels.shape[axis], 4 * pixels.shape[1 - axis]
    start = max(0, (length - most) // 2)
    return pixels[(slice(None),) * axis + (slice(start, start + most),)]


def resize(pixels: np.ndarray, box: Box, size: int, interpolation: str) -> np.ndarray:
    """Returns the pixels in a box, resized to [size, size, 3]; see `Images.interpolation`."""
    top, left, height, width = box
    pixels = pixels[top : top + height, left : left + width]
    if interpolation == 'bilinear':
        return cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)
    return _bicubic(pixels, size, size)


def resize_to(pixels: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """Returns all pixels, resized to [height, width, 3] for evaluation."""
    if pixels.shape[:2] == (height, width):
        return pixels
    if interpolation == 'bilinear':
        method = cv2.INTER_AREA if height < pixels.shape[0] else cv2.INTER_LINEAR
        return cv2.resize(pixels, (width, height), interpolation=method)
    return _bicubic(pixels, height, width)


def _bicubic(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def jitter(pixels: np.ndarray, largest: float, random: np.random.Generator) -> np.ndarray:
    """Returns pixels whose brightness, contrast and saturation are multiplied, in random order, by factors that are
    uniform in 1 - largest .. 1 + largest; 1 keeps what there is (torchvision's ColorJitter)."""
    image = Image.fromarray(pixels)
    for number in random.permutation(len(ENHANCEMENTS)):
        image = ENHANCEMENTS[number](image).enhance(random.uniform(1 - largest, 1 + largest))
    return np.asarray(image)


def erase(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Returns pixels in which a random rectangle is noise, normal with the mean and deviation of ImageNet's colors.

    As timm's mode `pixel`, but rounded to 8 bits: about 1 value in 25 is cut off at 0 or 255.
    """
    height, width = pixels.shape[:2]
    for _ in range(TRIES):
        area, aspect = height * width * random.uniform(*ERASED), math.exp(random.uniform(*ERASED_ASPECTS))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = random.integers(height - h + 1), random.integers(width - w + 1)
            noise = MEAN + STD * random.standard_normal((h, w, 3), np.float32)
            pixels = pixels.copy()
            pixels[top : top + h, left : left + w] = noise.round().clip(0, 255).astype(np.uint8)
            break
    return pixels

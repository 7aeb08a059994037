"""The operations of RandAugment, against numpy by hand, and how often and how strongly they are applied."""

import dataclasses
import math

import numpy as np
import pictures
import pytest
from PIL import Image

from mixln_jax.data.images import randaugment

PIXELS = pictures.pixels(40, 56)
BIG_VISION, TIMM = randaugment.parse('randaug(2,10)'), randaugment.parse('rand-m9-mstd0.5-inc1')
NAMES = ('autocontrast', 'equalize', 'invert', 'rotate', 'shear_x', 'shear_y')
NAMES += ('posterize', 'solarize', 'solarize_add', 'color', 'contrast', 'brightness', 'sharpness', 'shift_x', 'shift_y')


class Draws:
    """Random numbers that are all the same."""

    def __init__(self, value=0.25):
        self.value = value

    def random(self):
        return self.value


def applied(policy, name, share, pixels=PIXELS, draw=0.25):
    """Pixels after an operation of a magnitude of `share`."""
    operation, argument = policy.operations[(*NAMES, 'cutout').index(name)]
    return np.asarray(operation(Image.fromarray(pixels), argument(share, Draws(draw)), policy)).astype(int)


def blend(degenerate, factor, pixels=PIXELS):
    return np.clip(degenerate + factor * (pixels.astype(float) - degenerate), 0, 255)


def gray(pixels):
    """Luma of ITU-R 601."""
    return (pixels.astype(float) @ [0.299, 0.587, 0.114])[..., None]


@pytest.fixture(params=[BIG_VISION, TIMM], ids=['big_vision', 'timm'])
def policy(request):
    return request.param


class TestBoth:
    def test_invert(self, policy):
        np.testing.assert_array_equal(applied(policy, 'invert', 0.5), 255 - PIXELS.astype(int))

    def test_autocontrast(self, policy):
        dull = PIXELS // 3 + 40
        low, high = dull.min((0, 1)), dull.max((0, 1))
        wanted = (dull.astype(float) - low) * 255 / (high - low)
        assert np.abs(applied(policy, 'autocontrast', 0.5, dull) - wanted).max() <= 1

    def test_equalize(self, policy):
        """The cumulative histogram, as TensorFlow models and Pillow compute it."""
        wanted = np.empty(PIXELS.shape, int)
        for channel in range(3):
            histogram = np.bincount(PIXELS[..., channel].ravel(), minlength=256)
            step = (histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
            table = np.append(0, (np.cumsum(histogram) + step // 2) // step)[:256].clip(0, 255)
            if step // 2:  # Pillow begins with half a step
                table[0] = step // 2 // step
            wanted[..., channel] = table[PIXELS[..., channel]]
        assert np.abs(applied(policy, 'equalize', 0.5) - wanted).max() <= 1

    def test_solarize_add(self, policy):
        """110 x 0.5 on what is below 128."""
        wanted = np.where(PIXELS < 128, np.minimum(PIXELS.astype(int) + 55, 255), PIXELS)
        np.testing.assert_array_equal(applied(policy, 'solarize_add', 0.5), wanted)

    @pytest.mark.parametrize('draw, sign', [(0.25, 1), (0.75, -1)])
    def test_shear(self, policy, draw, sign):
        """Pixel (x, y) is that of (x + 0.15 y, y)."""
        found = applied(policy, 'shear_x', 0.5, draw=draw)
        smooth = np.linspace(0, 255, 56)[None, :, None] * np.ones((40, 1, 3))
        found = applied(policy, 'shear_x', 0.5, smooth.astype(np.uint8), draw)
        x, y = np.meshgrid(np.arange(56) + 0.5, np.arange(40) + 0.5)
        there = x + sign * 0.15 * y
        inside = (there > 2) & (there < 54)
        wanted = np.interp(there[inside], np.arange(56) + 0.5, smooth[0, :, 0])
        assert np.abs(found[..., 0][inside] - wanted).max() <= 4
        outside = (there < 0) | (there > 56)
        assert outside.any() and (found[outside] == policy.fill).all()

    def test_rotate(self, policy):
        """15 degrees around the center."""
        smooth = (np.linspace(0, 255, 41)[None, :, None] * np.ones((41, 1, 3))).astype(np.uint8)
        found = applied(policy, 'rotate', 0.5, smooth)[..., 0]
        x, y = np.meshgrid(np.arange(41) - 20.0, np.arange(41) - 20.0)
        middle = np.hypot(x, y) < 18
        wanted = (x * math.cos(math.radians(15)) - y * math.sin(math.radians(15)) + 20) * 255 / 40
        assert np.abs(found[middle] - wanted[middle]).max() <= 6


class TestBigVision:
    def test_operations(self):
        assert len(BIG_VISION.operations) == 16 and BIG_VISION.count == 2 and BIG_VISION.probability == 1
        assert BIG_VISION.fill == (128, 128, 128) and BIG_VISION.resample == Image.Resampling.NEAREST

    @pytest.mark.parametrize('share, bits', [(1.0, 4), (0.5, 2), (0.0, 1), (3.0, 8)])
    def test_posterize(self, share, bits):
        np.testing.assert_array_equal(
            applied(BIG_VISION, 'posterize', share), PIXELS.astype(int) >> 8 - bits << 8 - bits
        )

    @pytest.mark.parametrize('share, limit', [(0.5, 128), (1.0, 256), (0.0, 0)])
    def test_solarize(self, share, limit):
        wanted = np.where(limit > PIXELS, PIXELS, 255 - PIXELS)
        np.testing.assert_array_equal(applied(BIG_VISION, 'solarize', share), wanted)

    def test_blends(self):
        """By 1.9 at magnitude 10, by 0.1 at 0."""
        for share, factor in ((1.0, 1.9), (0.0, 0.1)):
            assert np.abs(applied(BIG_VISION, 'color', share) - blend(gray(PIXELS), factor)).max() <= 2
            assert np.abs(applied(BIG_VISION, 'brightness', share) - blend(0.0, factor)).max() <= 1
            level = 40 * 56 // 256  # number of pixels / 256: what was published, not the mean of the pixels
            assert np.abs(applied(BIG_VISION, 'contrast', share) - blend(level, factor)).max() <= 1

    def test_sharpness(self):
        smoothed = PIXELS.astype(float)
        kernel = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
        inner = sum(kernel[i, j] * PIXELS[i : i + 38, j : j + 54].astype(float) for i in range(3) for j in range(3))
        smoothed[1:-1, 1:-1] = inner
        assert np.abs(applied(BIG_VISION, 'sharpness', 1.0) - blend(smoothed, 1.9)).max() <= 2

    @pytest.mark.parametrize('name, axis', [('shift_x', 1), ('shift_y', 0)])
    def test_shifts(self, name, axis):
        """By 10 pixels at magnitude 1; what comes in is gray."""
        found = applied(BIG_VISION, name, 0.1)
        wanted = np.full(PIXELS.shape, 128)
        kept = [slice(None)] * 2
        kept[axis] = slice(None, -10)
        wanted[tuple(kept)] = np.roll(PIXELS, -10, axis)[tuple(kept)]
        np.testing.assert_array_equal(found, wanted)

    def test_cutout(self):
        """A square of 2 x 4 pixels around (0.25, 0.25) of the image, at magnitude 1."""
        wanted = PIXELS.astype(int)
        wanted[10 - 4 : 10 + 4, 14 - 4 : 14 + 4] = 128
        np.testing.assert_array_equal(applied(BIG_VISION, 'cutout', 0.1), wanted)
        np.testing.assert_array_equal(applied(BIG_VISION, 'cutout', 0.0), PIXELS)
        assert (applied(BIG_VISION, 'cutout', 1.0)[:40, :50] == 128).all()

    def test_level_0(self):
        """light1 of augreg: some operations change nothing, others as much as they can."""
        policy = randaugment.parse('randaug(2,0)')
        for name in ('rotate', 'shear_x', 'shift_x', 'cutout', 'solarize_add'):
            np.testing.assert_array_equal(applied(policy, name, policy.magnitude / 10), PIXELS)


class TestTimm:
    def test_operations(self):
        assert len(TIMM.operations) == 15 and TIMM.count == 2 and TIMM.probability == 0.5
        assert (TIMM.magnitude, TIMM.deviation) == (9, 0.5) and TIMM.fill == (124, 116, 104)

    @pytest.mark.parametrize('share, bits', [(0.9, 1), (1.0, 0), (0.0, 4)])
    def test_posterize(self, share, bits):
        np.testing.assert_array_equal(applied(TIMM, 'posterize', share), PIXELS.astype(int) >> 8 - bits << 8 - bits)

    @pytest.mark.parametrize('share, limit', [(0.9, 26), (1.0, 0), (0.0, 256)])
    def test_solarize(self, share, limit):
        wanted = np.where(limit > PIXELS, PIXELS, 255 - PIXELS)
        np.testing.assert_array_equal(applied(TIMM, 'solarize', share), wanted)

    def test_blends(self):
        for draw, factor in ((0.25, 1.81), (0.75, 0.19)):
            found = {name: applied(TIMM, name, 0.9, draw=draw) for name in ('color', 'contrast', 'brightness')}
            assert np.abs(found['color'] - blend(gray(PIXELS), factor)).max() <= 2
            assert np.abs(found['contrast'] - blend(round(gray(PIXELS).mean()), factor)).max() <= 2
            assert np.abs(found['brightness'] - blend(0.0, factor)).max() <= 1
        assert np.abs(applied(TIMM, 'brightness', 1.0, draw=0.75) - blend(0.0, 0.1)).max() <= 1

    @pytest.mark.parametrize('name, axis', [('shift_x', 1), ('shift_y', 0)])
    def test_shifts(self, name, axis):
        """By a share of the side: 0.45 x 2/9 = 10 %."""
        pixels = np.full((40, 50, 3), 200, np.uint8)
        found = applied(TIMM, name, 2 / 9, pixels)
        filled = (found == TIMM.fill).all(-1).all(1 - axis)
        assert filled.sum() == (5 if axis else 4) and filled[-1]

    def test_magnitudes(self, monkeypatch):
        """Normal around 9 with a deviation of 0.5, at most 10."""
        shares = []
        probe = (lambda image, *_: image, lambda share, random: shares.append(share))
        policy = dataclasses.replace(TIMM, operations=(probe,))
        for seed in range(2000):
            policy(PIXELS, np.random.default_rng(seed))
        shares = np.array(shares) * 10
        assert abs(len(shares) / 4000 - 0.5) < 4 * 0.5 / math.sqrt(4000)
        assert shares.max() == 10 and abs(np.median(shares) - 9) < 0.06
        below = shares[shares < 9]
        assert abs(math.sqrt(((below - 9) ** 2).mean()) - 0.5) < 0.04


def test_operations_are_drawn_alike():
    """Each of 16 as often, within 4 standard deviations."""
    counts = [0] * 16

    def probe(number):
        def count(image, *_):
            counts[number] += 1
            return image

        return count, lambda share, random: None

    policy = dataclasses.replace(BIG_VISION, operations=tuple(map(probe, range(16))))
    rng = np.random.default_rng(0)
    for _ in range(8000):
        policy(PIXELS[:2, :2], rng)
    assert sum(counts) == 16_000 and max(abs(count - 1000) for count in counts) < 4 * math.sqrt(1000 * 15 / 16)

"""What is seen of an image, against opencv, Pillow and numpy by hand, and against what 10,000 draws must have."""

import math
import pickle

import cv2
import numpy as np
import pictures
import pytest
from PIL import Image, ImageEnhance

from mixln_jax import config
from mixln_jax.data.images import augment, randaugment
from mixln_jax.system.errors import UsageError

PIXELS = pictures.pixels(90, 120)


def random(seed=0):
    return np.random.default_rng(seed)


def made(size=32, **keys):
    return augment.Augmentation(config.Images(**keys), size)


def assert_bits(a, b):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


class TestInceptionBox:
    def test_10_000_draws(self):
        """Area uniform in 5..100 %, aspect log-uniform in 3/4..4/3, place uniform: of the largest image the rounding to
        pixels is nothing, and only large areas are drawn again because they do not fit."""
        side, rng = 2000, random()
        boxes = np.array([augment.inception_box(side, side, 0.05, rng) for _ in range(10_000)])
        top, left, height, width = boxes.T
        assert (top >= 0).all() and (left >= 0).all()
        assert (top + height <= side).all() and (left + width <= side).all()
        area, aspect = height * width / side**2, np.log(width / height)
        assert area.min() > 0.0499 and area.max() <= 1 and area.max() > 0.98
        assert np.exp(aspect).min() > 0.7485 and np.exp(aspect).max() < 1.336
        small = area < 0.7  # all of these fit, whatever the aspect
        shares = np.histogram(area[small], 13, (0.05, 0.7))[0] / small.sum()
        assert np.abs(shares - 1 / 13).max() < 4 * math.sqrt(1 / 13 / small.sum())
        shares = np.histogram(aspect[small], 8, (math.log(3 / 4), math.log(4 / 3)))[0] / small.sum()
        assert np.abs(shares - 1 / 8).max() < 4 * math.sqrt(1 / 8 / small.sum())
        free = small & (height < side) & (width < side)
        for place, length in ((top, height), (left, width)):
            share = place[free] / (side - length[free])
            assert abs(share.mean() - 0.5) < 4 * 0.29 / math.sqrt(free.sum())
            assert abs(share.std() - 12**-0.5) < 0.01

    def test_areas_of_those_that_do_not_fit_are_drawn_again(self):
        """A share a fits if its aspect is within a..1/a: with the probability -log a / log 4/3, if that is below 1."""
        rng, a = random(1), np.linspace(0.05, 1, 10**5)
        fits = np.minimum(1, -np.log(a) / math.log(4 / 3))
        areas = [h * w / 500**2 for *_, h, w in (augment.inception_box(500, 500, 0.05, rng) for _ in range(10_000))]
        assert abs(np.mean(areas) - (a * fits).sum() / fits.sum()) < 4 * 0.25 / math.sqrt(10_000)

    def test_least_area(self):
        rng = random()
        areas = [h * w / 10**6 for *_, h, w in (augment.inception_box(1000, 1000, 0.6, rng) for _ in range(2000))]
        assert 0.599 < min(areas) < 0.61

    @pytest.mark.parametrize('height, width', [(1, 1), (1, 1000), (1000, 1), (2, 3), (10, 4000)])
    def test_of_any_shape(self, height, width):
        rng = random()
        for _ in range(50):
            top, left, h, w = augment.inception_box(height, width, 0.05, rng)
            assert h > 0 and w > 0 and 0 <= top <= height - h and 0 <= left <= width - w

    def test_of_an_image_too_long(self):
        assert augment.inception_box(100, 3000, 0.9, random()) == (0, 1433, 100, 133)
        assert augment.inception_box(3000, 100, 0.9, random()) == (1433, 0, 133, 100)


class TestTraining:
    def test_crop_by_opencv(self):
        rng = random(3)
        top, left, height, width = augment.inception_box(90, 120, 0.05, rng)
        crop = np.ascontiguousarray(PIXELS[top : top + height, left : left + width])
        wanted = cv2.resize(crop, (32, 32), interpolation=cv2.INTER_LINEAR)
        assert_bits(made(flip=0.0).training(PIXELS, random(3)), wanted)
        assert_bits(made(flip=1.0).training(PIXELS, random(3)), wanted[:, ::-1])

    def test_crop_by_hand(self):
        """Bilinear, without antialiasing, between the centers of pixels."""
        box = (5, 7, 50, 40)
        found = augment.resize(PIXELS, box, 20, 'bilinear').astype(float)
        crop = PIXELS[5:55, 7:47].astype(float)
        y, x = ((np.arange(20) + 0.5) * side / 20 - 0.5 for side in (50, 40))
        y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
        fy, fx = (y - y0)[:, None, None], (x - x0)[None, :, None]
        y1, x1 = np.minimum(y0 + 1, 49), np.minimum(x0 + 1, 39)
        upper = crop[y0][:, x0] * (1 - fx) + crop[y0][:, x1] * fx
        lower = crop[y1][:, x0] * (1 - fx) + crop[y1][:, x1] * fx
        assert np.abs(found - (upper * (1 - fy) + lower * fy)).max() <= 1

    def test_bicubic_by_pillow(self):
        rng = random(3)
        top, left, height, width = augment.inception_box(90, 120, 0.05, rng)
        box = (left, top, left + width, top + height)
        wanted = Image.fromarray(PIXELS).crop(box).resize((32, 32), Image.Resampling.BICUBIC)
        assert_bits(made(flip=0.0, interpolation='bicubic').training(PIXELS, random(3)), wanted)

    def test_no_crop(self):
        assert_bits(made(crop='none', flip=0.0).training(PIXELS, random()), made().evaluation(PIXELS))

    def test_flips(self):
        """About half of 10,000, within 4 standard deviations; of 0 and 1, none and all."""
        ramp = np.repeat(np.arange(8, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
        for share, low, high in ((0.5, 0.48, 0.52), (0.0, 0, 0), (1.0, 1, 1), (0.1, 0.088, 0.112)):
            one = made(size=8, crop='none', eval_crop=1.0, flip=share)
            found = [
                one.training(ramp, augment.generator(0, epoch, number))[0, 0, 0] == 7
                for epoch in range(10)
                for number in range(1000)
            ]
            assert low <= np.mean(found) <= high

    def test_policies_are_applied(self):
        plain, distorted = made(), made(policy='randaug(2,10)')
        differ = [
            (plain.training(PIXELS, random(seed)) != distorted.training(PIXELS, random(seed))).any()
            for seed in range(50)
        ]
        assert np.mean(differ) > 0.9

    def test_every_input_stays(self):
        before = PIXELS.copy()
        one = made(policy='randaug(2,10)', color_jitter=0.4, erasing=1.0)
        for seed in range(20):
            seen = one.training(PIXELS, random(seed))
            assert seen.shape == (32, 32, 3) and seen.dtype == np.uint8
        assert_bits(PIXELS, before)

    def test_of_seed_epoch_and_number_alone(self):
        one = made(policy='rand-m9-mstd0.5-inc1', color_jitter=0.4, erasing=0.5)
        again = pickle.loads(pickle.dumps(one))
        places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 2, 3), (2**32 - 1, 2**20, 2**40)]
        found = [one.training(PIXELS, augment.generator(*place)) for place in places]
        for place, before in [*zip(places, found, strict=True)][::-1]:
            assert_bits(again.training(PIXELS, augment.generator(*place)), before)
        assert len({image.tobytes() for image in found}) == len(places)

    def test_apart_from_the_order_of_examples(self):
        """Whose numbers come from (seed, epoch)."""
        order = np.random.SeedSequence([3, 5]).generate_state(4)
        variation = augment.generator(3, 5, 0).bit_generator.seed_seq.generate_state(4)
        assert not {*order.tolist()} & {*variation.tolist()}


class TestEvaluation:
    def test_resized_and_cut_by_opencv(self):
        """The smaller side of 90 becomes 256, the other 341; opencv resizes, 224 in the middle stay."""
        large = cv2.resize(PIXELS, (341, 256), interpolation=cv2.INTER_LINEAR)
        assert_bits(made(size=224).evaluation(PIXELS), large[16:240, 58:282])

    def test_areas_where_it_becomes_smaller(self):
        """45 x 60 of 90 x 120: means of 2 x 2 pixels, by hand."""
        means = PIXELS.reshape(45, 2, 60, 2, 3).mean((1, 3))
        found = made(size=45, eval_crop=1.0).evaluation(PIXELS).astype(float)
        assert np.abs(found - means[:, 7:52]).max() <= 0.5

    def test_bicubic_by_pillow(self):
        wanted = Image.fromarray(PIXELS).resize((49, 37), Image.Resampling.BICUBIC).crop((8, 2, 40, 34))
        assert_bits(made(interpolation='bicubic').evaluation(PIXELS), wanted)

    def test_portrait(self):
        turned = np.ascontiguousarray(PIXELS.transpose(1, 0, 2))
        found = made().evaluation(turned).astype(int)
        assert np.abs(found - made().evaluation(PIXELS).transpose(1, 0, 2)).max() <= 1

    @pytest.mark.parametrize('side', [8, 28, 32])
    def test_of_the_same_size_nothing_changes(self, side):
        square = pictures.pixels(side, side)
        assert_bits(made(size=side, eval_crop=1.0).evaluation(square), square)

    @pytest.mark.parametrize('shape', [(1, 1), (1, 70_000), (70_000, 1), (3, 5)])
    def test_of_any_shape(self, shape):
        """A line of 70,000 pixels would be 18 million x 256 if it were resized as a whole."""
        assert made(size=224).evaluation(np.zeros((*shape, 3), np.uint8)).shape == (224, 224, 3)


class TestJitter:
    def test_by_pillow(self):
        rng = random(5)
        image = Image.fromarray(PIXELS)
        for number in rng.permutation(3):
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[number]
            image = kind(image).enhance(rng.uniform(0.6, 1.4))
        assert_bits(augment.jitter(PIXELS, 0.4, random(5)), image)

    def test_brightness_by_hand(self, monkeypatch):
        monkeypatch.setattr(augment, 'ENHANCEMENTS', (ImageEnhance.Brightness,))
        rng = random(5)
        rng.permutation(1)
        factor = rng.uniform(0.6, 1.4)
        found = augment.jitter(PIXELS, 0.4, random(5)).astype(float)
        assert abs(factor - 1) > 0.05 and np.abs(found - np.clip(PIXELS * factor, 0, 255)).max() <= 1


class TestErasing:
    def rectangles(self, count=3000):
        """Height, width and pixels of what was erased of white images of 100 x 100."""
        white = np.full((100, 100, 3), 255, np.uint8)
        for seed in range(count):
            changed = augment.erase(white, random(seed)) != white
            rows, columns = (np.flatnonzero(changed.any(axis)) for axis in ((1, 2), (0, 2)))
            yield rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]

    def test_draws(self):
        height, width = np.array([*self.rectangles()]).T
        area, aspect = height * width / 10**4, height / width
        assert area.min() > 0.015 and area.max() < 0.345 and abs(area.mean() - 0.172) < 0.01
        assert 0.25 < aspect.min() < 0.4 and 2.5 < aspect.max() < 4 and abs(np.log(aspect).mean()) < 0.06

    def test_noise(self):
        """Normal with the mean and deviation of ImageNet, cut off at 0 and 255."""
        gray = np.full((200, 200, 3), 7, np.uint8)
        noise = np.concatenate(
            [e[e.any(-1) & (e != 7).any(-1)] for e in (augment.erase(gray, random(i)) for i in range(20))]
        )
        normal = np.random.default_rng(1).standard_normal((len(noise), 3))
        wanted = (normal * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]).clip(0, 1) * 255
        assert np.abs(noise.mean(0) - wanted.mean(0)).max() < 0.5 and np.abs(noise.std(0) - wanted.std(0)).max() < 0.5

    def test_share(self):
        one = made(crop='none', flip=0.0, erasing=0.25)
        plain = one.evaluation(PIXELS)
        found = [(one.training(PIXELS, random(seed)) != plain).any() for seed in range(4000)]
        assert abs(np.mean(found) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)


def test_policies_have_names():
    assert randaugment.parse('none') is None
    for text in (
        'randaug',
        'randaug(2)',
        'randaug(2,100)',
        'rand-m9',
        'rand-m11-mstd0.5-inc1',
        'rand-m9-mstd0.5-inc0',
        '',
    ):
        with pytest.raises(UsageError, match='config.data.images.policy=.* is not none, randaug'):
            made(policy=text)

"""Pixels of image files: every kind becomes RGB of 8 bits; what is no image is named."""

import io
import struct
import zlib

import numpy as np
import pictures
import pytest
from PIL import Image

from mixln_jax.data.images.decode import decode
from mixln_jax.system.errors import DataError

RGB = pictures.pixels()  # [24, 32, 3]
GRAY = RGB[..., 0]
MOST = 10**6


def of(*args, **options):
    return decode(pictures.encoded(*args, **options), MOST)


def as_rgb(gray):
    return np.repeat(gray[..., None], 3, axis=2)


class TestKinds:
    @pytest.mark.parametrize('format', ['PNG', 'BMP', 'TIFF', 'PPM'])
    def test_without_loss(self, format):
        found = of(RGB, format)
        assert found.dtype == np.uint8 and found.flags.writeable
        np.testing.assert_array_equal(found, RGB)

    @pytest.mark.parametrize('options', [{}, {'progressive': True}, {'subsampling': 0}, {'subsampling': 2}])
    def test_jpeg(self, options):
        content = pictures.encoded(RGB, 'JPEG', quality=90, **options)
        found = decode(content, MOST)
        wanted = np.asarray(Image.open(io.BytesIO(content)).convert('RGB'))
        assert found.shape == (24, 32, 3) and found.dtype == np.uint8
        assert np.abs(found.astype(int) - wanted).max() <= 4  # builds of libjpeg-turbo round in different ways

    def test_gray(self):
        np.testing.assert_array_equal(of(GRAY), as_rgb(GRAY))
        found = of(GRAY, 'JPEG', quality=95)
        assert found.shape == (24, 32, 3) and (found == found[..., :1]).all()
        assert np.abs(found[..., 0].astype(int) - GRAY).max() < 20

    def test_cmyk(self):
        """White paper, and ink that keeps red alone, as decoders of print files see it."""
        ink = np.zeros((16, 16, 4), np.uint8)
        ink[:8, :, 1:3] = 255  # magenta and yellow are red
        found = of(Image.fromarray(ink, 'CMYK'), 'JPEG', quality=100).astype(int)
        assert found.shape == (16, 16, 3)
        assert np.abs(found[2, 2] - (255, 0, 0)).max() < 12 and np.abs(found[13, 2] - 255).max() < 12

    @pytest.mark.parametrize('kind', ['I;16', 'I;16B'])
    def test_gray_of_16_bits(self, kind):
        deep = np.linspace(0, 65535, 24 * 32).reshape(24, 32)
        image = Image.fromarray(deep.astype('<u2' if kind == 'I;16' else '>u2'))
        found = of(image, 'PNG' if kind == 'I;16' else 'TIFF')
        np.testing.assert_array_equal(found, as_rgb((deep.astype(int) // 256).astype(np.uint8)))

    def test_color_of_16_bits(self):
        """A PNG of 16 bits, which Pillow reads but does not write."""
        rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in RGB.astype(int) * 257)

        def chunk(kind, body):
            return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

        head = chunk(b'IHDR', struct.pack('>IIBBBBB', 32, 24, 16, 2, 0, 0, 0))
        content = b'\x89PNG\r\n\x1a\n' + head + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
        np.testing.assert_array_equal(decode(content, MOST), RGB)

    def test_palettes(self):
        image = Image.fromarray(RGB).quantize(16)
        wanted = np.asarray(image.convert('RGB'))
        np.testing.assert_array_equal(of(image), wanted)
        np.testing.assert_array_equal(of(image, 'GIF'), wanted)
        np.testing.assert_array_equal(of(image, transparency=3), wanted)

    @pytest.mark.parametrize('mode', ['RGBA', 'LA'])
    def test_transparency_is_left_out(self, mode):
        alpha = np.arange(24 * 32, dtype=np.uint8).reshape(24, 32, 1)
        color = RGB if mode == 'RGBA' else GRAY[..., None]
        found = of(Image.fromarray(np.concatenate([color, alpha], axis=2), mode))
        np.testing.assert_array_equal(found, RGB if mode == 'RGBA' else as_rgb(GRAY))

    def test_black_and_white(self):
        bits = GRAY > 100
        np.testing.assert_array_equal(of(Image.fromarray(bits)), as_rgb(bits.astype(np.uint8) * 255))

    @pytest.mark.parametrize('kind', [np.float32, np.int32])
    def test_no_known_range(self, kind):
        with pytest.raises(DataError, match='32 bits in each pixel have no known range'):
            of(Image.fromarray(GRAY.astype(kind)), 'TIFF')


TURNS = {  # EXIF's orientations: how the stored pixels become upright, by TIFF 6.0, page 36
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize('format', ['PNG', 'JPEG'])
@pytest.mark.parametrize('orientation', TURNS)
def test_upright_as_exif_says(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = pictures.encoded(RGB, format, exif=exif)
    wanted = TURNS[orientation](decode(pictures.encoded(RGB, format), MOST))
    found = decode(content, MOST)
    assert found.shape == wanted.shape
    assert np.abs(found.astype(int) - wanted).max() <= (0 if format == 'PNG' else 4)


def test_exif_without_sense():
    content = pictures.encoded(RGB, 'JPEG')
    odd = content[:2] + b'\xff\xe1\x00\x10Exif\0\0' + b'garbage!' + content[2:]
    assert decode(odd, MOST).shape == (24, 32, 3)


class TestBad:
    @pytest.mark.parametrize('format', ['JPEG', 'PNG', 'BMP'])
    def test_cut_short(self, format):
        content = pictures.encoded(pictures.pixels(64, 64), format)
        for size in (len(content) // 2, len(content) * 9 // 10, 30):
            with pytest.raises(DataError, match='damaged image|not an image') as raised:
                decode(content[:size], MOST)
            assert '\n' not in str(raised.value)

    @pytest.mark.parametrize('content', [b'', b'hello', b'\xff\xd8', b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', bytes(999)])
    def test_no_image(self, content):
        with pytest.raises(DataError, match='not an image|damaged image'):
            decode(content, MOST)

    def test_programs_are_no_pictures(self):
        with pytest.raises(DataError, match='not an image that can be read'):
            decode(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n', MOST)

    def test_what_decoders_only_warn_of(self):
        """Bytes between the segments of a JPEG, as some of ImageNet's have."""
        content = pictures.encoded(RGB, 'JPEG')
        place = content.index(b'\xff\xdb')
        np.testing.assert_allclose(
            decode(content[:place] + b'\0\0\0' + content[place:], MOST).astype(int),
            decode(content, MOST).astype(int),
            atol=4,
        )

    @pytest.mark.parametrize('format', ['JPEG', 'PNG', 'GIF', 'BMP'])
    def test_too_many_pixels(self, format):
        content = pictures.encoded(RGB, format)
        assert decode(content, 24 * 32).shape == (24, 32, 3)
        with pytest.raises(DataError, match='32 x 24 pixels are more than config.data.max_pixels=767; make the image'):
            decode(content, 24 * 32 - 1)

    @pytest.mark.parametrize('format', ['JPEG', 'PNG'])
    def test_refused_by_the_header_alone(self, format):
        """A header of 60,000 x 60,000 pixels: decoding it would take 10 GB."""
        content = bytearray(pictures.encoded(RGB, format))
        if format == 'JPEG':
            place = content.index(b'\xff\xc0') + 5
            struct.pack_into('>HH', content, place, 60_000, 60_000)
        else:
            struct.pack_into('>II', content, 16, 60_000, 60_000)
            struct.pack_into('>I', content, 29, zlib.crc32(content[12:29]))
        with pytest.raises(DataError, match='60,000 x 60,000 pixels are more than'):
            decode(bytes(content), 10**8)

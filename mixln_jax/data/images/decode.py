"""Files of images as pixels [H, W, 3] of 8 bits, RGB."""

import io

import cv2
import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from mixln_jax.system.errors import DataError, reason

# Formats that Pillow decodes by itself; others, such as EPS, start programs or are no pictures.
FORMATS = ('JPEG', 'PNG', 'BMP', 'GIF', 'WEBP', 'TIFF', 'PPM', 'JPEG2000')
SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.ppm', '.pgm', '.pbm', '.jp2', '.j2k')
HEAD = 2**16  # bytes of a JPEG in which its EXIF data begins
DEEP = ('I;16', 'I;16L', 'I;16B', 'I;16N')  # gray of 16 bits

cv2.setNumThreads(1)  # threads and processes that read batches have the cores already
Image.MAX_IMAGE_PIXELS = None  # `decode` refuses large images itself


def decode(content: bytes, max_pixels: int) -> np.ndarray:
    """Returns the pixels [H, W, 3] uint8 of an image file, upright as its EXIF data says.

    JPEG is decoded by libjpeg-turbo, all else by Pillow, which also judges JPEGs that libjpeg-turbo warns of. Gray,
    palettes and CMYK become RGB, 16 bits become 8; transparency is left out, as torchvision and TensorFlow do. Of
    several pictures in a file the first one counts.

    Raises DataError, which says what is wrong: not an image, cut short, damaged, or more than `max_pixels`, which the
    header tells before anything is decoded.
    """
    if content[:2] == b'\xff\xd8' and (pixels := _fast(content, max_pixels)) is not None:
        return pixels
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check_size(image.height, image.width, max_pixels)
            return _rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError('not an image that can be read' if content else 'not an image: the file is empty') from None
    except Exception as error:  # of many kinds, among them SyntaxError and struct.error
        raise DataError(f'damaged image: {reason(error)}') from error


def _fast(content: bytes, max_pixels: int) -> np.ndarray | None:
    """Returns the pixels of a JPEG; None if Pillow has to decode it, or to say what is wrong with it."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content, strict=False)
        _check_size(height, width, max_pixels)
        if colors in ('CMYK', 'YCCK') or _is_turned(content):
            return None
        return simplejpeg.decode_jpeg(content)
    except (ValueError, KeyError):  # KeyError: a header without subsampling
        return None


def _is_turned(content: bytes) -> bool:
    """Returns whether EXIF data says that the camera was not upright."""
    if content.find(b'Exif\0\0', 0, HEAD) < 0:
        return False
    try:
        with Image.open(io.BytesIO(content), formats=('JPEG',)) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:
        return True  # Pillow will say what is wrong


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise DataError(
            f'{width:,} x {height:,} pixels are more than config.data.max_pixels={max_pixels:,}; make the image smaller'
        )


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode in ('I', 'F'):
        raise DataError('32 bits in each pixel have no known range; store 8 or 16 bits')
    if image.mode in DEEP:
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.array(image.convert('RGB'))

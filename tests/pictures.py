"""Small pictures and sets of them, made with numpy and Pillow."""

import gzip
import io
import struct
import tarfile
import zipfile

import numpy as np
from PIL import Image

CLASSES = ('cat', 'dog', 'owl')
COLORS = {'cat': (220, 30, 30), 'dog': (30, 220, 30), 'owl': (30, 30, 220)}


def pixels(height=24, width=32, seed=0):
    """Smooth random pixels [H, W, 3] uint8, so that JPEG changes them little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image, format='PNG', **options):
    """Returns the file of pixels, or of a Pillow image."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def plain(name, height=24, width=32):
    """Returns a JPEG of the color of a class, which tells the class from the pixels."""
    return encoded(np.full((height, width, 3), COLORS[name], np.uint8), 'JPEG', quality=95)


def set_of(counts=(5, 4, 3), prefix=''):
    """Returns {name: content} of a set, each image in the color of its class."""
    return {
        f'{prefix}{name}/{name}{number}.jpg': plain(name, 20 + number, 30)
        for name, count in zip(CLASSES, counts, strict=True)
        for number in range(count)
    }


def write_folder(root, content):
    for name, body in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(body)
    return root


def write_zip(path, content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, 'w', method) as archive:
        for name, body in content.items():
            archive.writestr(name, body)
    return path


def tar_of(content):
    """Returns a tar file of {name: content}."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        for name, body in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return file.getvalue()


def idx_of(array):
    """Returns an IDX file of an array of bytes."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()


def write_idx(root, count=60, packed=True, **others):
    """Writes a set like MNIST: 10 classes, 6 x 5 pixels, half as many for validation; returns its arrays by name."""
    rng, made = np.random.default_rng(0), {}
    for prefix, size in (('train', count), ('t10k', count // 2)):
        made[f'{prefix}-images-idx3-ubyte'] = rng.integers(0, 256, (size, 6, 5), np.uint8)
        made[f'{prefix}-labels-idx1-ubyte'] = (np.arange(size) % 10).astype(np.uint8)
    for name, array in (made | others).items():
        body = array if isinstance(array, bytes) else idx_of(array)
        (root / f'{name}{".gz" * packed}').write_bytes(gzip.compress(body) if packed else body)
    return made

"""Small images in memory: IDX files (the MNIST family), .npz files and scikit-learn's digits."""

import math
import pathlib
import zipfile
from typing import Any

import numpy as np
from isal import igzip

from mixln_jax.system import files
from mixln_jax.system.errors import DataError, reading

LARGEST = 4 * 10**9  # bytes of pixels in memory
IDX = {'train': 'train', 'validation': 't10k'}  # the first part of the names of a split's files
KINDS, RANKS = ('images', 'labels'), (3, 1)
ARRAYS = {  # names of the arrays of images and of labels in an npz file, for each split
    ('x_train', 'y_train'): 'train',
    ('x_test', 'y_test'): 'validation',
    ('images', 'labels'): 'train',
}
UNSIGNED_BYTE = 8  # the type in an IDX file's magic number

Arrays = tuple[np.ndarray, np.ndarray]  # images [n, H, W] or [n, H, W, 3] uint8, labels [n] int64


def idx(folder: str) -> dict[str, tuple[Arrays, str]]:
    """Returns {split: (arrays, the file of its images)} of IDX files, which may be gzipped.

    Their names are train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte,
    with `.` in place of the second `-` in some sets, each with or without `.gz`. t10k is the split validation.

    Raises DataError, naming the file: none in the folder; images without labels; a wrong magic number or length; images
    and labels of different number.
    """
    if not folder:
        raise DataError('config.data.path is empty; this source needs a folder of IDX files')
    root, made = pathlib.Path(folder).expanduser(), dict[str, tuple[Arrays, str]]()
    with reading(f'config.data.path={folder}', DataError):
        present = {path.name for path in root.iterdir()}
    for split, prefix in IDX.items():
        pair = []
        for kind, rank in zip(KINDS, RANKS, strict=True):
            stem = f'{prefix}-{kind}'
            names = [f'{stem}{mark}idx{rank}-ubyte{end}' for mark in '-.' for end in ('', '.gz')]
            pair.append(next((name for name in names if name in present), None))
        if not any(pair):
            continue
        for name, kind in zip(pair, KINDS, strict=True):
            if not name:
                raise DataError(f'{root}: there is a file of {split}, but no {prefix}-{kind}-idx*-ubyte')
        names = [str(root / str(name)) for name in pair]
        images, labels = (_read_idx(name, rank) for name, rank in zip(names, RANKS, strict=True))
        made[split] = _checked(images, labels, *names), names[0]
    if 'train' not in made:
        raise DataError(f'{root}: no IDX files, such as train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz')
    return made


def _read_idx(path: str, rank: int) -> np.ndarray:
    """Returns the array of an IDX file: a magic number, the sizes of `rank` dimensions, then the bytes."""
    files.regular(path, DataError)
    with reading(path, DataError, 'damaged'), (igzip.open if path.endswith('.gz') else open)(path, 'rb') as file:
        head = file.read(4 + 4 * rank)
        magic = head[:4].hex()
        if head[:4] != bytes([0, 0, UNSIGNED_BYTE, rank]) or len(head) < 4 + 4 * rank:
            raise DataError(
                f'{path}: the magic number of an IDX file of {rank} dimensions of bytes is 0000080{rank}, not '
                f'{magic or "nothing"}'
            )
        shape = tuple(int(size) for size in np.frombuffer(head[4:], '>u4'))
        if (count := math.prod(shape)) > LARGEST:
            raise DataError(f'{path}: {count:,} bytes are too many for memory; write the images to a folder')
        content = file.read(count + 1)
    if len(content) != count:
        there = f'{len(content):,}' if len(content) < count else 'more'
        raise DataError(f'{path}: {" x ".join(map(str, shape))} bytes are {count:,}, but there are {there}')
    return np.frombuffer(content, np.uint8).reshape(shape)


def npz(path: str, key: str = 'config.data.path') -> dict[str, tuple[Arrays, str]]:
    """Returns {split: (arrays, the file)} of an .npz file with x_train and y_train, and x_test and y_test for
    validation, as Keras has them, or with images and labels, all for training.

    Raises DataError, naming file and array: none of them; images that are not uint8 of [n, H, W] or [n, H, W, 1 or 3];
    labels that are not whole numbers of [n]; more than fits into memory; pickled objects.
    """
    if not path:
        raise DataError(f'{key} is empty; this source needs an .npz file')
    where = pathlib.Path(path).expanduser()
    try:
        files.regular(where, DataError)
    except FileNotFoundError:
        raise DataError(f'{key}={path}: there is no such file') from None
    made: dict[str, tuple[Arrays, str]] = {}
    with reading(where, DataError, 'not a readable .npz file'), zipfile.ZipFile(where) as archive:
        present = {name.removesuffix('.npy') for name in archive.namelist()}
        for names, split in ARRAYS.items():
            if split not in made and present.issuperset(names):
                images, labels = (_read_array(archive, name, str(where)) for name in names)
                image_name, label_name = (f'{where}: {name}' for name in names)
                made[split] = _checked(images, labels, image_name, label_name), str(where)
    if 'train' not in made:
        raise DataError(f'{where}: no arrays x_train and y_train, or images and labels ({_listed(present)})')
    return made


def _read_array(archive: zipfile.ZipFile, name: str, path: str) -> np.ndarray:
    """Returns an array, after a look at its header: what a zip file says of its sizes may be wrong."""
    with archive.open(f'{name}.npy') as file:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
    if dtype.hasobject:
        raise DataError(f'{path}: {name} holds Python objects, which are never loaded')
    if (count := math.prod(shape) * dtype.itemsize) > LARGEST:
        raise DataError(f'{path}: {name} has {count:,} bytes, too many for memory; write the images to a folder')
    with archive.open(f'{name}.npy') as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def digits() -> dict[str, tuple[Arrays, str]]:
    """Returns {'train': (arrays, name)} of the 1,797 digits of 8 x 8 pixels that come with scikit-learn. Their 17
    levels become 0 to 255.

    Raises DataError without scikit-learn.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise DataError('config.data.source=digits comes with scikit-learn: pip install scikit-learn') from None
    images, labels = datasets.load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    return {'train': ((pixels, labels.astype(np.int64)), 'digits')}


def _checked(images: np.ndarray, labels: np.ndarray, images_name: str, labels_name: str) -> Arrays:
    """Returns images and labels in the shapes of Arrays. Raises DataError for others."""
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)):
        raise DataError(
            f'{images_name}: images are uint8 of [n, H, W] or [n, H, W, 1 or 3], not {images.dtype} of '
            f'{list(images.shape)}'
        )
    if not images.size:
        raise DataError(f'{images_name}: there are no pixels in {list(images.shape)}')
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f'{labels_name}: labels are whole numbers of [n], not {labels.dtype} of {list(labels.shape)}')
    if len(images) != len(labels):
        raise DataError(f'{images_name}: {len(images):,} images, but {len(labels):,} labels in {labels_name}')
    return images, labels.astype(np.int64)


def _listed(names: Any) -> str:
    shown = sorted(names)[:8]
    return f'there is {", ".join(shown)}' if shown else 'it is empty'

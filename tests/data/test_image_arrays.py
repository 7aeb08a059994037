"""IDX files, .npz files and digits: what they hold, and what is wrong with them."""

import gzip
import io
import struct
import sys
import zipfile

import numpy as np
import pictures
import pytest

from mixln_jax import config
from mixln_jax.data.images import sources
from mixln_jax.system.errors import DataError, UsageError

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (50, 6, 5), np.uint8), (np.arange(50) % 3).astype(np.int32)


def opened(source, path='', split='train', held_out=0.05, validation='', **images):
    data = config.Data(
        source=source, path=str(path), validation_path=validation, held_out=held_out, images=config.Images(**images)
    )
    return sources.open_source(data, split)


def assert_holds(source, images, labels):
    found = source.read(range(len(source)))
    np.testing.assert_array_equal([image for image, _ in found], images)
    assert [label for _, label in found] == labels.tolist()


BLANK = np.zeros((60, 6, 5), np.uint8)


class TestIdx:
    @pytest.mark.parametrize('packed', [False, True])
    def test_arrays(self, tmp_path, packed):
        made = pictures.write_idx(tmp_path, packed=packed)
        for split, prefix in (('train', 'train'), ('validation', 't10k')):
            source = opened('idx', tmp_path, split)
            assert_holds(source, made[f'{prefix}-images-idx3-ubyte'], made[f'{prefix}-labels-idx1-ubyte'])
            assert source.classes == tuple('0123456789')
            end = '.gz' * packed
            assert source.origin(3) == f'{tmp_path}/{prefix}-images-idx3-ubyte{end}, image 3'
        with pytest.raises(UsageError, match='config.data.source=idx has no split all, only train, validation'):
            opened('idx', tmp_path, 'all')

    def test_names_with_a_dot(self, tmp_path):
        pictures.write_idx(tmp_path, packed=False)
        for path in tmp_path.iterdir():
            path.rename(str(path).replace('-idx', '.idx'))
        assert len(opened('idx', tmp_path)) == 60

    def test_training_alone(self, tmp_path):
        made = pictures.write_idx(tmp_path)
        for path in tmp_path.glob('t10k*'):
            path.unlink()
        train, held = opened('idx', tmp_path), opened('idx', tmp_path, 'validation')
        assert len(train) + len(held) == 60 == len(opened('idx', tmp_path, 'all')) and len(held) == 20
        number = int(held.origin(0).rpartition(' ')[2])
        np.testing.assert_array_equal(held.read([0])[0][0], made['train-images-idx3-ubyte'][number])

    IMAGES = 'train-images-idx3-ubyte'
    BAD = {
        'magic': (IMAGES, b'\0\0\x08\x01' + bytes(99), 'is 00000803, not 00000801'),
        'type': (IMAGES, b'\0\0\x0d\x03' + bytes(99), 'is 00000803, not 00000d03'),
        'empty': (IMAGES, b'', 'is 00000803, not nothing'),
        'header': (IMAGES, b'\0\0\x08\x03\0\0', 'is 00000803'),
        'short': (
            IMAGES,
            pictures.idx_of(BLANK)[:-1],
            '1,800, but there are 1,799',
        ),
        'long': (IMAGES, pictures.idx_of(BLANK) + b'\0', '60 x 6 x 5 bytes are 1,800, but there are more'),
        'huge': (IMAGES, b'\0\0\x08\x03' + b'\xff' * 12, 'bytes are too many for memory'),
        'fewer': (IMAGES, pictures.idx_of(BLANK[:59]), '59 images, but 60 labels in .*train-labels'),
        'none': (IMAGES, pictures.idx_of(BLANK[:0]), 'there are no pixels'),
        'label': (
            't10k-labels-idx1-ubyte',
            pictures.idx_of(np.full(30, 10, np.uint8)),
            'has the label 10, outside 0 to 9',
        ),
        'one class': ('train-labels-idx1-ubyte', pictures.idx_of(np.zeros(60, np.uint8)), 'of the class 0; two'),
        'ranks': ('train-labels-idx1-ubyte', pictures.idx_of(np.zeros((60, 1), np.uint8)), 'is 00000801, not 00000802'),
    }

    @pytest.mark.parametrize('name', BAD)
    @pytest.mark.parametrize('packed', [False, True])
    def test_bad(self, tmp_path, name, packed):
        file, body, told = self.BAD[name]
        pictures.write_idx(tmp_path, packed=packed, **{file: body})
        with pytest.raises(DataError, match=told) as raised:
            opened('idx', tmp_path)
        assert str(tmp_path) in str(raised.value) and '-ubyte' in str(raised.value)

    def test_missing_files(self, tmp_path):
        with pytest.raises(DataError, match='no IDX files, such as train-images-idx3-ubyte.gz'):
            opened('idx', tmp_path)
        pictures.write_idx(tmp_path)
        (tmp_path / 'train-labels-idx1-ubyte.gz').unlink()
        with pytest.raises(DataError, match='there is a file of train, but no train-labels-idx'):
            opened('idx', tmp_path)
        with pytest.raises(DataError, match='config.data.path=.*gone: cannot be read: No such file'):
            opened('idx', tmp_path / 'gone')

    def test_damaged_gzip(self, tmp_path):
        pictures.write_idx(tmp_path)
        path = tmp_path / 'train-images-idx3-ubyte.gz'
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(DataError, match='train-images-idx3-ubyte.gz: '):
            opened('idx', tmp_path)

    def test_a_bomb_is_not_unpacked(self, tmp_path):
        bomb = pictures.idx_of(np.zeros((60, 6, 5), np.uint8)) + bytes(10**8)
        pictures.write_idx(tmp_path, **{'train-images-idx3-ubyte': bomb})
        with pytest.raises(DataError, match='bytes are 1,800, but there are more'):
            opened('idx', tmp_path)


class TestNpz:
    def test_of_keras(self, tmp_path):
        np.savez(tmp_path / 'a.npz', x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:9], y_test=LABELS[:9, None])
        assert_holds(opened('npz', tmp_path / 'a.npz'), IMAGES, LABELS)
        assert_holds(opened('npz', tmp_path / 'a.npz', 'validation'), IMAGES[:9], LABELS[:9])

    def test_images_and_labels(self, tmp_path):
        color = np.repeat(IMAGES[..., None], 3, axis=3)
        np.savez_compressed(tmp_path / 'a.npz', images=color, labels=LABELS)
        np.savez_compressed(tmp_path / 'b.npz', images=color[:4], labels=LABELS[:4])
        train, held = opened('npz', tmp_path / 'a.npz'), opened('npz', tmp_path / 'a.npz', 'validation')
        assert len(train) == 30 and len(held) == 20
        held = opened('npz', tmp_path / 'a.npz', 'validation', validation=str(tmp_path / 'b.npz'))
        assert_holds(held, color[:4], LABELS[:4])
        assert len(opened('npz', tmp_path / 'a.npz', validation=str(tmp_path / 'b.npz'))) == 50

    def test_one_channel(self, tmp_path):
        np.savez(tmp_path / 'a.npz', images=IMAGES[..., None], labels=LABELS)
        assert_holds(opened('npz', tmp_path / 'a.npz', 'all'), IMAGES, LABELS)

    def test_equal_images_are_in_the_same_split(self, tmp_path):
        np.savez(tmp_path / 'a.npz', images=np.concatenate([IMAGES, IMAGES]), labels=np.tile(LABELS, 2))
        sides = [opened('npz', tmp_path / 'a.npz', split) for split in ('train', 'validation')]
        train, held = ({image.tobytes() for image, _ in side.read(range(len(side)))} for side in sides)
        assert train and held and not train & held

    BAD = {
        'arrays': (dict(x=IMAGES), 'no arrays x_train and y_train, or images and labels .there is x'),
        'no labels': (dict(images=IMAGES), 'no arrays x_train and y_train'),
        'floats': (dict(images=IMAGES / 255, labels=LABELS), 'images are uint8 of .n, H, W. .* not float64'),
        'shape': (dict(images=IMAGES[0], labels=LABELS), r'not uint8 of \[6, 5\]'),
        'channels': (dict(images=IMAGES[:, None], labels=LABELS), r'not uint8 of \[50, 1, 6, 5\]'),
        'names': (dict(images=IMAGES, labels=LABELS.astype(str)), 'labels are whole numbers'),
        'one hot': (dict(images=IMAGES, labels=np.eye(50, dtype=int)), r'not int64 of \[50, 50\]'),
        'number': (dict(images=IMAGES, labels=LABELS[1:]), '50 images, but 49 labels'),
        'negative': (dict(images=IMAGES, labels=LABELS - 1), 'image 0 has the label -1, outside 0 to 1'),
        'outside': (
            dict(x_train=IMAGES, y_train=LABELS, x_test=IMAGES, y_test=LABELS + 1),
            'image 2 has the label 3, outside 0 to 2',
        ),
        'large': (dict(images=IMAGES, labels=LABELS.astype(int) + 2**40), 'a label is 1,099,511,627,778'),
        'one class': (dict(images=IMAGES, labels=LABELS * 0), 'of the class 0; two classes are needed'),
        'equal': (dict(images=IMAGES * 0, labels=LABELS), 'all images are the same'),
        'objects': (dict(images=np.array([{}] * 50), labels=LABELS), 'holds Python objects, which are never loaded'),
        'none': (dict(images=IMAGES[:0], labels=LABELS[:0]), 'there are no pixels'),
    }

    @pytest.mark.parametrize('name', BAD)
    def test_bad(self, tmp_path, name):
        arrays, told = self.BAD[name]
        np.savez(tmp_path / 'a.npz', **arrays)
        with pytest.raises(DataError, match=told) as raised:
            opened('npz', tmp_path / 'a.npz')
        assert f'{tmp_path}/a.npz' in str(raised.value)

    def test_no_npz(self, tmp_path):
        with pytest.raises(DataError, match='config.data.path=.*gone.npz: there is no such file'):
            opened('npz', tmp_path / 'gone.npz')
        np.save(tmp_path / 'a.npy', IMAGES)
        with pytest.raises(DataError, match='a.npy: not a readable .npz file'):
            opened('npz', tmp_path / 'a.npy')
        np.savez(tmp_path / 'a.npz', images=IMAGES, labels=LABELS)
        with pytest.raises(DataError, match='config.data.validation_path=.*gone.npz: there is no such file'):
            opened('npz', tmp_path / 'a.npz', validation=str(tmp_path / 'gone.npz'))

    def test_a_header_that_promises_too_much(self, tmp_path):
        body = b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000, 6, 5), }".ljust(118) + b'\n'
        labels = io.BytesIO()
        np.save(labels, LABELS)
        with zipfile.ZipFile(tmp_path / 'a.npz', 'w') as archive:
            archive.writestr('images.npy', b'\x93NUMPY\1\0' + struct.pack('<H', len(body)) + body)
            archive.writestr('labels.npy', labels.getvalue())
        with pytest.raises(DataError, match='images has 300,000,000,000 bytes, too many for memory'):
            opened('npz', tmp_path / 'a.npz')


class TestDigits:
    def test_all(self):
        from sklearn.datasets import load_digits

        source, wanted = opened('digits', split='all'), load_digits()
        assert len(source) == 1797 and source.classes == tuple('0123456789')
        found = source.read(range(1797))
        assert [label for _, label in found] == wanted.target.tolist()
        pixels = np.array([image for image, _ in found])
        assert pixels.dtype == np.uint8 and pixels.max() == 255
        np.testing.assert_array_equal(np.round(pixels * (16 / 255)), wanted.images)

    def test_splits(self):
        train, held = opened('digits'), opened('digits', split='validation')
        assert len(train) + len(held) == 1797 and 60 < len(held) < 120
        assert train.fingerprint != held.fingerprint

    def test_without_scikit_learn(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'sklearn', None)
        with pytest.raises(DataError, match='comes with scikit-learn: pip install scikit-learn'):
            opened('digits')


def test_gzip_of_several_parts(tmp_path):
    made = pictures.write_idx(tmp_path)
    path = tmp_path / 'train-images-idx3-ubyte.gz'
    body = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(body[:700]) + gzip.compress(body[700:]))
    assert_holds(opened('idx', tmp_path), made['train-images-idx3-ubyte'], made['train-labels-idx1-ubyte'])

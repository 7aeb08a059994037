"""Batches of images: labels that follow images, purity, bad images, worker processes, TensorFlow data sets."""

import pickle

import data_sets
import numpy as np
import pictures
import pytest

from mixln_jax import config
from mixln_jax.data import batches
from mixln_jax.data.images import examples
from mixln_jax.system.errors import DataError, UsageError

VARIED = dict(policy='rand-m9-mstd0.5-inc1', color_jitter=0.4, erasing=0.5)


def opened(path, split='all', images=VARIED, size=16, **data):
    values = {'source': 'images', 'path': str(path), 'held_out': 0.25, 'images': config.Images(**images)}
    return examples.open_examples(config.Data(**values | data), split, size)


@pytest.fixture
def folder(tmp_path):
    return pictures.write_folder(tmp_path / 'set', pictures.set_of())


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


class TestBatches:
    def test_training(self, folder):
        made = opened(folder)
        batch = batches.training(made, seed=0, batch_size=5)[1]
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
            'images': ((5, 16, 16, 3), np.uint8),
            'labels': ((5,), np.int32),
            'example_mask': ((5,), np.float32),
            'place': ((5,), np.uint32),
        }

    def test_labels_follow_images(self, folder):
        """Each image has the color of its class, which neither crop nor flip change."""
        made = opened(folder, images={})
        colors = np.array([pictures.COLORS[name] for name in made.classes])
        dataset = batches.training(made, seed=0, batch_size=7)
        for batch in [dataset[step] for step in range(12)] + [batches.evaluation(made, 7)[0]]:
            means = batch['images'].mean((1, 2))
            nearest = ((means[:, None] - colors) ** 2).sum(-1).argmin(-1)
            np.testing.assert_array_equal(nearest, batch['labels'])

    def test_epochs_have_every_image_once(self, folder):
        dataset = batches.training(opened(folder), seed=0, batch_size=4)
        for epoch in range(3):
            labels = np.concatenate([dataset[3 * epoch + step]['labels'] for step in range(3)])
            assert np.bincount(labels).tolist() == [5, 4, 3]

    def test_evaluation(self, folder):
        """All once, in order, the last batch filled with rows that do not count; nothing is random."""
        made = opened(folder)
        dataset = batches.evaluation(made, 5)
        assert len(dataset) == 3
        whole = [dataset[number] for number in range(3)]
        np.testing.assert_array_equal(whole[2]['example_mask'], [1, 1, 0, 0, 0])
        labels = np.concatenate([batch['labels'] for batch in whole])[:12]
        assert labels.tolist() == [0] * 5 + [1] * 4 + [2] * 3
        other = opened(folder, seed=9)
        assert_same(batches.evaluation(other, 5)[1], whole[1])

    def test_of_seed_epoch_and_number_alone(self, folder):
        """Whatever else is in the batch, and whatever was read before."""
        made = opened(folder)
        batch = made.batch([3, 8, 3, 3], [0, 0, 1, 0])
        np.testing.assert_array_equal(batch['images'][0], batch['images'][3])
        assert (batch['images'][0] != batch['images'][2]).any()
        np.testing.assert_array_equal(opened(folder).batch([3], [1])['images'][0], batch['images'][2])
        assert (opened(folder, seed=1).batch([3], [1])['images'][0] != batch['images'][2]).any()

    def test_more_than_are_in_memory_at_once(self, folder, monkeypatch):
        whole = opened(folder).batch(range(12), [2] * 12)
        monkeypatch.setattr(examples, 'AT_ONCE', 5)
        made, sizes = opened(folder), []
        read = made._source.read
        monkeypatch.setattr(made._source, 'read', lambda numbers: sizes.append(len(numbers)) or read(numbers))
        assert_same(made.batch(range(12), [2] * 12), whole)
        assert sizes == [5, 5, 2]

    def test_number_of_classes(self, folder):
        data = config.Data(source='images', path=str(folder))
        with pytest.raises(UsageError, match='config.model.num_classes=7, but the images have 3 classes'):
            examples.open_examples(data, 'train', 16, 7)
        assert len(examples.open_examples(data, 'train', 16, 3).classes) == 3

    def test_fingerprint(self, folder):
        made = opened(folder)
        assert made.fingerprint == opened(folder, seed=3).fingerprint and len(made) == 12
        assert made.fingerprint | {'source': ''} == {'source': '', 'classes': 3, 'size': 16}
        assert made.fingerprint != opened(folder, size=17).fingerprint

    @pytest.mark.parametrize('source', ['digits', 'idx'])
    def test_gray_arrays(self, source, tmp_path):
        pictures.write_idx(tmp_path)
        made = opened(tmp_path, 'train', {'eval_crop': 1.0, 'crop': 'none', 'flip': 0.0}, 8, source=source)
        batch = made.batch([1, 0])
        assert batch['images'].shape == (2, 8, 8, 3) and (batch['images'] == batch['images'][..., :1]).all()
        assert_same(made.batch([1, 0], [4, 5]), batch)


class TestWorkers:
    """Two tests in one, as starting processes takes seconds."""

    def test_the_same_batches(self, folder):
        dataset = batches.training(opened(folder), seed=2, batch_size=5)
        for workers in (0, 4):
            reader = batches.read(dataset, 1, workers)
            for step in range(1, 6):
                assert_same(next(reader), dataset[step])
            reader.close()

    def test_a_bad_image_is_named(self, folder):
        (folder / 'dog/dog2.jpg').write_bytes(b'x')
        reader = batches.read(batches.training(opened(folder), seed=2, batch_size=12), 0, 1)
        with pytest.raises(DataError, match='dog/dog2.jpg: not an image that can be read'):
            next(reader)


class TestBadImages:
    def spoil(self, folder, *names, content=b'no image'):
        for name in names:
            (folder / f'{name[:3]}/{name}.jpg').write_bytes(content)

    @pytest.mark.parametrize('kind', ['folder', 'zip'])
    @pytest.mark.parametrize(
        'content, told',
        [
            (b'no image', 'not an image that can be read'),
            (b'', 'not an image: the file is empty'),
            (pictures.plain('dog')[:300], 'damaged image'),
        ],
    )
    def test_is_named(self, tmp_path, kind, content, told):
        spoilt = pictures.set_of() | {'dog/dog2.jpg': content}
        if kind == 'folder':
            path = pictures.write_folder(tmp_path / 'set', spoilt)
            name = f'{path}/dog/dog2.jpg'
        else:
            path = pictures.write_zip(tmp_path / 'set.zip', spoilt)
            name = f'{path}: dog/dog2.jpg'
        with pytest.raises(DataError, match=f'{name}: {told}.*; config.data.skip_bad=N replaces N such images'):
            opened(path).batch(range(12), [0] * 12)

    def test_too_many_pixels(self, folder):
        with pytest.raises(DataError, match=r'cat/cat2.jpg: 30 x 22 pixels are more than config.data.max_pixels=650;'):
            opened(folder, max_pixels=650).batch([0, 1, 2], [0, 0, 0])

    def test_replaced_by_the_next(self, folder, capfd):
        """With its label; varied as the bad one would be. Once it is said."""
        good = opened(folder).batch(range(12), [0] * 12)
        self.spoil(folder, 'cat4', 'dog0')
        made = opened(folder, skip_bad=2)
        for _ in range(2):
            batch = made.batch(range(12), [0] * 12)
            assert batch['labels'].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2]
            keep = [0, 1, 2, 3, *range(6, 12)]
            np.testing.assert_array_equal(batch['images'][keep], good['images'][keep])
        central = made.batch([4, 5, 6])
        np.testing.assert_array_equal(central['images'][0], central['images'][2])
        np.testing.assert_array_equal(central['images'][1], central['images'][2])
        said = capfd.readouterr().err
        assert said.count('cat/cat4.jpg: not an image that can be read; the next image replaces it') == 1
        assert said.count('\n') == 2

    def test_the_last_is_replaced_by_the_first(self, folder):
        self.spoil(folder, 'owl2')
        made = opened(folder, skip_bad=1)
        assert made.batch([11])['labels'].tolist() == [0]

    def test_one_too_many(self, folder):
        self.spoil(folder, 'cat1', 'dog0', 'owl2')
        with pytest.raises(DataError, match='owl/owl2.jpg: .* .2 bad images before it.; config.data.skip_bad=N'):
            opened(folder, skip_bad=2).batch(range(12))

    def test_none_is_left(self, folder):
        self.spoil(folder, *(f'{name}{i}' for name, n in (('cat', 5), ('dog', 4), ('owl', 3)) for i in range(n)))
        with pytest.raises(DataError, match='no image of the data can be read'):
            opened(folder, skip_bad=99).batch([0])

    def test_a_file_that_has_gone(self, folder):
        made = opened(folder, skip_bad=1)
        (folder / 'cat/cat0.jpg').unlink()
        assert made.batch([0, 1, 2])['labels'].tolist() == [0, 0, 0]

    def test_in_another_process_too(self, folder):
        self.spoil(folder, 'cat4', 'dog0')
        made = opened(folder, skip_bad=2)
        assert_same(pickle.loads(pickle.dumps(made)).batch([4, 5], [1, 1]), made.batch([4, 5], [1, 1]))


class TestDataSets:
    """TensorFlow data sets, made without TensorFlow."""

    CONTENT = pictures.set_of()

    def written(self, root, labels=None, **fields):
        names = sorted(self.CONTENT)
        labels = labels or [pictures.CLASSES.index(name[:3]) for name in names]
        return data_sets.write_images(root, [self.CONTENT[name] for name in names], labels, pictures.CLASSES, **fields)

    def open(self, root, split='train'):
        return opened('', split, source='tfds', name='pets', data_dir=str(root))

    def test_the_same_as_the_folder(self, tmp_path, folder):
        self.written(tmp_path)
        made, wanted = self.open(tmp_path), opened(folder)
        assert made.classes == wanted.classes and len(made) == 12
        assert_same(made.batch(range(12), [1] * 12), wanted.batch(range(12), [1] * 12))
        assert made.origin(5).endswith('pets-train.array_record-00000-of-00001, record 5')
        assert_same(self.open(tmp_path, 'train[50%:]').batch([0]), wanted.batch([6]))

    def test_files_of_other_kinds(self, tmp_path):
        png = pictures.encoded(pictures.pixels()[..., 0])
        data_sets.write_images(tmp_path, [png, png], [1, 0], pictures.CLASSES)
        assert self.open(tmp_path).batch([0, 1])['labels'].tolist() == [1, 0]

    @pytest.mark.parametrize('label', [-1, 3])
    def test_labels_outside(self, tmp_path, label):
        self.written(tmp_path, [label] * 12)
        with pytest.raises(DataError, match=f'record 0: label {label} is outside 0 to 2'):
            self.open(tmp_path).batch([0])

    def test_one_class(self, tmp_path):
        data_sets.write_images(tmp_path, [b''], [0], ['cat'])
        with pytest.raises(DataError, match='`label` has 1 classes; two are needed'):
            self.open(tmp_path)

    def test_bad_records(self, tmp_path):
        data_sets.write_images(tmp_path, [b'no image', pictures.plain('cat')], [0, 0], pictures.CLASSES)
        with pytest.raises(DataError, match='00000-of-00001, record 0: not an image'):
            self.open(tmp_path).batch([0, 1])

    def test_no_images(self, tmp_path):
        data_sets.write(tmp_path)
        with pytest.raises(DataError, match='no field `image` .fields: text, url'):
            opened('', 'train', source='tfds', data_dir=str(tmp_path))

    def test_unknown_splits(self, tmp_path):
        self.written(tmp_path)
        with pytest.raises(DataError, match='no split validation .there is train'):
            self.open(tmp_path, 'validation')


def test_policies_are_checked_before_files():
    with pytest.raises(UsageError, match='config.data.images.policy'):
        opened('', images={'policy': 'x'})

"""data.prepare of images: what it writes, what it writes again, and bad input."""

import numpy as np
import pictures
import pytest
import tensorflow_datasets as tfds

from mixln_jax import config
from mixln_jax.data.images import examples, sources
from mixln_jax.data.prepare import command
from mixln_jax.data.prepare import images as image_units

SET = pictures.set_of((30, 20, 10))
VALIDATION = {f'ILSVRC_val_{i:03}.JPEG': pictures.plain(pictures.CLASSES[i * 7 % 3]) for i in range(12)}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(image_units, 'SHARD', 20 * len(pictures.plain('cat')))
    image_units.open_source.cache_clear()


@pytest.fixture
def tars(tmp_path):
    """ImageNet's files: a tar file of a tar file for each class, one of images alone, a list of their classes."""
    groups = {}
    for name, body in SET.items():
        groups.setdefault(f'{name[:3]}.tar', {})[name.partition('/')[2]] = body
    (tmp_path / 'train.tar').write_bytes(
        pictures.tar_of({name: pictures.tar_of(part) for name, part in groups.items()})
    )
    (tmp_path / 'val.tar').write_bytes(pictures.tar_of(VALIDATION))
    (tmp_path / 'val.txt').write_text('\n'.join(pictures.CLASSES[i * 7 % 3] for i in range(12)))
    return tmp_path


def prepare(out, path, *words):
    words = ['--source', 'images', '--format', 'tfds', '--path', str(path), '--out', str(out), '--workers', '1', *words]
    return command.main(words)


def from_tars(tars, out, *words):
    return prepare(out, tars / 'train.tar', '--validation', f'{tars}/val.tar,{tars}/val.txt', *words)


def held(out, split, name='images'):
    """{(content, class)} of a split, as a run reads it."""
    source = sources.open_source(config.Data(source='tfds', name=name, data_dir=str(out)), split)
    return sorted((image, source.classes[label]) for image, label in source.read(range(len(source))))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


class TestWritten:
    def test_imagenet(self, tars, tmp_path):
        out = tmp_path / 'out'
        assert from_tars(tars, out, '--name', 'imagenet2012:5.1.0') == 0
        assert held(out, 'train', 'imagenet2012') == sorted((body, name[:3]) for name, body in SET.items())
        wanted = sorted((body, pictures.CLASSES[i * 7 % 3]) for i, body in enumerate(VALIDATION.values()))
        assert held(out, 'validation', 'imagenet2012') == wanted
        assert len([*(out / 'imagenet2012/5.1.0').glob('imagenet2012-train.array_record-*-of-00003')]) == 3

    def test_tfds_reads_it(self, tars, tmp_path):
        from_tars(tars, tmp_path / 'out')
        read = tfds.data_source('images', split='train', data_dir=str(tmp_path / 'out'))
        assert len(read) == 60
        for record in [read[i] for i in (0, 59)]:
            name = pictures.CLASSES[record['label']]
            assert record['file_name'].decode().startswith(name)
            assert np.abs(record['image'].mean((0, 1)) - pictures.COLORS[name]).max() < 5

    def test_mixed(self, tars, tmp_path):
        """A slice has images of all classes."""
        from_tars(tars, tmp_path / 'out')
        assert {name for _, name in held(tmp_path / 'out', 'train[:12]')} == {*pictures.CLASSES}

    def test_folder(self, tmp_path):
        path = pictures.write_folder(tmp_path / 'set', SET)
        assert prepare(tmp_path / 'out', path) == 0
        train, validation = (held(tmp_path / 'out', split) for split in ('train', 'validation'))
        assert len(train) == 40 and sorted(train + validation) == sorted((body, name[:3]) for name, body in SET.items())
        data = config.Data(source='tfds', name='images', data_dir=str(tmp_path / 'out'))
        assert examples.open_examples(data, 'train', 224).batch([0])['images'].shape == (1, 224, 224, 3)


class TestAgain:
    def test_parts_of_the_work_make_the_whole(self, tars, tmp_path, capfd):
        assert from_tars(tars, tmp_path / 'whole') == 0
        assert from_tars(tars, tmp_path / 'parts', '--shards', '2:3') == 0
        assert 'still lacks 3 of 4 shards' in capfd.readouterr().out
        assert from_tars(tars, tmp_path / 'parts', '--shards', '0:2') == 0
        assert contents(tmp_path / 'whole') == contents(tmp_path / 'parts')

    def test_lost_shards_alone_are_written(self, tars, tmp_path, capfd):
        from_tars(tars, tmp_path / 'out')
        before = contents(tmp_path / 'out')
        lost = next((tmp_path / 'out').rglob('*train.array_record-00001*'))
        lost.unlink()
        capfd.readouterr()
        assert from_tars(tars, tmp_path / 'out') == 0
        assert '1 of 4 shards to prepare' in capfd.readouterr().out
        assert contents(tmp_path / 'out') == before

    def test_other_images(self, tars, tmp_path, capfd):
        from_tars(tars, tmp_path / 'out')
        path = pictures.write_folder(tmp_path / 'set', SET)
        assert prepare(tmp_path / 'out', path) == 2
        assert 'holds another preparation' in capfd.readouterr().err


class TestBad:
    def test_bad_images(self, tmp_path, capfd):
        path = pictures.write_folder(tmp_path / 'set', SET | {'dog/dog1.jpg': b'x'})
        assert prepare(tmp_path / 'out', path) == 4
        assert f'{path}/dog/dog1.jpg: not an image' in capfd.readouterr().err
        assert prepare(tmp_path / 'out', path, '--skip_bad', '1') == 0
        assert '\n1 bad images were left out' in capfd.readouterr().out
        assert len(held(tmp_path / 'out', 'train') + held(tmp_path / 'out', 'validation')) == 59

    @pytest.mark.parametrize(
        'text, told',
        [
            ('cat\n' * 11, 'val.txt: 11 lines for 12 images'),
            ('cat\n' * 11 + '490\n', "val.txt:12: '490' does not end in the name of a class, such as cat"),
            ('cat\n' * 11 + '\n', "val.txt:12: '' does not end in"),
            ('x.jpg cat\n' * 12, 'val.txt:1: x.jpg is not an image of its own'),
            ('ILSVRC_val_000.JPEG cat\n' * 12, 'val.txt:2: ILSVRC_val_000.JPEG is not an image of its own'),
        ],
    )
    def test_lists_of_classes(self, tars, tmp_path, capfd, text, told):
        (tars / 'val.txt').write_text(text)
        assert from_tars(tars, tmp_path / 'out') == 4
        assert told in capfd.readouterr().err

    def test_names_in_any_order(self, tars, tmp_path):
        from_tars(tars, tmp_path / 'a')
        lines = [f'{name} {pictures.CLASSES[i * 7 % 3]}' for i, name in enumerate(VALIDATION)]
        (tars / 'val.txt').write_text('\n'.join(reversed(lines)))
        image_units.open_source.cache_clear()
        assert from_tars(tars, tmp_path / 'b') == 0
        assert held(tmp_path / 'a', 'validation') == held(tmp_path / 'b', 'validation')

    def test_no_rows_of_tokens(self, tmp_path, capfd):
        words = ['--source', 'images', '--format', 'tokens', '--path', 'x', '--out', str(tmp_path)]
        assert command.main(words) == 2
        assert '--source images goes with --format tfds' in capfd.readouterr().err

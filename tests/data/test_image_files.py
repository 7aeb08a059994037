"""Sets of images in folders and archives: their classes and splits, and what is wrong with them."""

import gzip
import io
import os
import pickle
import re
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pictures
import pytest

from mixln_jax import config
from mixln_jax.data.images import classes, examples, files, sources
from mixln_jax.system.errors import DataError, UsageError

SPLIT = pictures.set_of(prefix='train/') | pictures.set_of((2, 2, 1), 'val/')


def opened(path, split='train', held_out=0.25, validation='', **images):
    data = config.Data(
        source='images', path=str(path), validation_path=validation, held_out=held_out, images=config.Images(**images)
    )
    return sources.open_source(data, split)


def labelled(source):
    """{name of the file: name of its class}"""
    found = source.read(range(len(source)))
    return {source.origin(i).rpartition('/')[2]: source.classes[label] for i, (_, label) in enumerate(found)}


@pytest.fixture(params=['folder', 'zip', 'deflated', 'tar', 'tar of tars'])
def store(request, tmp_path):
    """Writes {name: content} in each of the ways in which a set may be stored."""

    def write(content):
        if request.param == 'folder':
            return pictures.write_folder(tmp_path / 'set', content)
        if 'tar' not in request.param:
            method = zipfile.ZIP_DEFLATED if request.param == 'deflated' else zipfile.ZIP_STORED
            return pictures.write_zip(tmp_path / 'set.zip', content, method)
        if request.param == 'tar of tars':
            groups = {}
            for name, body in content.items():
                folder, _, name = name.rpartition('/')
                groups.setdefault(f'{folder}.tar', {})[name] = body
            content = {name: pictures.tar_of(members) for name, members in groups.items()}
        (tmp_path / 'set.tar').write_bytes(pictures.tar_of(content))
        return tmp_path / 'set.tar'

    return write


class TestStores:
    def test_folders_are_classes(self, store):
        content = pictures.set_of()
        path = store(content)
        source = opened(path, 'all')
        assert source.classes == pictures.CLASSES and len(source) == 12
        assert [image for image, _ in source.read(range(12))] == [content[name] for name in sorted(content)]
        assert labelled(source) == {name.partition('/')[2]: name.partition('/')[0] for name in content}
        origin = source.origin(0)
        assert origin.startswith(str(path)) and origin.endswith('cat/cat0.jpg')

    def test_read_in_another_process(self, store):
        source = opened(store(pictures.set_of()), 'all')
        before = source.read([3, 0])
        assert pickle.loads(pickle.dumps(source)).read([3, 0]) == before

    def test_folders_of_splits(self, store):
        path = store(SPLIT)
        assert len(opened(path)) == 12 and len(opened(path, 'validation')) == 5
        assert opened(path, 'val').fingerprint == opened(path, 'validation').fingerprint
        assert len(opened(path, 'all')) == 17
        assert labelled(opened(path, 'val')) == {
            f'{name}{i}.jpg': name for name, n in zip(pictures.CLASSES, (2, 2, 1), strict=True) for i in range(n)
        }

    def test_hashes_of_names_decide_without_them(self, store):
        path = store(pictures.set_of((30, 20, 10)))
        train, held = labelled(opened(path)), labelled(opened(path, 'validation'))
        assert len(train) == 40 and len(held) == 20 and len({*train, *held}) == 60
        with pytest.raises(UsageError, match='no split validation, only train and all; config.data.held_out=0'):
            opened(path, 'validation', held_out=0.0)
        assert len(opened(path, held_out=0.0)) == 60

    def test_fingerprint(self, store):
        content = pictures.set_of()
        before = opened(store(content), 'all').fingerprint
        assert opened(store(content), 'all').fingerprint == before
        renamed = {name.replace('cat1', 'cat9'): body for name, body in content.items()}
        other = content | {'dog/dog0.jpg': pictures.plain('owl', 50, 50)}
        moved = {name.replace('cat/cat1', 'owl/cat1'): body for name, body in content.items()}
        found = []
        for changed in (renamed, other, moved):
            path = store(content)
            if path.is_dir():
                for file in path.rglob('*.jpg'):
                    file.unlink()
            path = store(changed)
            os.utime(path, ns=(1, 1 + len(found)))  # listings of archives are kept
            found.append(opened(path, 'all').fingerprint)
        assert len({before, *found}) == 4

    def test_one_folder_around_it(self, store):
        content = {f'imagenet/{name}': body for name, body in SPLIT.items()}
        path = store(content)
        assert len(opened(path)) == 12 and opened(path, 'val').classes == pictures.CLASSES

    def test_hidden_files_are_left_out(self, store):
        hidden = {'cat/.hidden': b'x', '__MACOSX/cat/._cat0.jpg': b'x', 'cat/.d/a.jpg': b'x'}
        assert len(opened(store(pictures.set_of() | hidden), 'all')) == 12


class TestValidation:
    def test_another_set(self, tmp_path):
        train = pictures.write_folder(tmp_path / 'train_set', pictures.set_of())
        test = pictures.write_zip(tmp_path / 'test.zip', pictures.set_of((1, 1, 1)))
        assert len(opened(train, validation=str(test))) == 12
        held = opened(train, 'validation', validation=str(test))
        assert len(held) == 3 and held.origin(0) == f'{test}: cat/cat0.jpg'
        assert len(opened(train, 'all', validation=str(test))) == 12

    def test_its_split_for_validation(self, tmp_path):
        path = pictures.write_folder(tmp_path / 'both', SPLIT)
        train = pictures.write_folder(tmp_path / 'a', pictures.set_of())
        assert len(opened(train, 'validation', validation=str(path))) == 5


BAD = {
    'a file in no folder': ({'a.jpg': b''}, 'a.jpg: the image is in no folder of a class'),
    'a file in a split': (SPLIT | {'train/a.jpg': b''}, 'a.jpg: the image is in no folder .* such as train/cat/1.jpg'),
    'one class': ({'cat/a.jpg': b'', 'cat/b.jpg': b''}, 'all images are of the class cat; two classes are needed'),
    'one class in a split': (pictures.set_of((5, 0, 0), 'train/'), 'of the class cat; two'),
    'a class for training alone': (SPLIT | {'train/emu/a.jpg': b''}, 'has no class emu, which train has .split val'),
    'a class for validation alone': (SPLIT | {'val/emu/a.jpg': b''}, 'has the class emu, which train lacks'),
    'other names': (
        pictures.set_of(prefix='train/') | {f'val/{i}/a.jpg': b'' for i in range(5)},
        'has no class cat, dog, owl, which train has and has the class 0, 1, 2 and 2 more, which train lacks',
    ),
    'no image by its name': (pictures.set_of() | {'cat/notes.txt': b'x'}, 'cat/notes.txt does not have the name of an'),
    'nothing': ({}, 'no images'),
}


@pytest.mark.parametrize('content', [pictures.set_of(), SPLIT], ids=['classes', 'splits'])
def test_a_tar_file_of_the_folder_it_is_made_in(content, tmp_path):
    """As `tar cf x.tar .` makes it: names begin with ./, and the folder itself is a member."""
    folder = pictures.write_folder(tmp_path / 'set', content)
    with tarfile.open(tmp_path / 'set.tar', 'w') as archive:
        archive.add(folder, '.')
    assert opened(tmp_path / 'set.tar').classes == opened(folder).classes == pictures.CLASSES
    assert labelled(opened(tmp_path / 'set.tar')) == labelled(opened(folder))


def test_a_list_of_classes_whose_names_have_blanks(tmp_path):
    train = pictures.write_folder(
        tmp_path / 'train', {f'{name}/{i}.jpg': b'' for name in ('cat', 'big cat') for i in 'ab'}
    )
    others = pictures.write_folder(tmp_path / 'val', {'im 0.jpg': b'', 'im 1.jpg': b'', 'x.jpg': b''})
    for lines in (['big cat', 'cat', 'big cat'], ['x.jpg big cat', 'im 1.jpg cat', 'im 0.jpg\tbig cat']):
        (tmp_path / 'val.txt').write_text('\n'.join(lines))
        found = classes.split(
            files.open_files(str(train)), 'validation', 0.2, files.open_files(str(others)), str(tmp_path / 'val.txt')
        )
        assert found.classes == ('big cat', 'cat') and found.labels.tolist() == [0, 1, 0]


class TestBadSets:
    @pytest.mark.parametrize('name', BAD)
    @pytest.mark.parametrize('kind', ['folder', 'zip', 'tar'])
    def test_is_named(self, name, kind, tmp_path):
        content, told = BAD[name]
        path = tmp_path / f'set.{kind}'
        if kind == 'folder':
            path.mkdir()
            pictures.write_folder(path, content)
        elif kind == 'zip':
            pictures.write_zip(path, content)
        else:
            path.write_bytes(pictures.tar_of(content))
        with pytest.raises(DataError, match=told) as raised:
            opened(path)
        assert str(path) in str(raised.value) and '\n' not in str(raised.value)

    @pytest.mark.parametrize('names', [('Train', 'Val'), ('training', 'testing'), ('val', 'test')])
    def test_splits_are_no_classes(self, names, tmp_path):
        content = {name: body for split in names for name, body in pictures.set_of(prefix=f'{split}/').items()}
        path = pictures.write_folder(tmp_path / 'set', content)
        with pytest.raises(DataError, match=f'the folders {", ".join(sorted(names))} have the names of splits'):
            opened(path)

    @pytest.mark.parametrize('name', [b'caf\xe9', b'a\nb', b'\x1b[1mcat'])
    def test_names_of_classes_can_be_shown(self, name, tmp_path):
        path = pictures.write_folder(tmp_path / 'set', pictures.set_of())
        os.rename(path / 'cat', os.path.join(os.fsencode(path), name))
        with pytest.raises(DataError, match='the name of the class .* cannot be shown') as raised:
            opened(path)
        assert str(raised.value).isprintable()

    @pytest.mark.parametrize('folder', ['emu', 'train/emu', 'val/emu'])
    def test_empty_folders_of_classes(self, folder, tmp_path):
        content = SPLIT if '/' in folder else pictures.set_of()
        path = pictures.write_folder(tmp_path / 'set', content)
        (path / folder).mkdir()
        with pytest.raises(DataError, match=f'{path}/{folder}: the folder of this class has no image'):
            opened(path)
        packed = pictures.write_zip(tmp_path / 'set.zip', content | {f'{folder}/': b''})
        with pytest.raises(DataError, match=re.escape(f'{packed}: {folder}: the folder of this class has no image')):
            opened(packed)

    def test_paths(self, tmp_path):
        (tmp_path / 'a.txt').write_bytes(b'some text' * 999)
        for path, told in (
            ('', 'config.data.path is empty'),
            (tmp_path / 'gone', f'config.data.path={tmp_path}/gone: cannot be read: No such file'),
            (tmp_path / 'a.txt', 'a.txt is not a folder, a zip file or a tar file'),
        ):
            with pytest.raises(DataError, match=told):
                opened(path)
        with pytest.raises(DataError, match='config.data.validation_path=.*gone'):
            opened(pictures.write_folder(tmp_path / 'x', pictures.set_of()), validation=str(tmp_path / 'gone'))

    def test_no_such_split(self, tmp_path):
        path = pictures.write_folder(tmp_path / 'x', SPLIT)
        with pytest.raises(UsageError, match='has no split test, only train, val, validation and all'):
            opened(path, 'test')


class TestArchives:
    """What a member says of itself is not believed."""

    @pytest.mark.parametrize('name', ['../a/x.jpg', '/a/x.jpg', 'cat/../../x.jpg'])
    @pytest.mark.parametrize('kind', ['zip', 'tar'])
    def test_paths_that_lead_out(self, name, kind, tmp_path):
        content = pictures.set_of() | {name: b''}
        path = tmp_path / f'set.{kind}'
        if kind == 'zip':
            pictures.write_zip(path, content)
        else:
            path.write_bytes(pictures.tar_of(content))
        with pytest.raises(DataError, match='leads out of the archive'):
            opened(path)

    def test_links_in_a_tar_file(self, tmp_path):

        file = io.BytesIO(pictures.tar_of(pictures.set_of()))
        with tarfile.open(fileobj=file, mode='a') as archive:
            link = tarfile.TarInfo('cat/link.jpg')
            link.type, link.linkname = tarfile.SYMTYPE, '/etc/passwd'
            archive.addfile(link)
        (tmp_path / 'set.tar').write_bytes(file.getvalue())
        with pytest.raises(DataError, match='cat/link.jpg is a link'):
            opened(tmp_path / 'set.tar')

    def test_compressed_tar_files(self, tmp_path):

        (tmp_path / 'set.tar').write_bytes(gzip.compress(pictures.tar_of(pictures.set_of())))
        with pytest.raises(DataError, match='is compressed, so its members cannot be read in any order'):
            opened(tmp_path / 'set.tar')

    def changed(self, path, member, field, value):
        """Changes a field of a member in the zip file's directory: its place in the record of 46 bytes."""
        content = bytearray(path.read_bytes())
        name = member.encode()
        start = next(
            place
            for place in (match.start() for match in re.finditer(b'PK\x01\x02', bytes(content)))
            if content[place + 46 : place + 46 + len(name)] == name
        )
        struct.pack_into('<I', content, start + field, value)
        path.write_bytes(content)

    @pytest.mark.parametrize(
        'field, value, told',
        [
            (24, 10, 'the checksum is of another content'),  # uncompressed size
            (24, 2**31, '2,147,483,648 bytes, too much for an image'),
            (16, 1, 'the checksum is of another content'),  # checksum
            (42, 7, 'no header'),  # offset
            (42, 10**6, 'the archive ends before it'),
            (20, 30, 'the checksum is of another content'),  # compressed size
        ],
    )
    def test_false_sizes(self, tmp_path, field, value, told):
        path = pictures.write_zip(tmp_path / 'set.zip', pictures.set_of(), zipfile.ZIP_DEFLATED)
        self.changed(path, 'dog/dog1.jpg', field, value)
        source = opened(path, 'all')
        number = next(i for i in range(len(source)) if source.origin(i).endswith('dog1.jpg'))
        with pytest.raises(DataError, match=f'set.zip: dog/dog1.jpg: .*{told}'):
            source.read([number])

    def test_a_bomb_stays_small(self, tmp_path):
        """What it says of its size limits what is unpacked."""
        path = pictures.write_zip(
            tmp_path / 'set.zip', pictures.set_of() | {'cat/bomb.jpg': bytes(10**8)}, zipfile.ZIP_DEFLATED
        )
        self.changed(path, 'cat/bomb.jpg', 24, 1000)
        source = opened(path, 'all')
        number = next(i for i in range(len(source)) if source.origin(i).endswith('bomb.jpg'))
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match='bomb.jpg: the zip file is damaged'):
                source.read([number])
            assert tracemalloc.get_traced_memory()[1] < 10**7
        finally:
            tracemalloc.stop()

    def test_other_methods(self, tmp_path):
        path = pictures.write_zip(tmp_path / 'set.zip', pictures.set_of(), zipfile.ZIP_BZIP2)
        with pytest.raises(DataError, match='cat/cat0.jpg is compressed in another way'):
            opened(path)


def test_files_that_have_gone(tmp_path):
    path = pictures.write_folder(tmp_path / 'set', pictures.set_of())
    source = opened(path, 'all')
    (path / 'cat/cat2.jpg').unlink()
    with pytest.raises(DataError, match='cat/cat2.jpg: the file is gone'):
        source.read([2])
    os.mkfifo(path / 'cat/cat2.jpg')
    with pytest.raises(DataError, match='cat/cat2.jpg: cannot be read: it is a pipe'):
        source.read([2])


def test_linked_folders_of_classes(tmp_path):
    pictures.write_folder(tmp_path / 'real', pictures.set_of())
    (tmp_path / 'set').mkdir()
    for name in pictures.CLASSES:
        (tmp_path / 'set' / name).symlink_to(tmp_path / 'real' / name)
    (tmp_path / 'real/cat/deep').mkdir()
    (tmp_path / 'real/cat/deep/again').symlink_to(tmp_path / 'real')  # leads back
    with pytest.raises(DataError, match='cat/deep/again does not have the name of an image'):
        opened(tmp_path / 'set')
    (tmp_path / 'real/cat/deep/again').unlink()
    assert len(opened(tmp_path / 'set', 'all')) == 12


def test_names_that_are_no_text(tmp_path):
    path = os.fsencode(pictures.write_folder(tmp_path / 'set', pictures.set_of()))
    os.rename(path + b'/cat/cat0.jpg', path + b'/cat/\xff\xfe.jpg')
    source = opened(tmp_path / 'set', 'all')
    assert len(source) == 12 and len(source.read(range(12))) == 12 and len(source.fingerprint) == 32


def test_text_has_no_images():
    with pytest.raises(UsageError, match='config.data.source=stdlib has no images'):
        examples.open_examples(config.Data(source='stdlib'), 'train', 8)


def test_names_take_little_memory():
    names = [f'n{i:08}/n{i:08}_{i}.JPEG' for i in range(1000)]
    made = files.Names(names)
    assert [*made] == names and made[0] == names[0] and len(made) == 1000
    assert len(pickle.dumps(made)) < 1.5 * sum(map(len, names))


def test_splits_share_no_image(tmp_path):
    path = pictures.write_folder(tmp_path / 'set', pictures.set_of((40, 40, 40)))
    listed = files.open_files(str(path))
    train, held = (classes.split(listed, name, 0.05) for name in ('train', 'validation'))
    assert not {*train.numbers.tolist()} & {*held.numbers.tolist()}
    assert sorted([*train.numbers, *held.numbers]) == [*range(120)]
    np.testing.assert_array_equal(train.labels, train.numbers // 40)

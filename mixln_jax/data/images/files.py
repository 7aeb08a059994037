"""Files of images in a folder, a zip file or a tar file, by number, read where they are."""

import functools
import os
import pathlib
import struct
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from isal import isal_zlib

from mixln_jax.data.images.decode import SUFFIXES
from mixln_jax.system import files
from mixln_jax.system.errors import DataError, reading, reason

LARGEST = 2**28  # bytes of a file with an image
LOCAL_HEADER = struct.Struct('<4s5H3I2H')  # of a member of a zip file, before its name
KEY = 'config.data.path'


class Names:
    """Many texts in one blob, so that each needs little more memory than its bytes."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._blob, self._ends = b''.join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self._blob[self._ends[i - 1] if i else 0 : self._ends[i]])

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class Files(Protocol):
    """Files below a root, in the order of their names: paths from there on, with `/`."""

    names: Names
    folders: list[str]  # all folders below the root, those without files too

    def sizes(self) -> np.ndarray:
        """Returns the bytes of each file as it is stored, [n] int64."""

    def signature(self) -> bytes:
        """Returns what is known of the content of all files without reading them."""

    def read(self, i: int) -> bytes:
        """Returns the content of a file. Raises DataError, which does not name it."""

    def origin(self, i: int) -> str:
        """Returns where a file is, for people."""


def open_files(path: str, key: str = KEY) -> Files:
    """Returns the images in a folder, a zip file or a tar file (of images, or of tar files by class, as ImageNet's).

    Hidden files, and folders that begin with a dot or with __MACOSX, are left out.

    Raises DataError, naming file and member: there is nothing, or something else, at `path`; a file whose name is not
    that of an image; an archive that is damaged, or leads out of itself; no images.
    """
    if not path:
        raise DataError(f'{key} is empty; this source needs a folder or a zip file of images')
    root = pathlib.Path(os.path.expanduser(path))
    try:
        state = os.stat(root)
    except (OSError, ValueError) as error:
        raise DataError(f'{key}={path}: cannot be read: {reason(error)}') from error
    return Folder(str(root)) if root.is_dir() else _archive(str(root), (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=4)  # the splits of a run, and of a preparation
def _archive(path: str, state: Any) -> Files:
    files.regular(path, DataError)
    with reading(path, DataError, 'damaged'):
        if zipfile.is_zipfile(path):
            return Zip(path)
        if tarfile.is_tarfile(path):
            return Tar(path)
    raise DataError(f'{path} is not a folder, a zip file or a tar file of images')


def _is_hidden(name: str) -> bool:
    return any(part.startswith(('.', '__MACOSX')) for part in name.split('/') if part not in ('.', '..'))


def _checked(found: Sequence[str], where: str) -> list[int]:
    """Returns the places in `found`, names of files, in the order of the names."""
    order = sorted((i for i, name in enumerate(found) if not _is_hidden(name)), key=found.__getitem__)
    if not order:
        raise DataError(f'{where}: no images')
    for i in order:
        if not found[i].lower().endswith(SUFFIXES):
            raise DataError(
                f'{where}: {found[i]} does not have the name of an image ({" ".join(SUFFIXES)}); remove it, or begin '
                'its name with a dot'
            )
    return order


class Folder:
    """Files below a folder."""

    def __init__(self, root: str):
        self._root = root
        found, self.folders = list[str](), list[str]()
        waiting = ['']
        while waiting:
            folder = waiting.pop()
            with reading(os.path.join(root, folder), DataError), os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = f'{folder}/{entry.name}' if folder else entry.name
                    if _is_hidden(name):
                        continue
                    # Folders of classes may be links; deeper ones could lead back.
                    if entry.is_dir(follow_symlinks=name.count('/') < 2):
                        waiting.append(name)
                        self.folders.append(name)
                    else:
                        found.append(name)
        self.names = Names(found[i] for i in _checked(found, root))

    def sizes(self) -> np.ndarray:
        with reading(self._root, DataError):
            return np.array([os.stat(self.origin(i)).st_size for i in range(len(self.names))], np.int64)

    def signature(self) -> bytes:
        return b''

    def read(self, i: int) -> bytes:
        try:
            return files.read(self.origin(i), DataError, LARGEST)
        except FileNotFoundError:
            raise DataError('the file is gone') from None
        except DataError as error:
            raise DataError(str(error).removeprefix(f'{self.origin(i)}: ')) from error

    def origin(self, i: int) -> str:
        return os.path.join(self._root, self.names[i])


class _Archive:
    """A file with other files in it, which is opened once in each process; `places` [n]: where each one begins."""

    names: Names
    folders: list[str]
    _file: Any

    def __init__(self, path: str):
        self._path, self._file = path, None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {'_file': None}

    def origin(self, i: int) -> str:
        return f'{self._path}: {self.names[i]}'

    def _bytes(self, place: int, count: int) -> bytes:
        """Returns bytes of the archive; threads may call it at once."""
        if self._file is None:
            self._file = open(self._path, 'rb', buffering=0)  # noqa: SIM115  # for as long as the process
        content = os.pread(self._file.fileno(), count, place)
        if len(content) < count:
            raise DataError('the archive ends before it')
        return content


class Zip(_Archive):
    """Members of a zip file, stored or deflated."""

    def __init__(self, path: str):
        super().__init__(path)
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not _is_hidden(member.filename)]
        found = [member.filename for member in members]
        _check_paths(found, path)
        self.folders = [name.rstrip('/') for name in found if name.endswith('/')]
        members = [member for member in members if not member.is_dir()]
        order = _checked([member.filename for member in members], path)
        members = [members[i] for i in order]
        for member in members:
            if member.flag_bits & 1:
                raise DataError(f'{path}: {member.filename} is encrypted')
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(f'{path}: {member.filename} is compressed in another way than zip -0 to -9 do')
        self.names = Names(member.filename for member in members)
        columns = [(m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type) for m in members]
        self._table = np.array(columns, np.int64)  # [n, 5]

    def sizes(self) -> np.ndarray:
        return self._table[:, 1]

    def signature(self) -> bytes:
        return self._table[:, 2:4].tobytes()

    def read(self, i: int) -> bytes:
        place, stored, size, checksum, method = self._table[i].tolist()
        if max(stored, size) > LARGEST:
            raise DataError(f'{size:,} bytes, too much for an image')
        head = LOCAL_HEADER.unpack(self._bytes(place, LOCAL_HEADER.size))
        if head[0] != b'PK\x03\x04':
            raise DataError('the zip file is damaged: no header')
        content = self._bytes(place + LOCAL_HEADER.size + head[-2] + head[-1], stored)
        if method == zipfile.ZIP_DEFLATED:
            try:
                content = isal_zlib.decompressobj(-15).decompress(content, size + 1)  # no more, whatever it would give
            except isal_zlib.error as error:  # type: ignore[misc]  # its stub lacks the base class
                raise DataError(f'the zip file is damaged: {error}') from error
        if len(content) != size or isal_zlib.crc32(content) != checksum:
            raise DataError('the zip file is damaged: the checksum is of another content')
        return content


class Tar(_Archive):
    """Members of a tar file; of tar files in it those of each, in a folder of its name."""

    def __init__(self, path: str):
        super().__init__(path)
        found, places = list[str](), list[tuple[int, int]]()
        self.folders = []
        with open(path, 'rb') as file:
            if file.read(2) == b'\x1f\x8b':
                raise DataError(f'{path} is compressed, so its members cannot be read in any order; gunzip it')
            for member in _members(path, 0, os.path.getsize(path)):
                member.name = member.name.removeprefix('./').rstrip('/')
                if member.isdir():
                    if member.name not in ('', '.'):
                        self.folders.append(member.name)
                elif not member.isreg():
                    raise DataError(f'{path}: {member.name} is a link or a device, not a file')
                elif member.name.endswith('.tar'):
                    folder = member.name.removesuffix('.tar')
                    self.folders.append(folder)
                    for inner in _members(path, member.offset_data, member.size):
                        if inner.isreg():
                            found.append(f'{folder}/{inner.name.removeprefix("./")}')
                            places.append((member.offset_data + inner.offset_data, inner.size))
                else:
                    found.append(member.name)
                    places.append((member.offset_data, member.size))
        _check_paths(found, path)
        order = _checked(found, path)
        self.names, self._places = Names(found[i] for i in order), np.array(places, np.int64)[order]

    def sizes(self) -> np.ndarray:
        return self._places[:, 1]

    def signature(self) -> bytes:
        return self._places[:, 1].tobytes()

    def read(self, i: int) -> bytes:
        place, size = self._places[i].tolist()
        if size > LARGEST:
            raise DataError(f'{size:,} bytes, too much for an image')
        return self._bytes(place, size)


class _Part:
    """A part of a file, as a file that tarfile reads."""

    def __init__(self, path: str, start: int, size: int):
        self._file, self._start, self._size = open(path, 'rb'), start, size  # noqa: SIM115
        self._file.seek(start)

    def read(self, count: int) -> bytes:
        return self._file.read(max(0, min(count, self._start + self._size - self._file.tell())))

    def seek(self, place: int) -> None:
        self._file.seek(self._start + place)

    def tell(self) -> int:
        return self._file.tell() - self._start

    def close(self) -> None:
        self._file.close()


def _members(path: str, start: int, size: int) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a tar file that is a part of a file; tarfile would keep them all."""
    part: Any = _Part(path, start, size)
    try:
        with tarfile.open(fileobj=part, mode='r:') as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]
                if member.offset_data + member.size > size:
                    raise DataError(f'{path}: {member.name}: the archive ends before it')
                yield member
    finally:
        part.close()


def _check_paths(names: Sequence[str], path: str) -> None:
    """Raises DataError for a member whose name leads out of the archive: nothing is unpacked, but no image set has
    one."""
    for name in names:
        if name.startswith(('/', '\\')) or '..' in name.split('/') or '\0' in name:
            raise DataError(f'{path}: {name!r} leads out of the archive')

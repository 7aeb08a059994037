"""What commands write: locks, files and folders that appear whole, and nothing of anybody else's removed."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import re
import secrets
import shutil
import stat
import sys
import threading
from collections.abc import Callable

from mixln_jax.system import console, files, outputs
from mixln_jax.system.errors import UsageError

LOCK = '.mixln_jax-lock'  # in a folder that a command writes into
OF_RUN = {'checkpoints', 'tokenizer', 'debug', 'profile'}  # folders that their owner alone writes into
OWNERS = 'metrics.jsonl', 'checkpoints', 'tokens.json', '.prepare', 'export.json'  # what shows that it has an owner


def place(out: str | os.PathLike, what: str = '--out') -> pathlib.Path:
    """Where an option says to write, whole and with links followed, so that a link stays one.

    Raises UsageError as `paths.local`, and inside of what a run, an export or prepared rows keep for themselves.
    """
    path = pathlib.Path(os.path.realpath(files.local(out, what)))
    for inside in (path, *path.parents):
        if inside.name in OF_RUN and any((inside.parent / name).exists() for name in OWNERS):
            raise UsageError(
                f'{what} {out} would change {inside}, which belongs to {inside.parent}; take another folder'
            )
    return path


@contextlib.contextmanager
def locked(path: pathlib.Path, busy: str, keep: bool = False):
    """Inside, no other process has the lock file `path`; afterwards it is gone, unless to `keep` it.

    Gives whether that is certain: some network file systems have no locks, which is said. Raises UsageError `busy`.
    """
    while True:
        with _open_lock(path) as file:
            alone = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(busy) from None
            except OSError as error:
                alone = False
                console.say(f'mixln_jax: warning: {path} cannot be locked ({error})', file=sys.stderr)
            if alone and not _is(path, file):  # who had it before has removed it
                continue
            try:
                yield alone
            finally:
                if not keep:
                    path.unlink(missing_ok=True)
            return


def _open_lock(path):
    """Opens or makes a lock file. Raises UsageError for a link, a pipe or whatever else is no file."""
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), 'rb+', 0)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise UsageError(f'{path} is no file, so nothing can be locked by it; remove it') from None
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise UsageError(f'{path} is no file, so nothing can be locked by it; remove it')


def _is(path, file):
    """Whether `path` is still the name of an open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def made(folder: pathlib.Path):
    """Makes a folder; those that it had to make are removed again where what follows fails and leaves them empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def writing_into(folder: pathlib.Path, what: str = '--out'):
    """Makes a folder and keeps other commands out of it. Raises UsageError where it cannot be written into."""
    with contextlib.ExitStack() as closing:
        try:
            closing.enter_context(made(folder))
            closing.enter_context(locked(folder / LOCK, f'{what} {folder}: another process is writing into it'))
        except OSError as error:
            raise UsageError(f'{what} {folder} is no folder to write into: {error.strerror}') from None
        yield


@contextlib.contextmanager
def writing(path: pathlib.Path, what: str = '--out'):
    """Makes a file's folder and keeps other commands off the file. Raises UsageError where it cannot be written."""
    with contextlib.ExitStack() as closing:
        try:
            if path.is_symlink():  # `place` has followed all others
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            closing.enter_context(made(path.parent))
            lock = path.with_name(f'.{path.name}{LOCK}')
            closing.enter_context(locked(lock, f'{what} {path}: another process is writing it'))
        except OSError as error:
            raise UsageError(f'{what} {path} cannot be written: {error.strerror}') from None
        yield


@contextlib.contextmanager
def replacing(out: pathlib.Path, check: Callable[[pathlib.Path], None]):
    """Gives the name of a new folder, to be made and filled, which in the end becomes `out`: whole, or not at all.

    Args:
        out: from `place`.
        check: raises UsageError for an `out` that must not be replaced; asked first, and again just before.
    """
    prefix = f'.{out.name}{LOCK.removesuffix("lock")}'
    new = out.with_name(f'{prefix}{secrets.token_hex(4)}')
    old = out.with_name(f'{new.name}-old')
    busy = f'--out {out}: another process is writing it'
    with made(out.parent), locked(out.with_name(f'{prefix}lock'), busy) as alone:
        for path in sorted(out.parent.iterdir()) if alone else ():  # what a kill has left
            if re.fullmatch(rf'{re.escape(prefix)}[0-9a-f]{{8}}(-old)?', path.name) and not path.is_symlink():
                rename(path, out) if path.name.endswith('-old') and not out.exists() else shutil.rmtree(path)
        check(out)
        try:
            yield new
            check(out)
            if out.exists():
                rename(out, old)
            rename(new, out)
        finally:
            if old.exists() and not out.exists():
                rename(old, out)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(new, ignore_errors=True)


def rename(folder: pathlib.Path, to: pathlib.Path):
    """Renames a folder; on file systems that rename none (gcsfuse) copies and then removes it."""
    try:
        folder.rename(to)
    except OSError:
        shutil.copytree(folder, to)
        shutil.rmtree(folder)


def write(path: str | os.PathLike, body: bytes):
    """Writes a file so that a crash leaves the old one or the new one, never half, also when several processes or
    threads do so at once; makes its folder. A link stays one: what it leads to is written.

    Raises UsageError for a link that leads to itself.
    """
    path = pathlib.Path(path)
    if path.is_symlink():
        path = pathlib.Path(os.path.realpath(link := path))
        if path.is_symlink():
            raise UsageError(f'{link} is a link that leads to itself')
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.{threading.get_ident()}')
    try:
        with _opened(temporary) as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # while it is locked: an unlocked one is swept away
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(temporary):
    """A new file, locked for as long as it is open, which tells `sweep` that its process lives."""
    while True:
        with temporary.open('wb') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                swept = not _is(temporary, file)  # before it was locked
            except OSError:
                swept = False
            if not swept:
                yield file
                return


def sweep(path: pathlib.Path):
    """Removes what killed processes have left of `write` to this file; what cannot be locked may be a living one's."""
    pattern = re.compile(rf'\.{re.escape(path.name)}\.\d+\.\d{{8,}}')
    for name in filter(pattern.fullmatch, os.listdir(path.parent)):
        with contextlib.suppress(OSError), open(path.with_name(name), 'rb+', opener=_no_link) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path.with_name(name), file):
                path.with_name(name).unlink()


def _no_link(path, flags):
    return os.open(path, flags | os.O_NOFOLLOW)


def write_json(path, content):
    """Writes a JSON file, as `write` does."""
    outputs.write(path, json.dumps(content, indent=1).encode() + b'\n')

"""Output of commands: locks, and files and folders that appear complete and never replace what is not theirs."""

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
from collections.abc import Callable, Iterator
from typing import IO

from mixln_jax.system import console, files
from mixln_jax.system.errors import UsageError

LOCK = '.mixln_jax-lock'  # in a folder that a command writes into
# Only their owner writes into them.
OWNED = {'checkpoints', 'frozen', 'reference', 'tokenizer', 'debug', 'profile', 'samples'}
OWNERS = 'metrics.jsonl', 'checkpoints', 'tokens.json', '.prepare', 'export.json'  # next to them: they have an owner


def resolve(out: str | os.PathLike, option: str = '--out') -> pathlib.Path:
    """Returns the absolute path that an option says to write to. Links are followed, so that they stay links.

    Raises UsageError as `files.local`, and for a path in a folder that belongs to a run, an export or prepared rows.
    """
    path = pathlib.Path(os.path.realpath(files.local(out, option)))
    for folder in (path, *path.parents):
        if folder.name in OWNED and any((folder.parent / name).exists() for name in OWNERS):
            raise UsageError(
                f'{option} {out} would change {folder}, which belongs to {folder.parent}; use another folder'
            )
    return path


@contextlib.contextmanager
def locked(path: pathlib.Path, busy: str, keep: bool = False) -> Iterator[bool]:
    """Holds the lock file `path`, and removes it afterwards unless `keep`.

    Yields whether the lock excludes other processes: some network file systems have no locks, which is warned of.
    Raises UsageError, with `busy` as its text, while another process holds the lock.
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
            if alone and not _is(path, file):  # its previous holder has removed it
                continue
            try:
                yield alone
            finally:
                if not keep:
                    path.unlink(missing_ok=True)
            return


def hold(path: pathlib.Path) -> IO[bytes] | None:
    """Returns the lock file `path`, open and locked; None while another process holds it.

    The lock lasts until the file is closed, here and in every process that has inherited it. The file stays. Raises
    UsageError on a file system without locks.
    """
    with contextlib.ExitStack() as closing:
        file = closing.enter_context(_open_lock(path))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        except OSError as error:
            raise UsageError(
                f'{path} cannot be locked ({error.strerror}), so processes cannot share this folder; use another'
            ) from None
        closing.pop_all()
        return file


def _open_lock(path: pathlib.Path) -> IO[bytes]:
    """Opens a lock file, new or not. Raises UsageError for anything but a regular file, such as a link or a pipe."""
    problem = f'{path} is not a file, so it cannot be locked; remove it'
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), 'rb+', 0)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise UsageError(problem) from None
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise UsageError(problem)


def _is(path: pathlib.Path, file: IO[bytes]) -> bool:
    """Returns whether `path` still names an open file."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[None]:
    """Makes a folder and its missing parents. If the block raises, those of them that are empty are removed again."""
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
def writing_into(folder: pathlib.Path, option: str = '--out') -> Iterator[None]:
    """Makes a folder and keeps other commands out of it. Raises UsageError if it cannot be written to or is in use."""
    with contextlib.ExitStack() as closing:
        try:
            closing.enter_context(new_folder(folder))
            closing.enter_context(locked(folder / LOCK, f'{option} {folder}: another process is writing to it'))
        except OSError as error:
            raise UsageError(f'{option} {folder} cannot be written to: {error.strerror}') from None
        yield


@contextlib.contextmanager
def writing(path: pathlib.Path, option: str = '--out') -> Iterator[None]:
    """Makes a file's folder and keeps other commands from writing the file. Raises UsageError if it cannot be written
    or is in use."""
    with contextlib.ExitStack() as closing:
        try:
            if path.is_symlink():  # `resolve` has followed all links that lead anywhere
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            closing.enter_context(new_folder(path.parent))
            lock = path.with_name(f'.{path.name}{LOCK}')
            closing.enter_context(locked(lock, f'{option} {path}: another process is writing it'))
        except OSError as error:
            raise UsageError(f'{option} {path} cannot be written: {error.strerror}') from None
        yield


@contextlib.contextmanager
def replacing(out: pathlib.Path, check: Callable[[pathlib.Path], None]) -> Iterator[pathlib.Path]:
    """Yields the path of a new folder, for the caller to make and fill. It replaces `out` at the end of the block, or
    not at all if the block raises.

    Args:
        out: from `resolve`.
        check: raises UsageError for an `out` that must not be replaced; called first, and again before replacing it.
    """
    prefix = f'.{out.name}{LOCK.removesuffix("lock")}'
    new = out.with_name(f'{prefix}{secrets.token_hex(4)}')
    old = out.with_name(f'{new.name}-old')
    busy = f'--out {out}: another process is writing it'
    with new_folder(out.parent), locked(out.with_name(f'{prefix}lock'), busy) as alone:
        for path in sorted(out.parent.iterdir()) if alone else ():  # left by a process that was killed
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


def rename(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Renames a folder. On file systems that cannot rename folders (gcsfuse), copies it and removes the original."""
    try:
        folder.rename(target)
    except OSError:
        shutil.copytree(folder, target)
        shutil.rmtree(folder)


def write(path: str | os.PathLike, body: bytes) -> None:
    """Writes a file, and makes its folder. A crash leaves the old or the new content, never a mixture.

    Several processes and threads may write the same file at once. A link stays a link; its target is written. Raises
    UsageError for a link that leads to itself.
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
            os.replace(temporary, path)  # before the lock is released: `sweep` removes unlocked ones
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _opened(temporary: pathlib.Path) -> Iterator[IO[bytes]]:
    """Opens a new file, which is locked until it is closed, so that `sweep` knows that its process is alive."""
    while True:
        with temporary.open('wb') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                swept = not _is(temporary, file)  # between opening and locking
            except OSError:
                swept = False
            if not swept:
                yield file
                return


def sweep(path: pathlib.Path) -> None:
    """Removes temporary files that killed processes left when they wrote this file; locked ones are still in use."""
    pattern = re.compile(rf'\.{re.escape(path.name)}\.\d+\.\d{{8,}}')
    for name in filter(pattern.fullmatch, os.listdir(path.parent)):
        with contextlib.suppress(OSError), open(path.with_name(name), 'rb+', opener=_no_link) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(path.with_name(name), file):
                path.with_name(name).unlink()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def write_json(path: str | os.PathLike, content: object) -> None:
    """Writes a JSON file, as `write` does."""
    write(path, json.dumps(content, indent=1).encode() + b'\n')

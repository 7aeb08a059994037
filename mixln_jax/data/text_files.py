"""Documents from files of JSON lines or plain text, plain or compressed by gzip or zstd, one after the other."""

import functools
import glob
import io
import os
import queue
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import orjson
from isal import igzip, isal_zlib

from mixln_jax.system.errors import DataError
from mixln_jax.system.files import regular

T = TypeVar('T')
LARGEST = 64 * 10**6  # bytes of a line, which is a document or a part of one; `prepare` has an option for it
PIECE = 2000  # the least number of characters of a text document
STEP = 2**15  # bytes
LONGEST = 10**7  # characters after which a text document without a blank line ends at the next line
AT_ONCE = 32  # calls that wait for answers at a time
GZIP, ZSTD = b'\x1f\x8b', b'\x28\xb5\x2f\xfd'
JSON = ('.json', '.jsonl', '.ndjson', '.jsonlines')
BEGINS = re.compile(r'\{\s*("|\}|$)|\[\s*(\{|\[|"|$)')  # JSON: an object or an array, also over several lines
FORMS = 'the source jsonl reads lines that are objects with a field `text`, the source text reads plain text'
LONG = 'data.prepare accepts longer ones with --max_document BYTES, or leaves them out with --skip_bad N'
ARRAY = "is the file a JSON array? jq -c '.[]' FILE writes one object per line"
# Files that cannot be read: position and bytes by which they are recognised, and a description.
FOREIGN = (
    (0, GZIP, 'compressed by gzip twice; decompress it once'),
    (0, ZSTD, 'compressed by zstd twice; decompress it once'),
    (0, b'\xfd7zXZ\0', 'compressed by xz; decompress it, or use gzip'),
    (4, b'1AY&SY', 'compressed by bzip2; decompress it, or use gzip'),
    (0, b'\x04\x22\x4d\x18', 'compressed by lz4; decompress it, or use gzip'),
    (0, b'PK\x03\x04', 'a zip archive; unpack it'),
    (0, b'7z\xbc\xaf', 'a 7z archive; unpack it'),
    (257, b'ustar', 'a tar archive; unpack it'),
    (0, b'PAR1\x15', 'parquet; write it as JSON lines'),
    (0, b'ARROW1\0\0', 'an Arrow file; write it as JSON lines'),
    (0, b'\xff\xfe\0\0', 'UTF-32; write it as UTF-8'),
    (0, b'\0\0\xfe\xff', 'UTF-32; write it as UTF-8'),
    (0, b'\xff\xfe', 'UTF-16; write it as UTF-8'),
    (0, b'\xfe\xff', 'UTF-16; write it as UTF-8'),
)


def paths(patterns: str, key: str = 'config.data.path') -> list[str]:
    """Returns the files that comma-separated paths and globs name, sorted. A file with several names appears once.

    Args:
        patterns: paths and globs.
        key: the setting that holds them, for messages.

    Raises:
        DataError: a path or glob names no file of this machine.
    """
    parts = [os.path.expanduser(part.strip()) for part in patterns.split(',') if part.strip()]
    if not parts:
        raise DataError(f'{key} is empty; this source needs files')
    every_path = set()
    for pattern in parts:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches and '://' in pattern:
            raise DataError(f'{key}: {pattern} is not a file of this machine; copy it here first')
        if not matches:
            raise DataError(f'{key}: there is no file {pattern}')
        for path in matches:
            if os.path.isdir(path):
                raise DataError(f'{key}: {path} is a folder; name its files, for instance {path}/*')
        every_path.update(matches)
    by_identity: dict[tuple[int, int, int], str] = {}
    for path in sorted(every_path):
        by_identity.setdefault(_identity(path), path)
    return list(by_identity.values())


def _identity(path: str) -> tuple[int, int, int]:
    """Returns a key that is equal for all names of a file, links included. Raises DataError for a broken link."""
    try:
        state = regular(path, DataError)
    except FileNotFoundError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from error
    return (
        state.st_dev,
        state.st_ino,
        state.st_size,
    )  # with the size, because some network file systems do not number their files


def paths_of_source(source: str, patterns: str, key: str = 'config.data.path') -> list[str]:
    """Returns the `paths` for the source jsonl or text.

    Raises:
        DataError: as `paths`; or the source is text and a file is JSON. The source jsonl checks files while they are
        read.
    """
    names = paths(patterns, key)
    for path in names if source == 'text' else ():
        if kind(path) == 'jsonl':
            raise DataError(f'{path} is JSON lines, not plain text; the source jsonl reads it')
    return names


def kind_of_all(names: Sequence[str]) -> str:
    """Returns the kind of all these files, 'jsonl' or 'text'. Raises DataError if they are of both kinds."""
    kinds: dict[str, str] = {}
    for path in names:
        kinds.setdefault(kind(path), path)
    if len(kinds) > 1:
        raise DataError(
            f'{kinds["jsonl"]} is JSON lines and {kinds["text"]} plain text; name files of one kind, as in dir/*.jsonl'
        )
    return next(iter(kinds))


def kind(path: str) -> str:
    """Returns the kind of a file, 'jsonl' or 'text', by its name, else by its first line that is not a comment.

    Malformed JSON, such as an array, is jsonl too; the reader of jsonl reports what is wrong with it.

    Raises:
        DataError: the file cannot be read.
    """
    if path.lower().removesuffix('.gz').removesuffix('.zst').endswith(JSON):
        return 'jsonl'
    lines = (line.strip() for _, line in Reader('text', path, sys.maxsize).lines())
    first = next((line for line in lines if line and not line.startswith(('#', '//'))), '')
    return 'jsonl' if BEGINS.match(first) else 'text'


class NoAnswer(TimeoutError):
    """No call has ended within the time; `item` is the first whose call has not ended."""

    def __init__(self, seconds: float, item: Any):
        super().__init__(f'no answer within {seconds:g} s')
        self.item = item


def call_each(seconds: float | None, function: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """Returns [function(item) for item in items]; up to AT_ONCE calls run at a time, in threads.

    A call that hangs goes on in its thread, a daemon thread; a thread of a ThreadPoolExecutor would keep Python from
    ending.

    Args:
        seconds: the longest time in which no call ends; None: there is no limit. File systems of buckets, for example,
            try again for minutes if there is no network.
        function: to call.
        items: its arguments.

    Raises:
        NoAnswer: no call has ended for `seconds`. Otherwise the first exception of a call is raised.
    """
    arguments, results, stopped = list(items), dict[int, T](), threading.Event()
    waiting: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    answers: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    for number, item in enumerate(arguments):
        waiting.put((number, item))

    def work() -> None:
        while not stopped.is_set():
            try:
                number, item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                answers.put((number, function(item), None))
            except BaseException as error:  # of any kind: the caller would otherwise wait for ever
                stopped.set()
                answers.put((number, None, error))

    for _ in range(min(AT_ONCE, len(arguments))):
        threading.Thread(target=work, daemon=True).start()
    try:
        while len(results) < len(arguments):
            try:
                number, result, error = answers.get(timeout=seconds)
            except queue.Empty:
                missing = next(item for i, item in enumerate(arguments) if i not in results)
                raise NoAnswer(seconds or 0, missing) from None
            if error:
                raise error
            results[number] = result
    finally:
        stopped.set()
    return [results[number] for number in range(len(arguments))]


def call_within(seconds: float | None, call: Callable[[], T]) -> T:
    """Returns `call()`. Raises NoAnswer, a TimeoutError, if that takes more than `seconds`; None: there is no limit."""
    return call_each(seconds, lambda _: call(), [None])[0]


def allow_open(count: int) -> None:
    """Allows this process to hold `count` files open, as data sets do; C4 has 1,024, which is the limit of many
    systems."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 1024 if hard == resource.RLIM_INFINITY else min(hard, count + 1024)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class _Steps(io.FileIO):
    """A file that is read in small steps, so that its position tells how much of it has been decompressed."""

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[:STEP])


def _decompressed(raw: _Steps, path: str) -> Any:
    """Returns the content of a file as a stream of bytes."""
    begin = os.pread(raw.fileno(), len(ZSTD), 0)
    if path.lower().endswith('.gz') or begin.startswith(GZIP):
        return igzip.open(raw)
    if path.lower().endswith('.zst') or begin == ZSTD:
        import pyarrow  # takes a third of a second

        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, 'r'), 'zstd')
    return raw


class Reader:
    """The documents of one file, in order, as pairs (line number from 1, record); record['text'] is never blank.

    A jsonl file has one JSON object with a field `text` on each line, as the files of C4. A text file is cut at blank
    lines into documents of at least 2,000 characters; together they are the file.

    During and after the iteration, `empty` is the number of documents without text, `bad` the number of malformed lines
    that were skipped, `skipped` the reasons for the first of them, and `position` how far the file has been read, in
    bytes as stored.

    Iterating raises DataError, which names file and line, if the file is unreadable, if more than `skip_bad` lines are
    malformed, and if the file has no text, with the reason. Data that gzip cannot decompress are never skipped. A line
    of more than `largest` bytes is malformed; it is never held in memory as a whole.
    """

    def __init__(self, kind: str, path: str, skip_bad: int = 0, largest: int = LARGEST):
        """Prepares to read a file.

        Args:
            kind: 'jsonl' or 'text'.
            path: of the file.
            skip_bad: malformed lines to skip before one is an error.
            largest: bytes of a line.
        """
        self.empty = self.bad = self._number = self._end = 0
        self._raw: _Steps | None = None
        self.skipped: list[str] = []  # the reasons for the first few lines
        self._path, self._skip_bad, self._largest = path, skip_bad, largest
        self._records = {'jsonl': self._jsonl, 'text': self._text}[kind]

    @property
    def position(self) -> int:
        """How many bytes of the file, as stored, have been read."""
        return self._raw.tell() if self._raw and not self._raw.closed else self._end

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        any_text = False
        for number, record in self._records():
            if not record['text'].strip():
                self.empty += 1
                continue
            any_text = True
            yield number, record
        if not any_text:
            raise DataError(f'{self._path}: no text in this file: {self._why()}')

    def _why(self) -> str:
        """Returns the reason why there is no text."""
        if self.bad:
            return f'{self.bad} malformed lines, the first of them {self.skipped[0].removeprefix(f"{self._path}:")}'
        if self.empty:
            return f'{self.empty} documents, all of them blank'
        return f'{self._number} blank lines' if self._number else 'it is empty'

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yields pairs (line number from 1, line with its end), decoded from UTF-8."""
        number = 0
        try:
            regular(self._path, DataError)
            with _Steps(self._path) as self._raw:
                # igzip splits lines in Python, a BufferedReader in C.
                content = _decompressed(self._raw, self._path)
                # Of 8 kB: the bytes that one read has decompressed before an error are lost, and their lines.
                lines = io.BufferedReader(content)
                try:
                    head = lines.peek()
                    for start, signature, description in FOREIGN:
                        if head.startswith(signature, start):
                            raise DataError(f'{self._path} is {description}')
                    for number, line in enumerate(iter(functools.partial(lines.readline, self._largest + 1), b''), 1):
                        self._number = number
                        if (text := self._decoded(number, line, lines)) is not None:
                            yield number, text
                finally:
                    self._end = self._raw.tell()
        except (OSError, EOFError, isal_zlib.error) as error:  # type: ignore[misc]  # its stub lacks the base class
            name = f'{self._path}:{number + 1}' if number else self._path
            raise DataError(f'{name}: cannot be read: {error}') from error

    def _decoded(self, number: int, line: bytes, lines: io.BufferedReader) -> str | None:
        """Returns the text of a line; None if it is skipped. `lines` has the rest of a line that is too long."""
        if len(line) > self._largest:
            self._skip(number, f'more than {self._largest:,} bytes in a line; {LONG}')
            while line and not line.endswith(b'\n'):
                line = lines.readline(STEP)
            return None
        try:
            return line.removeprefix(b'\xef\xbb\xbf').decode() if number == 1 else line.decode()
        except UnicodeDecodeError as error:
            self._skip(number, f'not UTF-8: {error.reason} at byte {error.start} of the line')
            return None

    def _skip(self, number: int, problem: str) -> None:
        if self.bad >= self._skip_bad:
            raise DataError(f'{self._path}:{number}: {problem}')
        self.bad += 1
        self.skipped = [*self.skipped, f'{self._path}:{number}: {problem}'][:5]

    def _text(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields pieces of the file; the last piece, which may be short, is joined to the one before it."""
        before, piece, first = None, [], 1
        length = 0
        for number, line in self.lines():
            piece.append(line)
            length += len(line)
            if length >= PIECE and (not line.strip() or length >= LONGEST):
                if before:
                    yield before
                before = first, {'text': ''.join(piece)}
                piece, first, length = [], number + 1, 0
        rest = ''.join(piece)
        if before:
            first, rest = before[0], before[1]['text'] + rest
        if rest:
            yield first, {'text': rest}

    def _jsonl(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the records of the file."""
        is_jsonl = False  # whether the file has had a record: then it is a file of JSON lines
        for number, line in self.lines():
            if not line.strip():
                continue
            problem: str | None
            try:
                record = orjson.loads(line)
            except ValueError as error:
                problem = f'not JSON: {str(error).partition(":")[0]}' + ('' if is_jsonl else f'; {FORMS}')
            else:
                problem = _problem(record)
            if problem:
                self._skip(number, problem if is_jsonl or line.lstrip()[0] != '[' else f'{problem}; {ARRAY}')
                continue
            is_jsonl = True
            yield number, record


def _problem(record: Any) -> str | None:
    """Returns what is wrong with a record; None if it is right."""
    if not isinstance(record, dict):
        return f'a JSON object with a field `text` is needed, not {type(record).__name__}'
    if not isinstance(record.get('text'), str):
        fields = [*list(record)[:8], *(['...'] if len(record) > 8 else [])]
        return f'no field `text` that is a string (fields: {", ".join(fields) or "none"})'
    return None

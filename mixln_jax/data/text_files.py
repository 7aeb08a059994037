"""Documents from files: JSON lines and plain text, packed by gzip or not, one after the other."""

import functools
import glob
import io
import os
import queue
import re
import resource
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

import orjson
from isal import igzip, isal_zlib

from mixln_jax.system.errors import DataError
from mixln_jax.system.files import regular

LARGEST = 64 * 10**6  # bytes of a line, which is a document or a piece of one, unless `prepare` is told otherwise
PIECE = 2000  # characters of a text document, at least
STEP = 2**15  # bytes
LONGEST = 10**7  # characters after which a text document without a blank line ends with the next line
AT_ONCE = 32  # calls that wait for answers
GZIP = b'\x1f\x8b'
JSON = ('.json', '.jsonl', '.ndjson', '.jsonlines')
BEGINS = re.compile(r'\{\s*("|\}|$)|\[\s*(\{|\[|"|$)')  # JSON: an object or an array, also over several lines
FORMS = 'the source jsonl reads an object with a field `text` a line, the source text plain text'
LONG = 'data.prepare takes longer ones with --max_document BYTES, or leaves them out with --skip_bad N'
ARRAY = "is the file a JSON array? jq -c '.[]' FILE makes it an object a line"
# What begins so is not read: place, bytes, and what it is.
FOREIGN = (
    (0, GZIP, 'packed by gzip twice; unpack it once'),
    (0, b'\x28\xb5\x2f\xfd', 'packed by zstd; unpack it, or pack it with gzip'),
    (0, b'\xfd7zXZ\0', 'packed by xz; unpack it, or pack it with gzip'),
    (4, b'1AY&SY', 'packed by bzip2; unpack it, or pack it with gzip'),
    (0, b'\x04\x22\x4d\x18', 'packed by lz4; unpack it, or pack it with gzip'),
    (0, b'PK\x03\x04', 'a zip archive; unpack it'),
    (0, b'7z\xbc\xaf', 'a 7z archive; unpack it'),
    (257, b'ustar', 'a tar archive; unpack it'),
    (0, b'PAR1\x15', 'parquet; write it as JSON lines'),
    (0, b'ARROW1\0\0', 'an Arrow file; write it as JSON lines'),
    (0, b'\xff\xfe', 'UTF-16; write it as UTF-8'),
    (0, b'\xfe\xff', 'UTF-16; write it as UTF-8'),
)


def paths(patterns: str, key: str = 'config.data.path') -> list[str]:
    """The files that comma-separated paths and globs name, sorted; a file of several names once, by the first of them.

    Raises DataError, naming `key`, for a path or glob that names no file of this machine.
    """
    parts = [os.path.expanduser(part.strip()) for part in patterns.split(',') if part.strip()]
    if not parts:
        raise DataError(f'{key} is empty; this source needs files')
    found = set()
    for pattern in parts:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches and '://' in pattern:
            raise DataError(f'{key}: {pattern} is no file of this machine; copy it here first')
        if not matches:
            raise DataError(f'{key}: there is no file {pattern}')
        for path in matches:
            if os.path.isdir(path):
                raise DataError(f'{key}: {path} is a folder; name its files, for instance {path}/*')
        found.update(matches)
    once = {}
    for path in sorted(found):
        once.setdefault(_identity(path), path)
    return list(once.values())


def _identity(path: str) -> tuple[int, int, int]:
    """The same for all names of a file, spelled otherwise or links. Raises DataError for a link to nothing."""
    try:
        state = regular(path, DataError)
    except FileNotFoundError as error:
        raise DataError(f'{path}: cannot be read: {error.strerror}') from error
    return state.st_dev, state.st_ino, state.st_size  # size: not every network's file system numbers its files


def of_source(source: str, patterns: str, key: str = 'config.data.path') -> list[str]:
    """`paths` for the source jsonl or text. DataError also for JSON in the source text; jsonl tells as it is read."""
    found = paths(patterns, key)
    for path in found if source == 'text' else ():
        if kind(path) == 'jsonl':
            raise DataError(f'{path} is JSON lines, not plain text; the source jsonl reads it')
    return found


def kind_of_all(found: list[str]) -> str:
    """'jsonl' or 'text', what these files are. Raises DataError where some are this and some that."""
    kinds = {}
    for path in found:
        kinds.setdefault(kind(path), path)
    if len(kinds) > 1:
        raise DataError(
            f'{kinds["jsonl"]} is JSON lines and {kinds["text"]} plain text; name files of one kind, as in dir/*.jsonl'
        )
    return next(iter(kinds))


def kind(path: str) -> str:
    """'jsonl' or 'text': what a file is by its name, else by its first line that is no comment.

    JSON that cannot be read, such as an array, is jsonl too, whose reader says what is wrong with it. Raises DataError
    for a file that cannot be read.
    """
    if path.lower().removesuffix('.gz').endswith(JSON):
        return 'jsonl'
    lines = (line.strip() for _, line in Reader('text', path, sys.maxsize)._lines())
    first = next((line for line in lines if line and not line.startswith(('#', '//'))), '')
    return 'jsonl' if BEGINS.match(first) else 'text'


class NoAnswer(TimeoutError):
    """Nothing was heard in time; of `item` not before either."""

    def __init__(self, seconds: float, item):
        super().__init__(f'no answer within {seconds:g} s')
        self.item = item


def each(seconds: float | None, function: Callable, items: Iterable) -> list:
    """[function(item) for item in items], some at a time in threads; raises what the first of them to fail raises.

    Raises NoAnswer where none has ended for so many seconds (None: they may take any time), as with file systems of
    buckets, which try again for minutes where there is no network. A call that hangs goes on in its thread, a daemon:
    those of a ThreadPoolExecutor would keep Python from ending.
    """
    items, results, stopped = list(items), {}, threading.Event()
    asked, answers = queue.SimpleQueue(), queue.SimpleQueue()
    for number, item in enumerate(items):
        asked.put((number, item))

    def work():
        while not stopped.is_set():
            try:
                number, item = asked.get_nowait()
            except queue.Empty:
                return
            try:
                answers.put((number, function(item), None))
            except BaseException as error:  # also a library's own, which would else leave who asked waiting
                stopped.set()
                answers.put((number, None, error))

    for _ in range(min(AT_ONCE, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        while len(results) < len(items):
            try:
                number, result, error = answers.get(timeout=seconds)
            except queue.Empty:
                raise NoAnswer(seconds, next(item for i, item in enumerate(items) if i not in results)) from None
            if error:
                raise error
            results[number] = result
    finally:
        stopped.set()
    return [results[number] for number in range(len(items))]


def within(seconds: float, call: Callable):
    """What `call()` gives or raises; NoAnswer, a TimeoutError, where that takes longer."""
    return each(seconds, lambda _: call(), [None])[0]


def allow_open(count: int):
    """Lets this process hold `count` files open: data sets keep theirs so, and C4 has 1,024, many systems' limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 1024 if hard == resource.RLIM_INFINITY else min(hard, count + 1024)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class _Steps(io.FileIO):
    """A file that is read a little at a time, so that its position tells how much of it has come out of gzip."""

    def readinto(self, buffer):
        return super().readinto(memoryview(buffer)[:STEP])


class Reader:
    """The documents of one file, in order, as pairs (line number from 1, record); record['text'] is never blank.

    jsonl is one JSON object a line with a field `text`, as C4's own files are. text is cut at blank lines into
    documents of at least 2,000 characters that, put together, are the file.

    After (and during) the iteration `empty` counts documents without text, `bad` the lines that were skipped because
    they could not be read, and `position` is how far the file has been read, in bytes as stored.

    Iterating raises DataError, naming file and line, for what is unreadable, for the line after the first `skip_bad`
    that are malformed, and for a file without any text, with the reason. What gzip cannot unpack is never skipped. A
    line of more than `largest` bytes is malformed, and never held whole.
    """

    def __init__(self, kind: str, path: str, skip_bad: int = 0, largest: int = LARGEST):
        self.empty = self.bad = self._number = self._end = 0
        self._raw = None
        self.skipped = []  # why, for the first few
        self._path, self._skip_bad, self._largest = path, skip_bad, largest
        self._records = {'jsonl': self._jsonl, 'text': self._text}[kind]

    @property
    def position(self) -> int:
        return self._raw.tell() if self._raw and not self._raw.closed else self._end

    def __iter__(self) -> Iterator[tuple[int, dict]]:
        nothing = True
        for number, record in self._records():
            if not record['text'].strip():
                self.empty += 1
                continue
            nothing = False
            yield number, record
        if nothing:
            raise DataError(f'{self._path}: no text in this file: {self._why()}')

    def _why(self):
        """Why there is no text."""
        if self.bad:
            return f'{self.bad} malformed lines, the first of them {self.skipped[0].removeprefix(f"{self._path}:")}'
        if self.empty:
            return f'{self.empty} documents, all of them blank'
        return f'{self._number} blank lines' if self._number else 'it is empty'

    def _lines(self):
        """Pairs (line number from 1, line with its end), UTF-8."""
        number = 0
        try:
            regular(self._path, DataError)
            with _Steps(self._path) as self._raw:
                packed = self._path.lower().endswith('.gz') or os.pread(self._raw.fileno(), 2, 0) == GZIP
                # igzip finds its lines in Python, a BufferedReader in C.
                unpacked = igzip.open(self._raw) if packed else self._raw
                lines = io.BufferedReader(unpacked)  # 8 kB: what one read unpacks before an error is lost, and its line
                try:
                    head = lines.peek()
                    for place, begin, what in FOREIGN:
                        if head.startswith(begin, place):
                            raise DataError(f'{self._path} is {what}')
                    for number, line in enumerate(iter(functools.partial(lines.readline, self._largest + 1), b''), 1):
                        self._number = number
                        if (text := self._decoded(number, line, lines)) is not None:
                            yield number, text
                finally:
                    self._end = self._raw.tell()
        except (OSError, EOFError, isal_zlib.error) as error:
            where = f'{self._path}:{number + 1}' if number else self._path
            raise DataError(f'{where}: cannot be read: {error}') from error

    def _decoded(self, number, line, lines):
        """The text of a line; None where it is left out. `lines` has the rest of one that is too long."""
        if len(line) > self._largest:
            self._skip(number, f'more than {self._largest:,} bytes in a line; {LONG}')
            while line and not line.endswith(b'\n'):
                line = lines.readline(STEP)
            return None
        try:
            return line.removeprefix(b'\xef\xbb\xbf').decode() if number == 1 else line.decode()
        except UnicodeDecodeError as error:
            self._skip(number, f'not UTF-8: {error.reason} at byte {error.start} of the line')

    def _skip(self, number, problem):
        if self.bad >= self._skip_bad:
            raise DataError(f'{self._path}:{number}: {problem}')
        self.bad += 1
        self.skipped = [*self.skipped, f'{self._path}:{number}: {problem}'][:5]

    def _text(self):
        """Pieces of the file; the last, shorter than the others, joins the one before it."""
        before, piece, first = None, [], 1
        length = 0
        for number, line in self._lines():
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

    def _jsonl(self):
        right = False  # whether there was a record, so that the file is of this form
        for number, line in self._lines():
            if not line.strip():
                continue
            try:
                record = orjson.loads(line)
            except ValueError as error:
                problem = f'not JSON: {str(error).partition(":")[0]}' + ('' if right else f'; {FORMS}')
            else:
                problem = _problem(record)
            if problem:
                self._skip(number, problem if right or line.lstrip()[0] != '[' else f'{problem}; {ARRAY}')
                continue
            right = True
            yield number, record


def _problem(record):
    if not isinstance(record, dict):
        return f'a JSON object with a field `text` is needed, not {type(record).__name__}'
    if not isinstance(record.get('text'), str):
        fields = [*list(record)[:8], *(['...'] if len(record) > 8 else [])]
        return f'no field `text` that is a string (fields: {", ".join(fields) or "none"})'
    return None

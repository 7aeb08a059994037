"""Documents from files: JSON lines and plain text, through gzip if the name ends in .gz, one after the other."""

import glob
import io
import os
import queue
import resource
import threading
from collections.abc import Callable, Iterable, Iterator

import orjson
from isal import igzip, isal_zlib

from mixln_jax.exits import DataError

PIECE = 2000  # characters of a text document, at least
STEP = 2**15  # bytes
AT_ONCE = 32  # calls that wait for answers
LONGEST = 10**7  # characters after which a text document without a blank line ends with the next line


def paths(patterns: str) -> list[str]:
    """The files that comma-separated paths and globs name, sorted. Raises DataError for one that names none."""
    parts = [os.path.expanduser(part.strip()) for part in patterns.split(',') if part.strip()]
    if not parts:
        raise DataError('config.data.path is empty; this source needs files')
    found = set()
    for pattern in parts:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not matches:
            raise DataError(f'config.data.path: there is no file {pattern}')
        for path in matches:
            if os.path.isdir(path):
                raise DataError(f'config.data.path: {path} is a folder; name its files, for instance {path}/*')
        found.update(matches)
    return sorted(found)


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
            except Exception as error:
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
    that are malformed, and for a file without any text. What gzip cannot unpack is never skipped.
    """

    def __init__(self, kind: str, path: str, skip_bad: int = 0):
        self.empty = self.bad = self._end = 0
        self._raw = None
        self.skipped = []  # why, for the first few
        self._path, self._skip_bad = path, skip_bad
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
            raise DataError(f'{self._path}: no text in this file')

    def _lines(self):
        """Pairs (line number from 1, line with its end), UTF-8."""
        number = 0
        try:
            with _Steps(self._path) as self._raw:
                # igzip finds its lines in Python, a BufferedReader in C.
                unpacked = igzip.open(self._raw) if self._path.endswith('.gz') else self._raw
                lines = io.BufferedReader(unpacked)  # 8 kB: what one read unpacks before an error is lost, and its line
                try:
                    for number, line in enumerate(lines, 1):
                        try:
                            text = line.removeprefix(b'\xef\xbb\xbf').decode() if number == 1 else line.decode()
                        except UnicodeDecodeError as error:
                            self._skip(number, f'not UTF-8: {error.reason} at byte {error.start} of the line')
                            continue
                        yield number, text
                finally:
                    self._end = self._raw.tell()
        except (OSError, EOFError, isal_zlib.error) as error:
            where = f'{self._path}:{number + 1}' if number else self._path
            raise DataError(f'{where}: cannot be read: {error}') from error

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
        yield first, {'text': rest}

    def _jsonl(self):
        for number, line in self._lines():
            if not line.strip():
                continue
            try:
                record = orjson.loads(line)
            except ValueError as error:
                self._skip(number, f'not JSON: {str(error).partition(":")[0]}')
                continue
            if problem := _problem(record):
                self._skip(number, problem)
                continue
            yield number, record


def _problem(record):
    if not isinstance(record, dict):
        return f'a JSON object with a field `text` is needed, not {type(record).__name__}'
    if not isinstance(record.get('text'), str):
        return f'no field `text` that is a string (fields: {", ".join(record) or "none"})'
    return None

"""Documents from files, and which of them are for validation."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import pathlib
import pickle
import resource
import tarfile
import threading
import time
import tracemalloc
import zipfile

import numpy as np
import pyarrow.parquet
import pytest
from corpora import documents, fields, write

from mixln_jax import config
from mixln_jax.data import sources, text_files
from mixln_jax.system.errors import DataError


def options(path, source='jsonl'):
    return config.Data(source=source, path=str(path))


def both(data):
    return documents(data, 'train') + documents(data, 'validation')


class TestReader:
    @pytest.mark.parametrize('name', ['a.jsonl', 'a.json', 'c4.00000.json.gz'])
    def test_jsonl(self, tmp_path, name):
        texts = [f'Text {i}, größer 🙂\u2028\n' for i in range(50)]
        records = list(text_files.Reader('jsonl', str(write(tmp_path / name, texts))))
        assert records == [(i + 1, {'text': text} | fields(i)) for i, text in enumerate(texts)]

    def test_text_loses_nothing(self, tmp_path):
        paragraphs = [f'{i} é\r\n' * (200 + i) + ' \n\n' for i in range(12)] + ['end']
        content = ''.join(paragraphs)
        (tmp_path / 'a.txt').write_bytes(content.encode())
        (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(content.encode()))
        records = list(text_files.Reader('text', str(tmp_path / 'a.txt')))
        pieces = [record['text'] for _, record in records]
        assert ''.join(pieces) == content
        assert len(pieces) > 3 and all(len(piece) >= text_files.PIECE for piece in pieces)
        assert [line for line, _ in records] == [
            1 + ''.join(pieces[:i]).count('\n') for i in range(len(pieces))
        ]  # where each begins
        assert list(text_files.Reader('text', str(tmp_path / 'a.txt.gz'))) == records

    def test_text_without_blank_lines_is_cut_all_the_same(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text_files, 'LONGEST', 5000)
        (tmp_path / 'a.txt').write_text('ten letters\n' * 1000)
        lengths = [len(record['text']) for _, record in text_files.Reader('text', str(tmp_path / 'a.txt'))]
        assert sum(lengths) == 12_000 and lengths[0] == 5004 and all(length < 10_008 for length in lengths)

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        (tmp_path / 'a').write_bytes(b'\xef\xbb\xbf{"text": "a"}\n')
        assert list(text_files.Reader('jsonl', str(tmp_path / 'a'))) == [(1, {'text': 'a'})]
        (tmp_path / 'a').write_text('\ufeffone\n\ufefftwo\n')
        assert list(text_files.Reader('text', str(tmp_path / 'a'))) == [(1, {'text': 'one\n\ufefftwo\n'})]

    @pytest.mark.parametrize('kind', ['jsonl', 'text'])
    def test_a_long_line(self, tmp_path, kind):
        text = 'größer ' * 2_500_000
        (tmp_path / 'a').write_text(json.dumps({'text': text}, ensure_ascii=False) if kind == 'jsonl' else text)
        [(line, record)] = text_files.Reader(kind, str(tmp_path / 'a'))
        assert line == 1 and record['text'] == text

    def test_documents_without_text_are_counted(self, tmp_path):
        reader = text_files.Reader('jsonl', str(write(tmp_path / 'a.jsonl', ['a', '', ' \n', 'b', '\u00a0'])))
        assert [(line, record['text']) for line, record in reader] == [(1, 'a'), (4, 'b')]
        assert (reader.empty, reader.bad) == (3, 0)

    @pytest.mark.parametrize('name', ['a.jsonl', 'a.json.gz'])
    def test_position(self, tmp_path, name):
        rng = np.random.default_rng(0)
        path = write(tmp_path / name, [rng.bytes(5000).hex() for _ in range(500)])
        reader = text_files.Reader('jsonl', str(path))
        positions = [reader.position, *(reader.position for _ in reader)]
        assert positions == sorted(positions) and positions[0] == 0 and len(set(positions)) > 3
        assert reader.position == path.stat().st_size

    GOOD = b'{"text": "good"}\n'
    BAD = {
        'not JSON': (GOOD + b'{"text": \n', ':2: not JSON'),
        'nested too deep': (GOOD + b'[' * 100_000, ':2: not JSON'),
        'a long number': (GOOD + b'{"text": %s}' % (b'1' * 5000), ':2: not JSON'),
        'not an object': (GOOD + b'["text"]\n', ':2: .*list'),
        'no text': (GOOD + b'\n{"texts": "x"}\n', ':3: .*texts'),
        'no fields': (GOOD + b'{}', ':2: .*none'),
        'text not a string': (GOOD + b'{"text": 7}\n', ':2: no field `text` that is a string'),
        'half a character': (GOOD + b'{"text": "\\ud800"}\n', ':2: not JSON: .*surrogate'),
        'not UTF-8': (GOOD + GOOD + b'{"text": "\xff"}\n', ':3: not UTF-8.* byte 10 '),
    }

    @pytest.mark.parametrize('content, message', BAD.values(), ids=BAD)
    def test_bad_lines(self, tmp_path, content, message):
        path = tmp_path / 'bad.jsonl'
        path.write_bytes(content)
        with pytest.raises(DataError, match=f'^{path}{message}') as caught:
            list(text_files.Reader('jsonl', str(path)))
        assert '\n' not in str(caught.value)
        path.write_bytes(content + b'\n' + self.GOOD)
        reader = text_files.Reader('jsonl', str(path), skip_bad=1)
        assert {record['text'] for _, record in reader} == {'good'}
        assert reader.bad == 1 and reader.skipped == [str(caught.value)]

    def test_so_many_bad_lines_are_skipped_and_no_more(self, tmp_path):
        (tmp_path / 'a.jsonl').write_bytes((self.GOOD + b'{\n') * 7)
        reader = text_files.Reader('jsonl', str(tmp_path / 'a.jsonl'), skip_bad=7)
        assert [line for line, _ in reader] == [1, 3, 5, 7, 9, 11, 13]
        assert reader.bad == 7 and len(reader.skipped) == 5
        reader, lines = text_files.Reader('jsonl', str(tmp_path / 'a.jsonl'), skip_bad=6), []
        with pytest.raises(DataError, match=':14: not JSON'):
            lines.extend(line for line, _ in reader)
        assert len(lines) == 7

    def test_bad_text(self, tmp_path):
        (tmp_path / 'bad.txt').write_bytes(b'good\n' * 6 + b'caf\xe9\n' + b'more')
        with pytest.raises(DataError, match=r'bad.txt:7: not UTF-8.* byte 3 '):
            list(text_files.Reader('text', str(tmp_path / 'bad.txt')))
        reader = text_files.Reader('text', str(tmp_path / 'bad.txt'), skip_bad=1)
        assert list(reader) == [(1, {'text': 'good\n' * 6 + 'more'})]

    NO_FIELD = '2 malformed lines, the first of them 2: no field `text` that is a string (fields: content)'
    NOTHING = [
        ('jsonl', b'', 'it is empty'),
        ('jsonl', b'\n \n', '2 blank lines'),
        ('jsonl', b'\xef\xbb\xbf', '1 blank lines'),
        ('jsonl', b'{"text": ""}\n{"text": " "}\n', '2 documents, all of them blank'),
        ('jsonl', b'\n{"content": "a"}\n{"content": "b"}\n', NO_FIELD),
        ('jsonl', b'\n{"content": "a"}\n{"text": ""}\nno\n', NO_FIELD),
        ('text', b'', 'it is empty'),
        ('text', b'\n \n', '1 documents, all of them blank'),
    ]

    @pytest.mark.parametrize('packed', [False, True])
    @pytest.mark.parametrize('kind, content, why', NOTHING)
    def test_no_text_at_all(self, tmp_path, kind, content, why, packed):
        (tmp_path / 'a').write_bytes(gzip.compress(content) if packed else content)
        with pytest.raises(DataError) as caught:
            list(text_files.Reader(kind, str(tmp_path / 'a'), skip_bad=2))
        assert str(caught.value) == f'{tmp_path}/a: no text in this file: {why}'

    def test_gzip_is_told_by_its_first_bytes(self, tmp_path):
        for name in ('a.json', 'a.txt', 'a.JSONL.GZ', 'a.jsonl.gz'):
            (tmp_path / name).write_bytes(gzip.compress(self.GOOD * 2))
            assert [line for line, _ in text_files.Reader('jsonl', str(tmp_path / name))] == [1, 2]
            assert list(text_files.Reader('text', str(tmp_path / name))) == [(1, {'text': (self.GOOD * 2).decode()})]

    FORMS = 'the source jsonl reads lines that are objects with a field `text`, the source text reads plain text'
    OTHERS = {
        'plain text': ('One line.\nAnd one more.\n', f'1: not JSON: .*; {FORMS}$'),
        'a table': ('text,label\na,1\n', f'1: not JSON: .*; {FORMS}$'),
        'one object': ('\n{\n "text": "a"\n}\n', f'2: not JSON: .*; {FORMS}$'),
        'an array': ('[{"text": "a"}, {"text": "b"}]\n', r"1: .*not list; is the file a JSON array\? jq -c '\.\[\]'"),
        'an array of lines': ('[\n{"text": "a"},\n{"text": "b"}\n]\n', '1: not JSON: .*; is the file a JSON array'),
        'one line': ('{"text": "a"}\n\nb\n', '3: not JSON: [^;]*$'),
    }

    @pytest.mark.parametrize('content, message', OTHERS.values(), ids=OTHERS)
    def test_what_is_no_jsonl_is_told_what_is(self, tmp_path, content, message):
        (tmp_path / 'a.json').write_text(content)
        with pytest.raises(DataError, match=f'^{tmp_path}/a.json:{message}'):
            list(text_files.Reader('jsonl', str(tmp_path / 'a.json')))

    @staticmethod
    def packed(how, content, path):
        """`content` at `path` in another form than files have here."""
        if how == 'lz4':
            with pyarrow.CompressedOutputStream(str(path), how) as file:
                file.write(content)
        elif how == 'zip':
            with zipfile.ZipFile(path, 'w') as archive:
                archive.writestr('a', content)
        elif how.startswith('tar'):
            (path.parent / 'member').write_bytes(content)
            with tarfile.open(path, 'w:gz' if how == 'tar.gz' else 'w') as archive:
                archive.add(path.parent / 'member', 'a')
        elif how == 'parquet':
            pyarrow.parquet.write_table(pyarrow.table({'text': [content.decode()]}), path)
        elif how == 'Arrow':
            table = pyarrow.table({'text': [content.decode()]})
            with pyarrow.ipc.new_file(str(path), table.schema) as file:
                file.write(table)
        else:
            forms = {'gzip': lambda b: gzip.compress(gzip.compress(b)), 'xz': lzma.compress, 'bzip2': bz2.compress}
            path.write_bytes(forms.get(how, lambda b: b.decode().encode(how))(content))
        return str(path)

    @pytest.mark.parametrize('kind', ['jsonl', 'text'])
    @pytest.mark.parametrize(
        'how', ['gzip', 'lz4', 'xz', 'bzip2', 'zip', 'tar', 'tar.gz', 'parquet', 'Arrow', 'UTF-16', 'UTF-32']
    )
    def test_other_forms_are_named(self, tmp_path, kind, how):
        """Whatever their names, and none of their bytes is skipped as malformed."""
        path = self.packed(how, self.GOOD * 3, tmp_path / 'a.jsonl')
        with pytest.raises(DataError, match=f'^{path} is .*{how.removesuffix(".gz")}.*; (unpack|decompress|write) it'):
            list(text_files.Reader(kind, path, skip_bad=10**9))

    @pytest.mark.parametrize('name', ['a.jsonl.zst', 'a'])
    def test_zstd(self, tmp_path, name):
        """Of one frame or several; cut short anywhere it is an error."""
        path = tmp_path / name
        with pyarrow.CompressedOutputStream(str(path), 'zstd') as file:
            file.write(self.GOOD * 3)
        wanted, frame = list(text_files.Reader('jsonl', str(path))), path.read_bytes()
        assert len(wanted) == 3 and text_files.kind(str(path)) == 'jsonl'
        path.write_bytes(frame * 2)
        assert len(list(text_files.Reader('jsonl', str(path)))) == 6
        for content in (*(frame[:length] for length in range(4, len(frame))), frame + b'rubbish'):
            path.write_bytes(content)
            with pytest.raises(DataError, match=f'^{path}.*: cannot be read: '):
                list(text_files.Reader('jsonl', str(path), skip_bad=10**9))

    @pytest.mark.parametrize('begin', ['BZh91', 'PK', 'PAR1 and PAR2', '7z', 'ustar', 'ARROW1', '\u04ff'])
    def test_texts_that_begin_like_them_are_read(self, tmp_path, begin):
        (tmp_path / 'a').write_text(begin)
        assert list(text_files.Reader('text', str(tmp_path / 'a'))) == [(1, {'text': begin})]

    WHOLE = gzip.compress(GOOD * 2 + b'{"text": "%s"}\n' % np.random.default_rng(0).bytes(50_000).hex().encode())
    BAD_GZIP = {
        'truncated': (WHOLE[:-20], ':3'),
        'truncated early': (WHOLE[:5], ''),
        'no gzip': (GOOD, ''),
        'bad deflate': (WHOLE[:10] + b'\xff' * 1000, ''),
        'bad checksum': (WHOLE[:-8] + b'\0' * 8, ':3'),
        'rubbish after': (WHOLE + b'rubbish', ':3'),
    }

    @pytest.mark.parametrize('skip_bad', [0, 10**9])
    @pytest.mark.parametrize('content, line', BAD_GZIP.values(), ids=BAD_GZIP)
    @pytest.mark.parametrize('kind', ['jsonl', 'text'])
    def test_bad_gzip_is_never_skipped(self, tmp_path, kind, content, line, skip_bad):
        (tmp_path / 'bad.json.gz').write_bytes(content)
        with pytest.raises(DataError, match=f'bad.json.gz{line}: cannot be read'):
            list(text_files.Reader(kind, str(tmp_path / 'bad.json.gz'), skip_bad))

    def test_gzip_cut_short_anywhere(self, tmp_path):
        path, member = tmp_path / 'a.json.gz', gzip.compress(self.GOOD * 2)
        path.write_bytes(2 * member)
        assert [line for line, _ in text_files.Reader('jsonl', str(path))] == [1, 2, 3, 4]
        for length in set(range(2 * len(member))) - {len(member)}:
            path.write_bytes((2 * member)[:length])
            with pytest.raises(DataError, match='a.json.gz.*: cannot be read' if length else 'no text'):
                list(text_files.Reader('jsonl', str(path), skip_bad=1))

    @pytest.mark.skipif(not pathlib.Path('/proc/self/mem').exists(), reason='needs a file that opens and is unreadable')
    @pytest.mark.parametrize('path', ['/proc/self/mem', '/proc/self', '/proc/none'])
    def test_unreadable(self, path):
        with pytest.raises(DataError, match=f'{path}: cannot be read'):
            list(text_files.Reader('text', path))


class TestBounds:
    """What one line, or what is no file, may take."""

    @pytest.mark.parametrize('kind', ['jsonl', 'text'])
    @pytest.mark.parametrize('packed', [False, True])
    def test_a_line_that_is_too_long_is_never_held(self, kind, packed, tmp_path):
        good = b'{"text": "a"}\n'
        content = good + bytes(3 * 10**7) + b'\n' + good
        path = tmp_path / ('a.gz' if packed else 'a')
        path.write_bytes(gzip.compress(content, 1) if packed else content)
        with pytest.raises(DataError, match=rf'^{path}:2: more than 100,000 bytes in a line; data.prepare .*--max_doc'):
            list(text_files.Reader(kind, str(path), largest=10**5))
        tracemalloc.start()
        reader = text_files.Reader(kind, str(path), skip_bad=1, largest=10**5)
        found = ''.join(record['text'] for _, record in reader)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert reader.bad == 1 and found == ('aa' if kind == 'jsonl' else (2 * good).decode()) and most < 10**6

    @pytest.mark.parametrize('end', [b'\n', b''])
    def test_the_longest_line(self, end, tmp_path):
        (tmp_path / 'a').write_bytes(b'abc' + end)
        length = 3 + len(end)
        assert len(list(text_files.Reader('text', str(tmp_path / 'a'), largest=length))) == 1
        with pytest.raises(DataError, match=f'a:1: more than {length - 1} bytes'):
            list(text_files.Reader('text', str(tmp_path / 'a'), largest=length - 1))

    @pytest.mark.parametrize('source', ['jsonl', 'text'])
    def test_regular_files_only(self, source, tmp_path):
        os.mkfifo(tmp_path / 'pipe')
        for path, what in ((tmp_path / 'pipe', 'a pipe'), ('/dev/zero', 'a device')):
            with pytest.raises(DataError, match=f'{path}: cannot be read: it is {what}, not a file'):
                text_files.paths_of_source(source, str(path))
            with pytest.raises(DataError, match=f'it is {what}'):
                list(text_files.Reader(source, str(path)))

    @pytest.mark.parametrize('line', [b'[' * 10**6, b'{"text":' * 10**5, b'{"text": %s}' % (b'9' * 5000)])
    def test_odd_json(self, line, tmp_path):
        (tmp_path / 'a').write_bytes(line)
        with pytest.raises(DataError, match='a:1: '):
            list(text_files.Reader('jsonl', str(tmp_path / 'a')))


def test_a_thread_that_panics_is_heard():
    class Panic(BaseException):
        pass

    def fail(_):
        raise Panic

    with pytest.raises(Panic):
        text_files.call_each(5, fail, [1])


class TestPaths:
    def test_sorted_and_once(self, tmp_path, monkeypatch):
        names = [str(tmp_path / name) for name in ('a.txt', 'b.txt', 'c[1].txt')]
        for name in names:
            pathlib.Path(name).touch()
        monkeypatch.setenv('HOME', str(tmp_path))
        assert text_files.paths(f'{tmp_path}/*') == names
        assert text_files.paths(f'~/c[1].txt, {tmp_path}/b.txt,~/[ab].txt,') == names

    @pytest.mark.parametrize(
        'patterns, message',
        [
            ('', 'config.data.path is empty'),
            (' , ', 'config.data.path is empty'),
            ('{}/a,{}/none.jsonl', 'no file .*none.jsonl'),
            ('{}/none*.jsonl', r'no file .*none\*.jsonl'),
            ('{}', 'is a folder'),
            ('{}/*', 'folder is a folder'),
            (
                '{}/a,gs://bucket/*.jsonl',
                'config.data.path: gs://bucket/.*not a file of this machine; copy it here first',
            ),
            ('{}/nowhere', 'nowhere: cannot be read: No such file'),
            ('{}/nowher*', 'nowhere: cannot be read: No such file'),
        ],
    )
    def test_bad(self, tmp_path, patterns, message):
        (tmp_path / 'folder').mkdir()
        (tmp_path / 'a').touch()
        (tmp_path / 'nowhere').symlink_to(tmp_path / 'none')
        with pytest.raises(DataError, match=message):
            text_files.paths(patterns.replace('{}', str(tmp_path)))

    NAMES = ['a.txt', './a.txt', '{}/a.txt', 'folder/../a.txt', '~/a.txt', 'link.txt', 'hard.txt', 'linked/a.txt',
             'a.*', '[a]*.txt', '**/a.txt', './a.txt,a.txt']  # fmt: skip

    @pytest.mark.parametrize('name', NAMES)
    def test_a_file_of_many_names_is_one(self, tmp_path, monkeypatch, name):
        (tmp_path / 'folder').mkdir()
        (tmp_path / 'a.txt').write_text('a')
        (tmp_path / 'b.txt').write_text('a')  # a copy is another file
        (tmp_path / 'link.txt').symlink_to('a.txt')
        (tmp_path / 'hard.txt').hardlink_to(tmp_path / 'a.txt')
        (tmp_path / 'linked').symlink_to(tmp_path)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv('HOME', str(tmp_path))
        name = name.replace('{}', str(tmp_path))
        for patterns in (f'b.txt,a.txt,{name}', f'{name},a.txt,./b.txt'):
            found = text_files.paths(patterns)
            assert [pathlib.Path(path).resolve().samefile(tmp_path / 'a.txt') for path in found] in (
                [True, False],
                [False, True],
            )
            assert found == sorted(found)

    def test_allow_open(self, open_files):
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        text_files.allow_open(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1124, before[1])
        text_files.allow_open(50)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1124, before[1])


LINES = '{"text": "one"}\n{"text": "two"}\n'


class TestKinds:
    @pytest.mark.parametrize(
        'name, content, kind',
        [
            *((name, 'x', 'jsonl') for name in ('a.jsonl', 'a.json', 'A.NDJSON', 'a.jsonl.gz', 'a.Json.Gz')),
            *((name, 'x', 'text') for name in ('a.txt', 'a', 'json', 'a.json.txt', 'a.csv')),
            *((name, LINES, 'jsonl') for name in ('a.txt', 'a', 'a.jsonl.1', 'a.dump')),
            ('a', f'\ufeff \n\n{LINES}', 'jsonl'),
            ('a', '{"content": 7}', 'jsonl'),
            # What json.dumps writes and nothing reads, and what is no object a line: their reader says so.
            *(
                ('a', begin + LINES, 'jsonl')
                for begin in ('{"text": NaN}\n', '{"text": "\\ud800"}\n', '{"te\n', '# 1\n')
            ),
            *(
                ('a', text, 'jsonl')
                for text in ('[{"text": "a"}]', '[\n{"text": "a"}]', '{\n "text": "a"\n}', '["a"]\n')
            ),
            ('a', '[1]\n', 'text'),
            ('a', '# include <a.h>\nint main()\n{\n', 'text'),
            ('a', '"Hello," he said.', 'text'),
            ('a', '[A note] [', 'text'),
            ('a', '{1, 2} is a set\n{"text": "one"}\n', 'text'),
            ('a', '', 'text'),
            ('a', ' \n', 'text'),
        ],
    )
    def test_by_name_else_by_the_first_line(self, tmp_path, name, content, kind):
        (tmp_path / name).write_text(content)
        assert text_files.kind(str(tmp_path / name)) == kind
        if not name.lower().endswith('.gz'):
            (tmp_path / name).write_bytes(gzip.compress(content.encode()))
            assert text_files.kind(str(tmp_path / name)) == kind

    def test_a_source_of_text_refuses_json(self, tmp_path):
        (tmp_path / 'a.txt').write_text('One text.\n' * 1000)
        (tmp_path / 'b').write_text(LINES)
        assert documents(options(tmp_path / 'a.txt', 'text'), 'all') == ['One text.\n' * 1000]
        for files_ in ('b', '*'):
            with pytest.raises(DataError, match=f'{tmp_path}/b is JSON lines, not plain text; the source jsonl reads'):
                sources.open_source(options(tmp_path / files_, 'text'), 'train')

    def test_one_kind_at_a_time(self, tmp_path):
        names = [str(write(tmp_path / name, ['x'])) for name in ('a.json', 'b.ndjson', 'c')]
        assert text_files.kind_of_all(names) == 'jsonl'
        (tmp_path / 'README').write_text('About a, b and c.')
        assert text_files.kind_of_all([f'{tmp_path}/README']) == 'text'
        with pytest.raises(
            DataError, match=f'{names[0]} is JSON lines and {tmp_path}/README plain text; name files of'
        ):
            text_files.kind_of_all([*names, f'{tmp_path}/README'])


class TestEach:
    def test_answers_in_order(self, monkeypatch):
        monkeypatch.setattr(text_files, 'AT_ONCE', 3)
        assert text_files.call_each(None, lambda i: time.sleep(0.001 * (7 - i)) or i * i, range(7)) == [
            0,
            1,
            4,
            9,
            16,
            25,
            36,
        ]
        assert text_files.call_each(None, str, []) == []

    def test_an_error_ends_the_others(self, monkeypatch):
        monkeypatch.setattr(text_files, 'AT_ONCE', 1)
        done = []

        def work(i):
            done.append(i)
            if i == 2:
                raise ValueError('two')

        with pytest.raises(ValueError, match='two'):
            text_files.call_each(None, work, range(10_000))
        assert done == [0, 1, 2]

    def test_no_answer_names_what_was_asked(self):
        free = threading.Event()
        with pytest.raises(text_files.NoAnswer, match=r'^no answer within 0.2 s$') as caught:
            text_files.call_each(0.2, lambda i: free.wait() if i in (3, 5) else i, range(40))
        assert caught.value.item == 3
        free.set()

    def test_as_long_as_some_end_the_others_may_take_their_time(self, monkeypatch):
        monkeypatch.setattr(text_files, 'AT_ONCE', 1)
        assert text_files.call_each(1.0, lambda i: time.sleep(0.2) or i, range(8)) == list(range(8))

    def test_threads_end(self):
        before = threading.active_count()
        for _ in range(50):
            text_files.call_each(10, str, range(8))
        deadline = time.monotonic() + 10
        while threading.active_count() > before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


class TestSplit:
    @staticmethod
    def held_out(ranks, one_in):
        """The definition: one in so many, at least 20 different ones, or half of fewer than 40; never all."""
        different = sorted(set(ranks))
        share = sum(rank < 2**64 // one_in for rank in different)
        count = max(share, min(20, len(different) // 2))
        return set(different[: min(count, len(different) - 1)])

    @pytest.mark.parametrize('one_in', [2, 20, 100])
    def test_first_for_training(self, one_in):
        rng = np.random.default_rng(one_in)
        for count in [*range(2, 50), 200, 1000, 1999, 2000, 2100, 5000]:
            pool = rng.integers(0, 2**64, count, np.uint64).tolist()
            ranks = pool[:2] + rng.choice(np.array(pool, object), 2 * count).tolist()
            first = sources.first_for_training(iter(ranks), one_in)
            assert {rank for rank in ranks if rank < first} == self.held_out(ranks, one_in), count

    def test_first_for_training_reads_no_further_than_it_must(self):
        read, share = [], 2**64 // 100
        ranks = (sources.rank(b'%d' % i) for i in itertools.count())
        assert sources.first_for_training((read.append(rank) or rank for rank in ranks), 100) == share
        assert sum(rank < share for rank in read) == 20 and read[-1] < share

    def test_it_stays_the_same_forever(self):
        """What is prepared with any later version is split alike: this number must never change."""
        assert sources.rank(b'text') == 5145922347574273553

    @pytest.mark.parametrize('count', [2, 3, 39, 40, 5000])
    def test_sizes(self, tmp_path, count):
        data = options(write(tmp_path / 'a.jsonl', map(str, range(count))))
        train, validation = documents(data, 'train'), documents(data, 'validation')
        assert sorted(train + validation) == sorted(map(str, range(count)))
        assert (len(validation) == min(20, count // 2)) if count <= 40 else 30 < len(validation) < 70

    def test_depends_neither_on_order_nor_on_other_files(self, tmp_path):
        texts = [str(i) for i in range(4000)]
        data = options(write(tmp_path / 'a.jsonl', texts))
        reverse = options(write(tmp_path / 'b.jsonl', texts[::-1]))
        more = options(write(tmp_path / 'c.jsonl', [f'{i}' for i in range(9000)]))
        validation = documents(data, 'validation')
        assert documents(reverse, 'validation') == validation[::-1]
        assert set(documents(more, 'validation')) & set(texts) == set(validation)

    def test_equal_texts_are_on_one_side(self, tmp_path):
        data = options(write(tmp_path / 'a.jsonl', [str(i % 10) for i in range(100)]))
        train, validation = documents(data, 'train'), documents(data, 'validation')
        assert not set(train) & set(validation) and len(train) == len(validation) == 50

    @pytest.mark.parametrize(
        'count, holds',
        [(1, 'only one document'), (2, '2 documents, all with the same text'), (5000, '5,000 documents, all')],
    )
    def test_equal_documents_cannot_be_split(self, tmp_path, count, holds):
        with pytest.raises(DataError, match=f'^config.data.path holds {holds}.*; two different documents are needed'):
            sources.open_source(options(write(tmp_path / 'a.jsonl', ['same'] * count)), 'train')


class TestTexts:
    def test_both_kinds_in_the_order_of_their_files(self, tmp_path):
        for name in 'ba':
            write(tmp_path / f'{name}.jsonl', [f'{name}{i:02}' for i in range(50)])
        data = options(f'{tmp_path}/*')
        assert documents(data, 'train') == sorted(documents(data, 'train'))
        assert sorted(both(data)) == [f'{name}{i:02}' for name in 'ab' for i in range(50)]
        paragraphs = [f'{name} {i} ' * 500 + '\n\n' for name in 'dc' for i in range(3)]
        for name, start in (('d', 0), ('c', 3)):
            (tmp_path / f'{name}.txt').write_text(''.join(paragraphs[start : start + 3]))
        assert documents(options(f'{tmp_path}/*.txt', 'text'), 'all') == paragraphs[3:] + paragraphs[:3]

    def test_a_file_named_twice_is_read_once(self, tmp_path, monkeypatch):
        write(tmp_path / 'a.jsonl', map(str, range(50)))
        monkeypatch.chdir(tmp_path)
        once, twice = (sources.open_source(options(path), 'all') for path in ('a.jsonl', './a.jsonl,*.jsonl'))
        assert len(twice) == 50 and twice.fingerprint == once.fingerprint

    def test_origin(self, tmp_path):
        write(tmp_path / 'a.jsonl', [f'a.jsonl:{line}' if line % 3 else ' ' for line in range(1, 50)])
        write(tmp_path / 'b.jsonl', [f'b.jsonl:{line}' for line in range(1, 50)])
        for split in ('train', 'validation'):
            source = sources.open_source(options(f'{tmp_path}/*'), split)
            assert [source.origin(i) for i in range(len(source))] == [f'{tmp_path}/{text}' for text in source]
            assert source.__getitems__([3, 0, 3]) == [source[3], source[0], source[3]]
            with pytest.raises(IndexError):
                source[len(source)]

    def test_both_splits_come_from_one_reading(self, tmp_path, monkeypatch):
        opened = []
        monkeypatch.setattr(
            text_files, 'Reader', lambda *args: opened.append(args) or [(1, {'text': 'a'}), (2, {'text': 'b'})]
        )
        (tmp_path / 'a.jsonl').touch()
        assert sorted(both(options(tmp_path / 'a.jsonl'))) == ['a', 'b']
        assert len(opened) == 1
        os.utime(tmp_path / 'a.jsonl', (0, 0))
        both(options(tmp_path / 'a.jsonl'))
        assert len(opened) == 2

    def test_pickle(self, tmp_path):
        source = sources.open_source(options(write(tmp_path / 'a.jsonl', ['é', 'b', 'c', 'd'])), 'train')
        copy = pickle.loads(pickle.dumps(source))
        assert list(copy) == list(source) and copy.fingerprint == source.fingerprint
        assert copy.origin(1) == source.origin(1)

    def test_fingerprint(self, tmp_path):
        def fingerprint(name, texts, split='train'):
            return sources.open_source(options(write(tmp_path / name, texts)), split).fingerprint

        texts = [f'text {i}' for i in range(50)]
        first = fingerprint('a.jsonl', texts)
        assert int(first, 16) and first == fingerprint('b.jsonl', texts)
        others = [
            fingerprint('a.jsonl', texts, 'validation'),
            fingerprint('c.jsonl', texts[::-1]),
            fingerprint('d.jsonl', [text + ' ' for text in texts]),
            fingerprint('e.jsonl', texts + ['one more']),
        ]
        assert len({first, *others}) == 5

    @pytest.mark.parametrize('kind', ['jsonl', 'text'])
    def test_too_much(self, tmp_path, monkeypatch, kind):
        path = write(tmp_path / 'large', ['good'] * 5)
        if kind == 'text':
            path.write_text('good' * 5)
        monkeypatch.setattr(sources, 'LARGEST', 15)
        with pytest.raises(DataError, match=r'more than .* GB of text.*data.prepare'):
            sources.open_source(options(path, kind), 'train')

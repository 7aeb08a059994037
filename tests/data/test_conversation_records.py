"""Files of records: the shapes that are read, and what is wrong with others, by file and line."""

import gzip
import json

import pyarrow
import pytest

from mixln_jax.data import records
from mixln_jax.system.errors import DataError

ALPACA = {'instruction': 'Add.', 'input': '1 2', 'output': '3', 'answer': 3}
PAIR = {'prompt': 'Hi ', 'completion': 'yo'}
CHAT = {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'yo', 'thinking': 'hm'}]}


def write(path, content):
    """Records as JSON lines, or text as it is."""
    if not isinstance(content, str):
        content = ''.join(json.dumps(record) + '\n' for record in content)
    path.write_bytes(content.encode())
    return str(path)


def read(*paths):
    return [(conversation.messages, conversation.origin) for conversation in records.read(paths)]


def test_instructions(tmp_path):
    path = write(tmp_path / 'a.jsonl', [ALPACA, {'instruction': 'Go.', 'output': 'no'}])
    given = {'role': 'user', 'content': 'Add.\n\n1 2', 'instruction': 'Add.', 'input': '1 2'}
    alone = {'role': 'user', 'content': 'Go.', 'instruction': 'Go.', 'input': ''}
    assert read(path) == [
        ([given, {'role': 'assistant', 'content': '3'}], f'{path}:1'),
        ([alone, {'role': 'assistant', 'content': 'no'}], f'{path}:2'),
    ]


def test_pairs_and_blank_lines(tmp_path):
    path = write(tmp_path / 'a', '\n' + json.dumps(PAIR) + '\n\n' + json.dumps(PAIR))
    messages = [{'role': 'user', 'content': 'Hi '}, {'role': 'assistant', 'content': 'yo'}]
    assert read(path, path) == 2 * [(messages, f'{path}:2'), (messages, f'{path}:4')]


def test_messages_are_kept_whole(tmp_path):
    path = write(tmp_path / 'a.json', [CHAT])
    assert read(path) == [(CHAT['messages'], f'{path}:1')]


@pytest.mark.parametrize('indent', [None, 2])
def test_arrays(tmp_path, indent):
    path = write(
        tmp_path / 'a.json', '\n ' + json.dumps([PAIR, PAIR | {'prompt': 'a\n'}, PAIR], indent=indent) + '\n\n'
    )
    lines = [2, 2, 2] if indent is None else [3, 7, 11]
    assert [origin for _, origin in read(path)] == [f'{path}:{line}' for line in lines]


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.json.gz', 'a.jsonl.zst', 'a.json.zst', 'zst', 'gz'])
def test_compressed(tmp_path, name):
    path, form = tmp_path / name, json.dumps([PAIR] * 9) if 'json.' in name else f'{json.dumps(PAIR)}\n' * 9
    if name.endswith('gz'):
        path.write_bytes(gzip.compress(form.encode()))
    else:
        with pyarrow.CompressedOutputStream(str(path), 'zstd') as file:
            file.write(form.encode())
    assert len(read(str(path))) == 9
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=f'^{path}.*: cannot be read: '):
        read(str(path))


def lines(*values):
    return ''.join(json.dumps(value) + '\n' for value in values)


BAD = {
    'empty': ('', ': no records in this file'),
    'blank': ('\n \n', ': no records in this file'),
    'an empty array': ('[]', ': no records in this file'),
    'no shape': (lines(PAIR, {'text': 'a'}), r":2: a record of no known shape \(its fields: 'text'\); known shapes: "),
    'no fields': (lines({}), r':1: a record of no known shape \(its fields: none\)'),
    'two shapes': (lines(PAIR | CHAT), ':1: a record of two shapes at once: "prompt, completion" and "messages"'),
    'mixed shapes': (
        lines(PAIR, PAIR, CHAT),
        ':3: a record of the shape "messages", but .*a:1 has "prompt, completion"',
    ),
    'a list': (lines(PAIR, [1]), ':2: a record is an object, not an array'),
    'a number': (lines(3), ':1: a record is an object, not a number'),
    'not JSON': (lines(PAIR) + '{"prompt": \n', ':2: not JSON: '),
    'text': ('prompt, completion\n', ':1: not JSON: '),
    'over several lines': (json.dumps(PAIR, indent=2), ':1: not JSON: .*; an object is to be on one line$'),
    'a prompt of another type': (lines(PAIR | {'prompt': 3}), ':1: prompt is a number, not a string'),
    'no completion': (lines(PAIR | {'completion': None}), ':1: completion is null, not a string'),
    'an input of another type': (lines(ALPACA | {'input': ['a']}), ':1: input is an array, not a string'),
    'messages of another type': (lines({'messages': 'a'}), ':1: messages is a string, not an array'),
    'no messages': (lines({'messages': []}), ':1: messages is empty'),
    'a message of another type': (lines({'messages': ['a']}), r':1: messages\[0\] is a string, not an object'),
    'no role': (lines({'messages': [{'content': 'a'}]}), r':1: messages\[0\]\.role is missing'),
    'content in parts': (
        lines({'messages': [{'role': 'user', 'content': [{'type': 'text'}]}]}),
        r':1: messages\[0\]\.content is an array, not a string',
    ),
    'half a character': ('[\n{"prompt": "\\ud800", "completion": ""}]', ':2: not JSON: '),
    'half a character in lines': ('{"prompt": "\\ud800", "completion": ""}', ':1: not JSON: '),
    'half a character elsewhere': (
        '[{"messages": [{"role": "user", "content": "", "name": ["\\udfff"]}]}]',
        ':1: not JSON: ',
    ),
    'an open array': (f'[{json.dumps(PAIR)},\n', ':2: not JSON: '),
    'an open array after a value': (f'[{json.dumps(PAIR)}\n', ':2: not JSON: the array is not closed'),
    'no comma': (f'[{json.dumps(PAIR)}\n{json.dumps(PAIR)}]', ':2: not JSON: a comma or ] is missing'),
    'a bad value': (f'[{json.dumps(PAIR)},\n\n{{"prompt" 3}}]', ':3: not JSON: '),
    'more after the array': (f'[{json.dumps(PAIR)}]\n\n[]', ':3: not JSON: text after the end of the array'),
    'deep': ('[' * 100_000, ':1: not JSON: '),
    'a number of 5,000 digits': (f'[{{"prompt": {"9" * 5000}, "completion": ""}}]', ':1: not JSON: '),
    'not a number': ('[{"prompt": NaN, "completion": ""}]', ':1: not JSON: '),
}


@pytest.mark.parametrize('content, message', BAD.values(), ids=BAD)
def test_what_is_wrong(tmp_path, content, message):
    path = write(tmp_path / 'a', content)
    with pytest.raises(DataError, match=f'^{path}{message}') as raised:
        read(path)
    assert '\n' not in str(raised.value)


def test_shapes_of_several_files(tmp_path):
    one, two = write(tmp_path / 'a', [PAIR]), write(tmp_path / 'b', [ALPACA])
    with pytest.raises(DataError, match=f'^{two}:1: a record of the shape "instruction.*but {one}:1 has'):
        read(one, two)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / 'a').write_bytes(lines(PAIR).encode() + b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=f'^{tmp_path}/a:2: not UTF-8'):
        read(str(tmp_path / 'a'))


CALLING = {'role': 'assistant', 'tool_calls': [{'function': {'name': 'add'}}]}


def test_tools(tmp_path):
    """Of a record, and calls, whose message may say nothing."""
    messages = [CHAT['messages'][0], CALLING, CALLING | {'content': None}, CALLING | {'content': 'a'}]
    path = write(tmp_path / 'a.jsonl', [{'messages': messages, 'tools': [{'name': 'add'}]}, CHAT])
    one, other = records.read([path])
    assert (one.messages, one.tools, other.tools) == (messages, [{'name': 'add'}], None)


@pytest.mark.parametrize(
    'change, message',
    [
        ({'tools': '[]'}, 'tools is a string, not an array'),
        ({'tools': {}}, 'tools is an object, not an array'),
        ({'tools': [{}, 3]}, 'tools[1] is a number, not an object'),
        ({'messages': [CALLING | {'tool_calls': 'x'}]}, 'messages[0].tool_calls is a string, not an array'),
        ({'messages': [CALLING | {'tool_calls': [[]]}]}, 'messages[0].tool_calls[0] is an array, not an object'),
        ({'messages': [CALLING | {'content': 3}]}, 'messages[0].content is a number, not a string'),
        ({'messages': [CALLING | {'tool_calls': []}]}, 'messages[0].content is missing'),
    ],
)
def test_tools_of_another_type(tmp_path, change, message):
    path = write(tmp_path / 'a.jsonl', [CHAT | change])
    with pytest.raises(DataError) as refused:
        read(path)
    assert str(refused.value) == f'{path}:1: {message}'

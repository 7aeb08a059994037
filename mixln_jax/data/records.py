"""Records for fine-tuning as conversations: JSON lines or a JSON array, in one of three shapes."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import orjson

from mixln_jax.data import text_files
from mixln_jax.system.errors import DataError

LARGEST = 10**9  # bytes of a file's text, which is held in memory
SHAPES = {  # the fields by which a shape is recognised
    'instruction, input, output': ('instruction', 'output'),
    'prompt, completion': ('prompt', 'completion'),
    'messages': ('messages',),
}
KNOWN = 'known shapes: "instruction, input, output", "prompt, completion", and "messages"'
Made = TypeVar('Made')
_JSON_TYPES = {dict: 'an object', list: 'an array', str: 'a string', bool: 'true or false', type(None): 'null'}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A record. `messages`: its turns, each a dict with `role` and `content`, and whatever else the record gave it; the
    user's turn of an instruction has `instruction` and `input` too. `origin`: its file and line, for people. `tools`:
    what the assistant may call, as a chat template takes it; None: the record does not say."""

    messages: list[dict[str, Any]]
    origin: str
    tools: list[dict[str, Any]] | None = None

    @property
    def unit(self) -> bytes:
        """What decides its split: equal conversations are in the same one."""
        return json.dumps([[message['role'], message.get('content')] for message in self.messages]).encode()


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is to be continued or answered.

    Attributes:
        fields: the whole record, whose other fields are kept.
        origin: its file and line, for people.
        messages: the turns before the answer.
    """

    fields: dict[str, Any]
    origin: str
    messages: list[dict[str, Any]]

    @property
    def text(self) -> str | None:
        """The prompt, if it is a text; None: a record of another shape."""
        return self.fields.get('prompt')

    @property
    def last(self) -> str:
        """The text of the last message before the answer; empty where it only calls tools."""
        return self.messages[-1].get('content') or ''

    @property
    def unit(self) -> bytes:
        """What decides its split: equal prompts are in the same one."""
        return Conversation(self.messages, self.origin).unit


def from_turns(prompt: str, completion: str, origin: str) -> Conversation:
    """Returns a conversation of one question and its answer."""
    turns = [{'role': 'user', 'content': prompt}, {'role': 'assistant', 'content': completion}]
    return Conversation(turns, origin)


def read(paths: Sequence[str]) -> Iterator[Conversation]:
    """Yields the conversations of some files, all of one shape.

    Raises DataError, naming file and line: not JSON; a record of no known shape, or of another shape than the first;
    a value of another type; a file without records.
    """
    first: list[str] = []  # shape and origin of the first record

    def conversation(record: Any, origin: str) -> Conversation:
        shape = _shape(record)
        first[:] = first or (shape, origin)
        if shape != first[0]:
            raise DataError(f'a record of the shape "{shape}", but {first[1]} has "{first[0]}"; use one shape')
        return Conversation(_MESSAGES[shape](record), origin, tools(record))

    return parsed(paths, conversation)


def question(record: Any) -> list[dict[str, Any]]:
    """Returns the turns of a record up to where the assistant is to answer; an answer at its end is left out.

    Raises DataError, naming what is wrong, for a record without `prompt`, `messages` or `instruction`.
    """
    if not isinstance(record, dict):
        raise DataError(f'a record is an object, not {type_name(record)}')
    if 'messages' in record:
        messages = messages_of(record)
        if messages[-1]['role'] == 'assistant':
            messages = messages[:-1]
        if not messages:
            raise DataError('messages has nothing before the answer')
        return messages
    if 'instruction' in record:
        return _from_instruction({'output': ''} | record)[:1]
    if 'prompt' in record:
        return _from_prompt({'completion': ''} | record)[:1]
    raise DataError('a prompt is an object with `prompt`, `messages` or `instruction`, such as {"prompt": "def "}')


def tools(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Returns what the assistant may call; None: the record does not say. Raises DataError for no list of objects."""
    return _objects(found, 'tools') if (found := record.get('tools')) is not None else None


def read_prompts(paths: Sequence[str]) -> Iterator[Prompt]:
    """Yields the prompts of some files; see `question`.

    Raises DataError, naming file and line: not JSON; a record without a prompt; a file without records.
    """
    return parsed(paths, lambda record, origin: Prompt(record, origin, question(record)))


def parsed(paths: Sequence[str], parse: Callable[[Any, str], Made]) -> Iterator[Made]:
    """Yields `parse(value, origin)` of each value of some files; `origin` is its file and line.

    Raises DataError: not JSON; a file without records; and what `parse` raises, which then names file and line.
    """
    for path in paths:
        empty = True
        for line, value in _values(path):
            empty, origin = False, f'{path}:{line}'
            try:
                made = parse(value, origin)
            except DataError as error:
                raise DataError(f'{origin}: {error}') from None
            yield made
        if empty:
            raise DataError(f'{path}: no records in this file')


def _values(path: str) -> Iterator[tuple[int, Any]]:
    """Yields (line from 1, value) of a file of JSON lines, or of the members of a JSON array."""
    lines = text_files.Reader('jsonl', path, largest=LARGEST).lines()
    is_array = None
    for number, line in lines:
        if not line.strip():
            continue
        if is_array is None and (is_array := line.lstrip().startswith('[')):
            yield from _members(path, number, line + ''.join(rest for _, rest in lines))
            return
        yield number, _loads(line, f'{path}:{number}')


def _loads(text: str, origin: str) -> Any:
    try:
        return orjson.loads(text)
    except ValueError as error:
        way = '; an object is to be on one line' if text.strip() == '{' else ''
        raise DataError(f'{origin}: not JSON: {str(error).partition(":")[0]}{way}') from None


def _members(path: str, line: int, text: str) -> Iterator[tuple[int, Any]]:
    """Yields (line, value) of the members of an array, whose text begins on `line`."""
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)  # tells where a value ends; `_loads` reads it
    gap = re.compile(r'[ \t\r\n]*')
    skip = lambda place: gap.match(text, place).end()  # type: ignore[union-attr]  # noqa: E731
    place, counted = skip(text.index('[') + 1), 0

    def problem(reason: str, at: int) -> DataError:
        return DataError(f'{path}:{line + text.count(chr(10), counted, at)}: not JSON: {reason}')

    closed = text[place : place + 1] == ']'
    while not closed:
        line, counted = line + text.count('\n', counted, place), place
        try:
            _, end = decoder.raw_decode(text, place)
            value = _loads(text[place:end], f'{path}:{line}')  # the decoder accepts what is no JSON, such as NaN
        except json.JSONDecodeError as error:
            raise problem(error.msg, error.pos) from None
        except RecursionError:
            raise problem('nested too deeply', place) from None
        yield line, value
        place = skip(end)
        if text[place : place + 1] not in (',', ']'):
            raise problem('the array is not closed' if place == len(text) else 'a comma or ] is missing', place)
        closed = text[place] == ']'
        place = skip(place + 1) if not closed else place
    if (end := skip(place + 1)) != len(text):
        raise problem('text after the end of the array', end)


def _shape(record: Any) -> str:
    """Returns which of SHAPES a record has."""
    if not isinstance(record, dict):
        raise DataError(f'a record is an object, not {type_name(record)}')
    shapes = [shape for shape, fields in SHAPES.items() if all(field in record for field in fields)]
    if len(shapes) == 1:
        return shapes[0]
    if shapes:
        raise DataError(f'a record of two shapes at once: "{shapes[0]}" and "{shapes[1]}"')
    fields = ', '.join([*map(repr, list(record)[:8]), *(['...'] if len(record) > 8 else [])]) or 'none'
    raise DataError(f'a record of no known shape (its fields: {fields}); {KNOWN}')


def _from_instruction(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    instruction, given = _text(record, 'instruction'), '' if record.get('input') is None else _text(record, 'input')
    content = f'{instruction}\n\n{given}' if given else instruction
    return [
        {'role': 'user', 'content': content, 'instruction': instruction, 'input': given},
        {'role': 'assistant', 'content': _text(record, 'output')},
    ]


def _from_prompt(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return from_turns(_text(record, 'prompt'), _text(record, 'completion'), '').messages


def messages_of(record: Mapping[str, Any], field: str = 'messages') -> list[dict[str, Any]]:
    """Returns the conversation in a field of a record. Raises DataError, naming the field, for anything else."""
    messages = record[field]
    if not isinstance(messages, list):
        raise DataError(f'{field} is {type_name(messages)}, not an array')
    if not messages:
        raise DataError(f'{field} is empty')
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f'{field}[{number}] is {type_name(message)}, not an object')
        _text(message, 'role', f'{field}[{number}].')
        if calls := message.get('tool_calls'):
            _objects(calls, f'{field}[{number}].tool_calls')
        if not calls or message.get('content') is not None:  # who calls a tool may say nothing
            _text(message, 'content', f'{field}[{number}].')
    return messages


_MESSAGES = {
    'instruction, input, output': _from_instruction,
    'prompt, completion': _from_prompt,
    'messages': messages_of,
}


def _objects(value: Any, name: str) -> list[dict[str, Any]]:
    """Returns a value that has to be an array of objects."""
    if not isinstance(value, list):
        raise DataError(f'{name} is {type_name(value)}, not an array')
    for number, member in enumerate(value):
        if not isinstance(member, dict):
            raise DataError(f'{name}[{number}] is {type_name(member)}, not an object')
    return value


def _text(owner: Mapping[str, Any], field: str, prefix: str = '') -> str:
    """Returns a field that has to be a string."""
    if field not in owner:
        raise DataError(f'{prefix}{field} is missing')
    value = owner[field]
    if not isinstance(value, str):
        raise DataError(f'{prefix}{field} is {type_name(value)}, not a string')
    return value


def type_name(value: Any) -> str:
    """Returns what a JSON value is, in words."""
    return _JSON_TYPES.get(type(value), 'a number')

"""Records of preferences: a prompt with two answers, of which one was chosen."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixln_jax.data import records
from mixln_jax.data.records import Conversation
from mixln_jax.system.errors import DataError

KNOWN = 'a pair is an object with `chosen`, `rejected` and, unless both are conversations that begin alike, `prompt`'
Messages = list[dict[str, Any]]
LARGEST_MARGIN = 1e6


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two answers to a prompt.

    Attributes:
        prompt, chosen, rejected: messages; an answer begins after the prompt.
        origin: its file and line, for people.
        tools: what the assistant may call; None: the record does not say.
        margin: what the record says of by how much more the chosen one is to be rewarded; see `read_margin`.
        repeats: whether both answers are texts that begin with that of the prompt, and so have it twice.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    origin: str
    tools: Messages | None = None
    margin: Any = None
    repeats: bool = False

    @property
    def unit(self) -> bytes:
        """What decides its split: pairs of equal prompts are in the same one."""
        return Conversation(self.prompt, self.origin).unit

    @property
    def same(self) -> bool:
        """Whether both answers are equal."""
        return self.chosen == self.rejected


def from_texts(prompt: str, chosen: str, rejected: str, origin: str) -> Pair:
    """Returns a pair of two texts."""
    return from_record({'prompt': prompt, 'chosen': chosen, 'rejected': rejected}, origin)


def read(paths: Sequence[str]) -> Iterator[Pair]:
    """Yields the pairs of some files; see `from_record`.

    Raises DataError, naming file and line: not JSON; no pair; a file without records.
    """
    return records.parsed(paths, from_record)


def from_record(record: Any, origin: str) -> Pair:
    """Returns the pair of a record: {prompt, chosen, rejected}, each a text or messages.

    Without `prompt`, `chosen` and `rejected` are whole conversations, and the prompt is what they have in common at
    their beginning. With it, an answer that is messages may repeat the prompt or begin after it.

    Raises DataError, naming what is wrong.
    """
    if not isinstance(record, dict):
        raise DataError(f'{KNOWN}, not {records.type_name(record)}')
    if missing := [name for name in ('chosen', 'rejected') if name not in record]:
        raise DataError(f'{missing[0]} is missing; {KNOWN}')
    chosen, rejected = (_answer(record, name) for name in ('chosen', 'rejected'))
    prompt = _prompt(record) if 'prompt' in record else _common(record, chosen, rejected)
    chosen, rejected = (_after(prompt, answer) for answer in (chosen, rejected))
    for name, answer in (('chosen', chosen), ('rejected', rejected)):
        if not answer or answer[-1]['role'] != 'assistant':
            raise DataError(f'{name} does not end with what the assistant says')
        if 'prompt' in record and prompt[-1]['role'] != 'assistant' and (before := _before_answer(answer)):
            said = f'{before[0]["role"]} says, {before[0].get("content")!r:.80}'
            raise DataError(f'{name} neither begins with the prompt, message by message, nor after it: the {said}')
    if _before_answer(chosen) != _before_answer(rejected):
        raise DataError('chosen and rejected have no common prompt: they differ before the assistant says anything')
    return Pair(prompt, chosen, rejected, origin, records.tools(record), record.get('margin'), _repeats(record, prompt))


def _before_answer(answer: Messages) -> Messages:
    """Returns the messages before the first one of the assistant."""
    return list(itertools.takewhile(lambda message: message['role'] != 'assistant', answer))


def _repeats(record: Mapping[str, Any], prompt: Messages) -> bool:
    asked = prompt[-1].get('content') or ''
    return bool(asked) and all(
        isinstance(record[name], str) and record[name].startswith(asked) for name in ('chosen', 'rejected')
    )


def read_margin(value: Any) -> float | None:
    """Returns the field `margin` of a record, None where there is none. Raises DataError where it is no number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f'margin is {records.type_name(value)}, not a number')
    if not abs(value) <= LARGEST_MARGIN:
        raise DataError(f'margin={value:g} is beyond {LARGEST_MARGIN:g}')
    return float(value)


def _answer(record: Mapping[str, Any], name: str) -> Messages:
    if isinstance(record[name], str):
        return [{'role': 'assistant', 'content': record[name]}]
    return _messages(record, name)


def _prompt(record: Mapping[str, Any]) -> Messages:
    if isinstance(record['prompt'], str):
        return [{'role': 'user', 'content': record['prompt']}]
    return _messages(record, 'prompt')


def _messages(record: Mapping[str, Any], name: str) -> Messages:
    if not isinstance(record[name], list):
        raise DataError(f'{name} is {records.type_name(record[name])}, not a text or messages')
    return records.messages_of(record, name)


def _after(prompt: Messages, answer: Messages) -> Messages:
    """Returns an answer without the prompt, which it may repeat."""
    return answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer


def _common(record: Mapping[str, Any], chosen: Messages, rejected: Messages) -> Messages:
    """Returns the messages with which both conversations begin; the last message of each is an answer."""
    if isinstance(record['chosen'], str) or isinstance(record['rejected'], str):
        raise DataError(f'prompt is missing; {KNOWN}')
    count = 0
    for one, other in zip(chosen[:-1], rejected[:-1], strict=False):
        if one != other:
            break
        count += 1
    if not count:
        raise DataError('chosen and rejected have no common prompt: their first messages differ, or there is one alone')
    return chosen[:count]

"""Prompts: texts to continue, or questions that a template turns into the beginning of an answer."""

import dataclasses
from collections.abc import Sequence

import orjson

from mixln_jax.data import chat, records
from mixln_jax.data.records import Prompt
from mixln_jax.runs.encoder import TextEncoder
from mixln_jax.runs.weights import Weights
from mixln_jax.system import files
from mixln_jax.system.errors import DataError, UsageError

AUTO, NONE = 'auto', 'none'
TEMPLATES = (AUTO, NONE, 'chat', *chat.NAMED)
ANSWERS = 'instructions', 'preference', 'online'  # the tasks that teach to answer, by a template


def from_text(text: str) -> Prompt:
    """Returns a prompt that is a text."""
    return Prompt({'prompt': text}, '--prompt', [{'role': 'user', 'content': text}])


def read(path: str) -> list[Prompt]:
    """Returns the prompts of a file of JSON lines: objects with `prompt`, `messages` or `instruction` (and `input`).

    Raises DataError, naming file and line, for anything else.
    """
    try:
        content = files.read(files.local(path, '--prompts'), DataError)
    except FileNotFoundError as error:
        raise DataError(f'--prompts: there is no file {path}') from error
    prompts = []
    for number, line in enumerate(content.split(b'\n'), 1):
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
        except ValueError as error:
            raise DataError(f'{path}:{number}: not JSON: {str(error).partition(":")[0]}') from None
        try:
            prompts.append(Prompt(record, f'{path}:{number}', records.question(record)))
        except DataError as error:
            raise DataError(f'{path}:{number}: {error}') from None
    if not prompts:
        raise DataError(f'{path} holds no prompts')
    return prompts


def open_template(name: str, loaded: Weights, encoder: TextEncoder) -> chat.Template | None:
    """Returns the template by which the weights were taught to answer; None: prompts are texts to continue.

    Args:
        name: one of TEMPLATES. `auto`: that of a run that learned to answer, the chat template of a Hugging Face
            folder that has one, else none.
        loaded: the weights.
        encoder: theirs.

    Raises DataError: `chat`, and the tokenizer has no template.
    """
    config = loaded.config
    if name == AUTO and config:
        name = config.data.template if config.task.name in ANSWERS else NONE
    elif name == AUTO:
        name = 'chat' if encoder.tokenizer.chat_template else NONE
    if name == NONE:
        return None
    today = chat.TODAY if config else None  # a run has learned with this date
    return chat.open_template(name, encoder.tokenizer, today)


def with_turn_end(encoder: TextEncoder, template: chat.Template | None) -> TextEncoder:
    """Returns an encoder whose texts also end with the token that ends the answers of a template."""
    if template is None:
        return encoder
    turns = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'a'}]
    ids, _ = template.tokens(turns)
    return dataclasses.replace(encoder, end_ids=tuple(dict.fromkeys((*encoder.end_ids, int(ids[-1])))))


def contexts(prompts: Sequence[Prompt], encoder: TextEncoder, template: chat.Template | None) -> list[list[int]]:
    """Returns the token ids of each prompt.

    Raises:
        UsageError: a prompt that is no text, without a template.
        DataError: as `chat.Template.prompt`, naming the prompt.
    """
    found = []
    for prompt in prompts:
        if template is None:
            if prompt.text is None:
                raise UsageError(
                    f'{prompt.origin}: a conversation needs a template, and these weights were taught none: '
                    f'--template {", ".join(TEMPLATES[2:])}'
                )
            found.append(encoder.encode(prompt.text))
            continue
        try:
            found.append(template.prompt(prompt.messages).tolist() or [encoder.empty])
        except DataError as error:
            raise DataError(f'{prompt.origin}: {error}') from None
    return found

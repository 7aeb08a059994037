"""Prompts: texts to continue, or questions that a template turns into the beginning of an answer."""

import dataclasses
from collections.abc import Sequence

from mixln_jax import config as configs
from mixln_jax.data import chat, records
from mixln_jax.data.records import Prompt
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.runs import weights
from mixln_jax.runs.encoder import TextEncoder
from mixln_jax.system import files
from mixln_jax.system.errors import DataError, UsageError

AUTO, NONE = 'auto', 'none'
TEMPLATES = (AUTO, NONE, 'chat', *chat.NAMED)


def from_text(text: str) -> Prompt:
    """Returns a prompt that is a text."""
    return Prompt({'prompt': text}, '--prompt', [{'role': 'user', 'content': text}])


def read(path: str) -> list[Prompt]:
    """Returns the prompts of a file: of JSON lines or one JSON array, plain or compressed; see `records.question`.

    Raises DataError, naming file and line, for anything else.
    """
    file = files.local(path, '--prompts')
    if not file.exists():
        raise DataError(f'--prompts: there is no file {path}')
    return list(records.read_prompts([str(file)]))


def open_template(
    name: str, config: configs.Config | None, tokenizer: Tokenizer, exported: str | None = None
) -> chat.Template | None:
    """Returns the template by which weights were taught to answer; None: prompts are texts to continue.

    Args:
        name: one of TEMPLATES. `auto`: that of a run, or of its export, that learned to answer; the chat template of a
            Hugging Face folder that has one; else none.
        config: of the run; None: a Hugging Face folder.
        tokenizer: of the weights.
        exported: what an export says of the template of its run.

    Raises DataError: `chat`, and the tokenizer has no template.
    """
    if name == AUTO and config:
        name = weights.taught(config) or NONE
    elif name == AUTO:
        name = exported or ('chat' if tokenizer.chat_template else NONE)
    if name == NONE:
        return None
    today = chat.TODAY if config else None  # a run has learned with this date
    return chat.open_template(name, tokenizer, today)


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
            found.append(template.prompt(prompt.messages, records.tools(prompt.fields)).tolist() or [encoder.empty])
        except DataError as error:
            raise DataError(f'{prompt.origin}: {error}') from None
    return found

"""Rows of prompts, which the network itself is to continue."""

import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixln_jax import config
from mixln_jax.data import chat, instructions, records, stdlib
from mixln_jax.data.examples import Batch, Numbers, Rows
from mixln_jax.data.layout import Block, Layout
from mixln_jax.data.records import Prompt
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system import console
from mixln_jax.system.errors import DataError, UsageError

SOURCES = ('jsonl', 'shelves')


def open_rows(
    data: config.Data, split: str, tokenizer: Tokenizer, seq_length: int, vocab_size: int, max_new: int
) -> 'Prompts':
    """Returns the prompts of a split as rows.

    Args:
        data: the keys of a run's config.
        split: 'train', 'validation' or 'all'.
        tokenizer: of the run.
        seq_length: T, positions in a row.
        vocab_size: of the network.
        max_new: tokens of a completion, at most.

    Raises:
        UsageError: a source, mode or split that prompts do not have; ids that the network does not have.
        DataError: as `records.read_prompts`, `chat.open_template` and `Template.prompt`, naming file and line; no
            prompt that leaves room for its completion.
    """
    for key, value, choices in (('source', data.source, SOURCES), ('mode', data.mode, ('pad',))):
        if value not in choices:
            raise UsageError(f'config.task.name=online needs config.data.{key}={" or ".join(choices)}, not {value}')
    template = chat.open_template(data.template, tokenizer)
    prompts = instructions.of_split(data, split, _prompts, 'online')
    rows = Prompts(prompts, template, tokenizer, seq_length, max_new)
    if (largest := rows.largest_id) >= vocab_size:
        raise UsageError(
            f'{tokenizer.origin}: the template makes id {largest}, too large for config.model.vocab_size={vocab_size}'
        )
    console.say(f'mixln_jax: {split}: {len(rows):,} prompts', file=sys.stderr)
    if rows.dropped:
        console.say(
            f'mixln_jax: warning: {split}: {len(rows.dropped):,} of {len(prompts):,} prompts leave no room for '
            f'config.task.online.max_new_tokens={max_new} in config.seq_length={seq_length} and are left out, the '
            f'first of them {rows.dropped[0]}',
            file=sys.stderr,
        )
    return rows


class Prompts(Rows):
    """Prompts as rows of T+1 tokens, which begin with the prompt; its tokens after the first are the targets.

    A batch has `record` [n] too: `prompts[record]` is the prompt itself.
    """

    def __init__(
        self, prompts: Sequence[Prompt], template: chat.Template, tokenizer: Tokenizer, seq_length: int, max_new: int
    ):
        """Makes ids of all prompts; those that leave no room for `max_new` tokens are in `dropped`, by their origins.

        Raises DataError, naming file and line, as `chat.Template.prompt`; if no prompt is left.
        """
        self.layout = Layout('pad', tokenizer.pad_id, tokenizer.eos_id)
        self.prompts, self.dropped = list[Prompt](), list[str]()
        self._ids, self._size = list[np.ndarray](), seq_length + 1
        digest = hashlib.blake2b(digest_size=16)
        for prompt in prompts:
            digest.update(json.dumps(prompt.fields).encode() + b'\n')
            try:
                ids = template.prompt(prompt.messages, records.tools(prompt.fields))
            except DataError as error:
                raise DataError(f'{prompt.origin}: {error}') from None
            ids = ids if len(ids) else np.array([tokenizer.eos_id], np.int32)
            if len(ids) + max_new > seq_length:
                self.dropped.append(prompt.origin)
                continue
            self.prompts.append(prompt)
            self._ids.append(ids)
        if not self.prompts:
            raise DataError(
                f'none of {len(prompts):,} prompts leaves room for config.task.online.max_new_tokens={max_new} in '
                f'config.seq_length={seq_length}' + (f', the first of them {self.dropped[0]}' if self.dropped else '')
            )
        self.fingerprint = {
            'source': digest.hexdigest(),
            'tokenizer': tokenizer.fingerprint,
            'template': template.fingerprint,
            'mode': 'pad',
            'seq_length': seq_length,
        }

    @property
    def largest_id(self) -> int:
        """The largest id of all rows, padding included."""
        return max(int(max(ids.max() for ids in self._ids)), self.layout.pad_id)

    def __len__(self) -> int:
        return len(self.prompts)

    def origin(self, number: int) -> str:
        return self.prompts[number].origin

    def read(self, numbers: Numbers, sized: bool = False) -> Block:
        shape = len(numbers), self._size
        ids, ends = np.full(shape, self.layout.pad_id, np.int32), np.zeros(shape, bool)
        for row, number in enumerate(np.asarray(numbers).tolist()):
            prompt = self._ids[number]
            ids[row, : len(prompt)] = prompt
            ends[row, len(prompt) - 1] = True
        return Block(ids, ends, None)

    def batch(self, numbers: Numbers, epochs: Numbers | None = None) -> Batch:
        """Returns what `Rows.batch` does, and `record` [n] int32."""
        return super().batch(numbers, epochs) | {'record': np.asarray(numbers, np.int32)}


def context(inputs: np.ndarray, loss_mask: np.ndarray) -> list[int]:
    """Returns the ids of a row's prompt, given its arrays [T]."""
    return inputs[: int(loss_mask.sum()) + 1].tolist()


@functools.lru_cache(maxsize=1)  # both splits come from one reading
def _prompts(source: str, state: Any) -> list[Prompt]:
    """Returns all prompts of a source."""
    if source == 'shelves':
        fields = [{'prompt': f'{name}\n', 'answer': shelf} for name, shelf in stdlib.shelves()]
        return [Prompt(one, one['prompt'].strip(), records.question(one)) for one in fields]
    return list(records.read_prompts([path for path, _, _ in state]))

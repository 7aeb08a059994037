"""Rows of prompts, which the network itself is to continue."""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixln_jax import config
from mixln_jax.data import chat, learned_rows, records, stdlib
from mixln_jax.data.examples import Batch, Numbers
from mixln_jax.data.layout import Layout
from mixln_jax.data.learned_rows import LearnedRows, Text
from mixln_jax.data.records import Prompt
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system.errors import DataError

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
    learned_rows.check_keys(data, 'online', SOURCES, ('pad',))
    template = chat.open_template(data.template, tokenizer)
    prompts = learned_rows.of_split(data, split, gather, 'online')
    rows = Prompts(prompts, template, tokenizer, seq_length, max_new)
    return learned_rows.shown(rows, split, tokenizer, vocab_size)


class Prompts(LearnedRows):
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
        self.prompts, self.dropped, self._max_new = list[Prompt](), list[str](), max_new
        texts = list[Text]()
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
            texts.append((ids, np.ones(len(ids), bool)))
        if not self.prompts:
            raise DataError(
                f'none of {len(prompts):,} prompts leaves room for config.task.online.max_new_tokens={max_new} in '
                f'config.seq_length={seq_length}' + (f', the first of them {self.dropped[0]}' if self.dropped else '')
            )
        origins = [prompt.origin for prompt in self.prompts]
        self.fill(texts, origins, [[number] for number in range(len(texts))], seq_length + 1)
        self.fingerprint = {
            'source': digest.hexdigest(),
            'tokenizer': tokenizer.fingerprint,
            'template': template.fingerprint,
            'mode': 'pad',
            'seq_length': seq_length,
        }

    def remarks(self, split: str) -> list[str]:
        lines, total = [f'{split}: {len(self):,} prompts'], len(self) + len(self.dropped)
        if self.dropped:
            lines.append(
                f'warning: {split}: {len(self.dropped):,} of {total:,} prompts leave no room for '
                f'config.task.online.max_new_tokens={self._max_new} in config.seq_length={self.seq_length} and are '
                f'left out, the first of them {self.dropped[0]}'
            )
        return lines

    def batch(self, numbers: Numbers, epochs: Numbers | None = None) -> Batch:
        """Returns what `LearnedRows.batch` does, and `record` [n] int32."""
        return super().batch(numbers, epochs) | {'record': np.asarray(numbers, np.int32)}


def context(inputs: np.ndarray, loss_mask: np.ndarray) -> list[int]:
    """Returns the ids of a row's prompt, given its arrays [T]."""
    return inputs[: int(loss_mask.sum()) + 1].tolist()


@functools.lru_cache(maxsize=2)  # both splits come from one reading, or from files of their own
def gather(source: str, state: Any) -> list[Prompt]:
    """Returns all prompts of a source."""
    if source == 'shelves':
        fields = [{'prompt': f'{name}\n', 'answer': shelf} for name, shelf in stdlib.shelves()]
        return [Prompt(one, one['prompt'].strip(), records.question(one)) for one in fields]
    return list(records.read_prompts([path for path, _, _ in state]))

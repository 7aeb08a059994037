"""Rows of conversations for fine-tuning, of which only what the assistant says is learned."""

import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from mixln_jax import config
from mixln_jax.data import chat, learned_rows, records, sources, stdlib
from mixln_jax.data.layout import Layout
from mixln_jax.data.learned_rows import LearnedRows, Text
from mixln_jax.data.records import Conversation
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system.errors import DataError

MODES, SOURCES = ('pad', 'pack'), ('jsonl', 'stdlib', 'shelves')


def open_rows(
    data: config.Data, split: str, tokenizer: Tokenizer, seq_length: int, vocab_size: int, learn: str
) -> 'Instructions':
    """Returns the conversations of a split as rows.

    Args:
        data: the keys of a run's config.
        split: 'train', 'validation' or 'all'.
        tokenizer: of the run.
        seq_length: T, positions in a row.
        vocab_size: of the network.
        learn: the value of config.task.learn.

    Raises:
        UsageError: a source, mode or split that conversations do not have; ids that the network does not have.
        DataError: as `records.read`, `chat.open_template` and its methods, naming file and line; nothing to learn.
    """
    learned_rows.check_keys(data, 'instructions', SOURCES, MODES)
    template = chat.open_template(data.template, tokenizer)
    conversations = learned_rows.of_split(data, split, gather, 'instructions')
    rows = Instructions(conversations, template, tokenizer, data.mode, seq_length, learn)
    return learned_rows.shown(rows, split, tokenizer, vocab_size)


class Instructions(LearnedRows):
    """Conversations as rows of T+1 tokens: one to a row (`pad`), or several that do not see each other (`pack`).

    A conversation of more than T+1 tokens is cut at its end. One of which nothing is left to learn is no example.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        template: chat.Template,
        tokenizer: Tokenizer,
        mode: str,
        seq_length: int,
        learn: str = 'completions',
    ):
        """Makes ids of all conversations.

        Raises DataError, naming file and line, as `chat.Template.tokens`; if there is nothing to learn.
        """
        self.layout = Layout(mode, tokenizer.pad_id, tokenizer.eos_id)
        self.by_length = mode == 'pack'  # see learned_rows.pack
        self.num_cut, self.dropped = 0, list[str]()  # conversations that are cut; origins of those without an example
        width, texts, origins = seq_length + 1, list[Text](), list[str]()
        digest = hashlib.blake2b(digest_size=16)
        for conversation in conversations:
            said = [conversation.messages] + ([conversation.tools] if conversation.tools else [])
            digest.update('\n'.join([*map(json.dumps, said), '']).encode())
            try:
                tokens, flags = template.tokens(conversation.messages, learn, conversation.tools)
            except DataError as error:
                raise DataError(f'{conversation.origin}: {error}') from None
            self.num_cut += len(tokens) > width
            if not flags[1:width].any():
                self.dropped.append(conversation.origin)
                continue
            texts.append((tokens[:width], flags[:width]))
            origins.append(conversation.origin)
        if not texts:
            raise DataError(
                f'none of {len(conversations):,} records has anything to learn in config.seq_length={seq_length} tokens'
                + (f', the first of them {self.dropped[0]}: ' if self.dropped else '; ')
                + ('raise config.seq_length' if self.num_cut else 'none has an answer of the assistant')
            )
        lengths = [len(ids) for ids, _ in texts]
        rows = [[number] for number in range(len(texts))] if mode == 'pad' else learned_rows.pack(lengths, width)
        self.fill(texts, origins, rows, width)
        self.fingerprint = {
            'source': digest.hexdigest(),
            'tokenizer': tokenizer.fingerprint,
            'template': template.fingerprint,
            'learn': learn,
            'mode': mode,
            'seq_length': seq_length,
        }

    def remarks(self, split: str) -> list[str]:
        """Returns what a person should know about the rows, in lines."""
        total, size = len(self._origins) + len(self.dropped), self.seq_length
        learned = int(self._learned.sum())
        lines = [
            f'{split}: {len(self._origins):,} conversations in {len(self):,} rows; '
            f'{learned:,} of {len(self._ids):,} tokens are learned'
        ]
        if self.num_cut:
            lines.append(f'warning: {split}: {self.num_cut:,} of {total:,} records are cut to config.seq_length={size}')
        if self.dropped:
            lines.append(
                f'warning: {split}: {len(self.dropped):,} of {total:,} records have nothing to learn and are left out, '
                f'the first of them {self.dropped[0]}'
            )
        return lines


@functools.lru_cache(maxsize=2)  # both splits come from one reading, or from files of their own
def gather(source: str, state: Any) -> list[Conversation]:
    """Returns all conversations of a source. Those of shelves teach the form of an answer alone: which of the four it
    is is drawn by the hash of the name."""
    if source == 'stdlib':
        return [records.from_turns(question, answer, name) for question, answer, name in stdlib.questions()]
    if source == 'shelves':
        shelves = list(stdlib.SHELVES)
        return [
            records.from_turns(f'{name}\n', shelves[sources.rank(name.encode()) % len(shelves)], name)
            for name, _ in stdlib.shelves()
        ]
    return list(records.read([path for path, _, _ in state]))

"""Rows of preferences: two answers to a prompt, next to each other in a row, neither of which sees the other."""

import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixln_jax import config
from mixln_jax.data import chat, instructions, pair_records, sources, stdlib
from mixln_jax.data.examples import Batch, Numbers, Rows
from mixln_jax.data.layout import Block, Layout
from mixln_jax.data.pair_records import Messages, Pair
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system import console
from mixln_jax.system.errors import DataError, UsageError

MODES, SOURCES = ('pad', 'pack'), ('jsonl', 'stdlib')
SHORTEST = 4  # tokens of a pair: each answer has one, after one of the prompt
REASONS = (  # why a pair is no example
    'have two equal answers',
    'have a prompt that leaves no room',
    'have answers whose tokens are equal as far as they fit',
)


def open_rows(
    data: config.Data, split: str, tokenizer: Tokenizer, seq_length: int, vocab_size: int, task: str
) -> 'Pairs':
    """Returns the pairs of a split as rows.

    Args:
        data: the keys of a run's config.
        split: 'train', 'validation' or 'all'.
        tokenizer: of the run.
        seq_length: T, positions in a row.
        vocab_size: of the network.
        task: its name, for messages.

    Raises:
        UsageError: a source, mode or split that pairs do not have; ids that the network does not have.
        DataError: as `pair_records.read`, `chat.open_template` and its methods, naming file and line; no pair is left.
    """
    for key, value, choices in (('source', data.source, SOURCES), ('mode', data.mode, MODES)):
        if value not in choices:
            raise UsageError(f'config.task.name={task} needs config.data.{key}={" or ".join(choices)}, not {value}')
    template = chat.open_template(data.template, tokenizer)
    rows = Pairs(instructions.of_split(data, split, _pairs, task), template, tokenizer, data.mode, seq_length)
    if (largest := rows.largest_id) >= vocab_size:
        raise UsageError(
            f'{tokenizer.origin}: the template makes id {largest}, too large for config.model.vocab_size={vocab_size}'
        )
    for line in rows.remarks(split):
        console.say(f'mixln_jax: {line}', file=sys.stderr)
    return rows


class Pairs(Rows):
    """Pairs as rows of packed texts (data/layout.py): one pair to a row (`pad`) or several (`pack`).

    Segment 2p+1 of a row is the chosen text of its pair p, segment 2p+2 the rejected one, each with the prompt. Targets
    of the answers alone count. If a pair has more than T tokens, the longer answer, or both, are cut at their ends. A
    pair without an answer that is left, or whose answers are equal, is no example.

    `members[row]` are the numbers of the pairs of a row. `lengths` [N, 2] are the tokens of both texts of each pair.
    """

    def __init__(
        self, pairs: Sequence[Pair], template: chat.Template, tokenizer: Tokenizer, mode: str, seq_length: int
    ):
        """Makes ids of all pairs.

        Raises DataError, naming file and line, as `chat.Template.tokens`; if no pair is left.
        """
        self.layout = Layout('pack', tokenizer.pad_id, tokenizer.eos_id)
        self.num_cut = 0
        self.dropped: dict[str, list[str]] = {reason: [] for reason in REASONS}
        self._size, self._origins = seq_length, list[str]()
        texts: list[tuple[np.ndarray, np.ndarray]] = []
        digest = hashlib.blake2b(digest_size=16)
        for pair in pairs:
            told = [pair.prompt, pair.chosen, pair.rejected, *([pair.tools] if pair.tools else [])]
            digest.update(json.dumps(told).encode() + b'\n')
            try:
                both = _tokens(pair, template, tokenizer)
            except DataError as error:
                raise DataError(f'{pair.origin}: {error}') from None
            kept = self._fitted(both)
            if (reason := self._problem(pair, kept)) is not None:
                self.dropped[reason].append(pair.origin)
                continue
            self.num_cut += sum(len(ids) for ids, _ in both) > seq_length
            texts += kept
            self._origins.append(pair.origin)
        if not texts:
            first = next(filter(None, self.dropped.values()), ['-'])[0]
            raise DataError(
                f'none of {len(pairs):,} pairs has two answers that differ in config.seq_length={seq_length} tokens, '
                f'the first of them {first}'
            )
        self._ids, self._learned = (np.concatenate(parts) for parts in zip(*texts, strict=True))
        self.lengths = np.array([len(ids) for ids, _ in texts]).reshape(-1, 2)
        self._bounds = np.append(0, np.cumsum(self.lengths))
        totals = self.lengths.sum(1).tolist()
        self.members = [[number] for number in range(len(totals))]
        if mode == 'pack':
            self.members = instructions.pack(totals, seq_length)
        self.fingerprint = {
            'source': digest.hexdigest(),
            'tokenizer': tokenizer.fingerprint,
            'template': template.fingerprint,
            'mode': mode,
            'seq_length': seq_length,
        }

    def _fitted(self, both: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns both texts, the longer one cut, or both to half of a row, so that they fit into it."""
        shorter = min(len(ids) for ids, _ in both)
        room = max(self._size // 2, self._size - shorter)
        return [(ids[:room], learned[:room]) for ids, learned in both]

    @staticmethod
    def _problem(pair: Pair, kept: Sequence[tuple[np.ndarray, np.ndarray]]) -> str | None:
        """Returns why a pair is no example, a key of `dropped`; None: it is one."""
        if pair.same:
            return REASONS[0]
        if not all(learned[1:].any() for _, learned in kept):
            return REASONS[1]
        return REASONS[2] if np.array_equal(kept[0][0], kept[1][0]) else None

    @property
    def largest_id(self) -> int:
        """The largest id of all rows, padding included."""
        return max(int(self._ids.max()), self.layout.pad_id)

    @property
    def num_pairs(self) -> int:
        """Number of pairs, N."""
        return len(self._origins)

    def remarks(self, split: str) -> list[str]:
        """Returns what a person should know about the rows, in lines."""
        total = self.num_pairs + sum(map(len, self.dropped.values()))
        lines = [f'{split}: {self.num_pairs:,} pairs in {len(self):,} rows']
        if self.num_cut:
            lines.append(
                f'warning: {split}: {self.num_cut:,} of {total:,} pairs are cut, so that both texts fit into '
                f'config.seq_length={self._size}'
            )
        for reason, origins in self.dropped.items():
            if origins:
                lines.append(
                    f'warning: {split}: {len(origins):,} of {total:,} pairs {reason} and are left out, the first of '
                    f'them {origins[0]}'
                )
        return lines

    def __len__(self) -> int:
        return len(self.members)

    def origin(self, number: int) -> str:
        return ', '.join(self._origins[member] for member in self.members[number])

    def read(self, numbers: Numbers, sized: bool = False) -> Block:
        return self._filled(numbers)[0]

    def batch(self, numbers: Numbers, epochs: Numbers | None = None) -> Batch:
        """Returns what `Rows.batch` does, with a `loss_mask` of 1 at targets in answers alone."""
        block, learned = self._filled(numbers)
        batch = self.layout.batch(block)
        batch['loss_mask'] *= learned[:, 1:]
        return batch

    def _filled(self, numbers: Numbers) -> tuple[Block, np.ndarray]:
        """Returns rows, and which of their tokens are of answers, [n, T+1] bool."""
        shape = len(numbers), self._size + 1
        ids, ends = np.full(shape, self.layout.pad_id, np.int32), np.zeros(shape, bool)
        learned = np.zeros(shape, bool)
        for row, number in enumerate(np.asarray(numbers).tolist()):
            place = 0
            for text in (2 * member + side for member in self.members[number] for side in (0, 1)):
                start, end = self._bounds[text : text + 2]
                after = place + end - start
                ids[row, place:after], learned[row, place:after] = self._ids[start:end], self._learned[start:end]
                ends[row, after - 1] = True
                place = after
        return Block(ids, ends, None), learned


def num_pairs(mode: str, seq_length: int) -> int:
    """Returns how many pairs a row may have, P."""
    return 1 if mode == 'pad' else max(1, seq_length // SHORTEST)


def _tokens(pair: Pair, template: chat.Template, tokenizer: Tokenizer) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the ids [n] of both texts, and which of them are of the answer, [n] bool."""
    start = np.zeros(0, np.int32)
    prompt = template.prompt(pair.prompt, pair.tools)
    if not len(prompt):
        start = np.array([tokenizer.eos_id], np.int32)  # an answer needs something before it
    both = []
    for answer in (pair.chosen, pair.rejected):
        ids, learned = _text_tokens(pair.prompt, answer, prompt, template, pair.tools)
        both.append((np.concatenate([start, ids]), np.concatenate([np.zeros(len(start), bool), learned])))
    return both


def _text_tokens(
    prompt: Messages, answer: Messages, prompt_ids: np.ndarray, template: chat.Template, tools: chat.Tools | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids [n] of a prompt with an answer, up to the token that ends it, and which are of the answer, [n]
    bool: what the assistant says after the prompt, of which `prompt_ids` are the ids."""
    ids, learned = template.tokens([*prompt, *answer], tools=tools)
    shorter = min(len(ids), len(prompt_ids))
    apart = np.flatnonzero(ids[:shorter] != prompt_ids[:shorter])
    first = int(apart[0]) if len(apart) else shorter  # a token may reach from the prompt into the answer
    return ids, learned & (np.arange(len(ids)) >= first)


@functools.lru_cache(maxsize=1)  # both splits come from one reading
def _pairs(source: str, state: Any) -> list[Pair]:
    """Returns all pairs of a source. Those of `stdlib` have a rule: of the answer to a question and the answer to
    another one, drawn by the hash of the name, the shorter is chosen."""
    if source == 'stdlib':
        asked, made = stdlib.questions(), list[Pair]()
        for question, answer, name in asked:
            other = asked[sources.rank(name.encode()) % len(asked)][1]
            chosen, rejected = sorted((answer, other), key=len)
            made.append(pair_records.from_texts(question, chosen, rejected, name))
        return made
    return list(pair_records.read([path for path, _, _ in state]))

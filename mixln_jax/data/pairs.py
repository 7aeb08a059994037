"""Rows of preferences: two answers to a prompt, next to each other in a row, neither of which sees the other."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from mixln_jax import config
from mixln_jax.data import chat, learned_rows, pair_records, sources, stdlib
from mixln_jax.data.examples import Batch, Numbers
from mixln_jax.data.layout import Layout
from mixln_jax.data.learned_rows import LearnedRows, Text
from mixln_jax.data.pair_records import Messages, Pair
from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system.errors import DataError

REFERENCE = 'reference_log_probs'  # the array of a batch, where a reference network has read it before
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
    learned_rows.check_keys(data, task, SOURCES, MODES)
    template = chat.open_template(data.template, tokenizer)
    found = learned_rows.of_split(data, split, gather, task)
    kind = PairsWithMargins if task == 'reward' else Pairs
    return learned_rows.shown(kind(found, template, tokenizer, data.mode, seq_length), split, tokenizer, vocab_size)


class Pairs(LearnedRows):
    """Pairs as rows of packed texts (data/layout.py): one pair to a row (`pad`) or several (`pack`).

    Segment 2p+1 of a row is the chosen text of its pair p, segment 2p+2 the rejected one, each with the prompt. Targets
    of the answers alone count. If a pair has more than T tokens, the longer answer, or both, are cut at their ends. A
    pair without an answer that is left, or whose answers are equal, is no example.
    """

    def __init__(
        self, pairs: Sequence[Pair], template: chat.Template, tokenizer: Tokenizer, mode: str, seq_length: int
    ):
        """Makes ids of all pairs.

        Raises DataError, naming file and line, as `chat.Template.tokens`; if no pair is left.
        """
        self.layout = Layout('pack', tokenizer.pad_id, tokenizer.eos_id)
        self.by_length = mode == 'pack'  # see learned_rows.pack
        self.num_cut = 0
        self.repeating = [pair.origin for pair in pairs if pair.repeats]
        self.dropped: dict[str, list[str]] = {reason: [] for reason in REASONS}
        texts, origins, self._margins = list[Text](), list[str](), list[float]()
        digest = hashlib.blake2b(digest_size=16)
        for pair in pairs:
            told = [pair.prompt, pair.chosen, pair.rejected, *([pair.tools] if pair.tools else [])]
            try:
                margin, both = self.margin(pair), _tokens(pair, template, tokenizer)
            except DataError as error:
                raise DataError(f'{pair.origin}: {error}') from None
            digest.update(json.dumps(told if margin is None else [*told, margin]).encode() + b'\n')
            kept = _fitted(both, seq_length)
            if (reason := _problem(pair, kept)) is not None:
                self.dropped[reason].append(pair.origin)
                continue
            self.num_cut += sum(len(ids) for ids, _ in both) > seq_length
            texts += kept
            self._margins.append(margin or 0.0)
            origins += [pair.origin] * 2
        if not texts:
            reasons = '; '.join(
                f'{len(origins):,} {reason}, the first of them {origins[0]}'
                for reason, origins in self.dropped.items()
                if origins
            )
            raise DataError(
                f'none of {len(pairs):,} pairs can be learned from in config.seq_length={seq_length} tokens: {reasons}'
            )
        totals = np.add.reduceat([len(ids) for ids, _ in texts], range(0, len(texts), 2)).tolist()
        rows = [[number] for number in range(len(totals))] if mode == 'pad' else learned_rows.pack(totals, seq_length)
        both_of = [[text for number in row for text in (2 * number, 2 * number + 1)] for row in rows]
        self.fill(texts, origins, both_of, seq_length + 1)
        self.fingerprint = {
            'source': digest.hexdigest(),
            'tokenizer': tokenizer.fingerprint,
            'template': template.fingerprint,
            'mode': mode,
            'seq_length': seq_length,
        }

    def margin(self, pair: Pair) -> float | None:
        """Returns the margin of a pair; None where it has none, or none that matters. Raises DataError where it is no
        number."""
        del pair
        return None

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of both texts of each pair, [N, 2]."""
        return np.diff(self._bounds).reshape(-1, 2)

    @property
    def num_pairs(self) -> int:
        """Number of pairs, N."""
        return len(self._origins) // 2

    def remarks(self, split: str) -> list[str]:
        """Returns what a person should know about the rows, in lines."""
        total = self.num_pairs + sum(map(len, self.dropped.values()))
        lines = [f'{split}: {self.num_pairs:,} pairs in {len(self):,} rows']
        if self.num_cut:
            lines.append(
                f'warning: {split}: {self.num_cut:,} of {total:,} pairs are cut, so that both texts fit into '
                f'config.seq_length={self.seq_length}'
            )
        for reason, origins in self.dropped.items():
            if origins:
                lines.append(
                    f'warning: {split}: {len(origins):,} of {total:,} pairs {reason} and are left out, the first of '
                    f'them {origins[0]}'
                )
        if self.repeating:
            lines.append(
                f'warning: {split}: {len(self.repeating):,} of {total:,} pairs have texts as answers that both begin '
                f'with the prompt, which is there twice then, the first of them {self.repeating[0]}'
            )
        return lines


@dataclasses.dataclass(frozen=True)
class WithReference:
    """Pairs as rows (see Examples), with what a reference network says of them, by row.

    `log_probs` [N, T] are those of the tokens of the answers, float32, in nats, and 0 at other tokens; batches have
    them as `reference_log_probs` [n, T].
    """

    rows: Pairs
    log_probs: np.ndarray

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See Examples."""
        return self.rows.fingerprint

    @property
    def by_length(self) -> bool:
        """See Rows: an evaluation is to read them as it reads the rows themselves."""
        return self.rows.by_length

    def __len__(self) -> int:
        return len(self.rows)

    def origin(self, number: int) -> str:
        """See Examples."""
        return self.rows.origin(number)

    def batch(self, numbers: Numbers, epochs: Numbers | None = None) -> Batch:
        """See Examples."""
        return self.rows.batch(numbers, epochs) | {REFERENCE: self.log_probs[np.asarray(numbers)]}


class PairsWithMargins(Pairs):
    """Pairs whose batches have `margin` [n, P] float32 too: by how much more the chosen text of each pair is to be
    rewarded, 0 where the record does not say."""

    def margin(self, pair: Pair) -> float | None:
        return pair_records.read_margin(pair.margin)

    def batch(self, numbers: Numbers, epochs: Numbers | None = None) -> Batch:
        margins = np.zeros((len(numbers), num_pairs(self.fingerprint['mode'], self.seq_length)), np.float32)
        for row, number in zip(margins, np.asarray(numbers).tolist(), strict=True):
            texts = self._rows[number][::2]
            row[: len(texts)] = [self._margins[text // 2] for text in texts]
        return super().batch(numbers, epochs) | {'margin': margins}


def num_pairs(mode: str, seq_length: int) -> int:
    """Returns how many pairs a row may have, P."""
    return 1 if mode == 'pad' else max(1, seq_length // SHORTEST)


def _fitted(both: Sequence[Text], size: int) -> list[Text]:
    """Returns both texts, the longer one cut, or both to half of `size`, so that together they are no longer."""
    shorter = min(len(ids) for ids, _ in both)
    room = max(size // 2, size - shorter)
    return [(ids[:room], learned[:room]) for ids, learned in both]


def _problem(pair: Pair, kept: Sequence[Text]) -> str | None:
    """Returns why a pair is no example, one of REASONS; None: it is one."""
    if pair.same:
        return REASONS[0]
    if not all(learned[1:].any() for _, learned in kept):
        return REASONS[1]
    return REASONS[2] if np.array_equal(kept[0][0], kept[1][0]) else None


def _tokens(pair: Pair, template: chat.Template, tokenizer: Tokenizer) -> list[Text]:
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
) -> Text:
    """Returns the ids [n] of a prompt with an answer, up to the token that ends it, and which are of the answer, [n]
    bool: what the assistant says after the prompt, of which `prompt_ids` are the ids."""
    ids, learned = template.tokens([*prompt, *answer], tools=tools)
    shorter = min(len(ids), len(prompt_ids))
    apart = np.flatnonzero(ids[:shorter] != prompt_ids[:shorter])
    first = int(apart[0]) if len(apart) else shorter  # a token may reach from the prompt into the answer
    return ids, learned & (np.arange(len(ids)) >= first)


@functools.lru_cache(maxsize=2)  # both splits come from one reading, or from files of their own
def gather(source: str, state: Any) -> list[Pair]:
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

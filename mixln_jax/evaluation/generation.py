"""Text that a network writes: what follows a context, up to a stop string, an end token or a number of tokens.

A generated text is written as a line of JSON, an object with the FIELDS.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from mixln_jax.models.sampler import Completion, Sampler
from mixln_jax.runs.encoder import TextEncoder

FIELDS = 'prompt', 'completion', 'finish', 'ids', 'log_probs'
TAIL = 16  # tokens of the context that are decoded with what follows it
BROKEN = '\ufffd'  # what bytes are decoded to that are no whole character


@dataclasses.dataclass
class Continuation:
    """What follows a context.

    Attributes:
        tokens: with `finish`, which is `stop` after a stop string too; the token that completes it is the last one.
        text: of all tokens, up to the stop string; while it grows, without its end where more tokens may change it.
    """

    tokens: Completion
    text: str = ''

    def record(self, prompt: str) -> dict[str, Any]:
        """Returns the FIELDS of the continuation of a prompt."""
        tokens = self.tokens
        return dict(zip(FIELDS, (prompt, self.text, tokens.finish, tokens.ids, tokens.log_probs), strict=True))


def json_lines(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Returns records as JSON lines."""
    return b''.join(orjson.dumps(record) + b'\n' for record in records)


class Writer:
    """Continues contexts with a sampler, and decodes what it gives."""

    def __init__(self, sampler: Sampler, params: Any, encoder: TextEncoder, tail: int = TAIL, step: Any = None) -> None:
        """Keeps its arguments.

        Args:
            sampler: of the network.
            params: its weights, on the sampler's devices.
            encoder: its tokenizer and end tokens.
            tail: tokens of a context that are decoded with its continuation, so that the latter begins with the blank
                that some tokenizers only have inside a text; 0: the continuation is decoded alone.
            step: number of updates that made the weights, at which ramps stand; see Network.
        """
        self._sampler, self._params, self._step = sampler, params, step
        self._tokenizer, self._end_ids, self._tail = encoder.tokenizer, encoder.end_ids, tail

    def stream(
        self, contexts: Sequence[Sequence[int]], stops: Sequence[Sequence[str]], **options: Any
    ) -> Iterator[list[Continuation]]:
        """Yields the continuations of a batch of contexts, the same objects each time, which grow.

        Args:
            contexts: token ids, at least one in each.
            stops: the strings that end each continuation, which they are no part of.
            options: `max_new`, `sampling`, `seed`, `rows`, `size` and `steps` of `Sampler.stream`.
        """
        batch: list[Continuation] = []
        options |= {'end_ids': self._end_ids, 'step': self._step}
        for completions in self._sampler.stream(self._params, contexts, **options):
            batch = batch or [Continuation(tokens) for tokens in completions]
            for context, one, strings in zip(contexts, batch, stops, strict=True):
                self._update(one, context, strings)
            yield batch

    def complete(
        self,
        contexts: Sequence[Sequence[int]],
        stops: Sequence[Sequence[str]],
        max_new: Sequence[int],
        batch_size: int,
        done: Callable[[int], object] = lambda count: None,
        numbers: Sequence[int] | None = None,
        **options: Any,
    ) -> list[Continuation]:
        """Returns the continuation of each context, computed `batch_size` at a time, those of like lengths together.

        `done` is called with the number of contexts of each batch. `numbers` are those on which the random numbers of
        each context depend; None: 0, 1 and so on. For the rest see `stream`.
        """
        order = sorted(range(len(contexts)), key=lambda number: -len(contexts[number]))
        made: dict[int, Continuation] = {}
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            *_, batch = self.stream(
                [contexts[row] for row in rows],
                [stops[row] for row in rows],
                max_new=[max_new[row] for row in rows],
                rows=rows if numbers is None else [numbers[row] for row in rows],
                size=min(batch_size, len(contexts)),
                **options,
            )
            made |= zip(rows, batch, strict=True)
            done(len(rows))
        return [made[row] for row in range(len(contexts))]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids."""
        return self._tokenizer.decode(list(ids)) if len(ids) else ''

    def _update(self, one: Continuation, context: Sequence[int], stops: Sequence[str]) -> None:
        """Brings the text of a continuation to its tokens, and ends it at a stop string."""
        tokens, decode = one.tokens, lambda count: self._decode(context, one.tokens.ids[:count])
        text = decode(None)
        if places := [text.find(stop) for stop in stops if stop and stop in text]:
            count = next(n for n in range(1, len(tokens.ids) + 1) if any(stop in decode(n) for stop in stops if stop))
            tokens.ids, tokens.log_probs, tokens.finish = tokens.ids[:count], tokens.log_probs[:count], 'stop'
            text = text[: min(places)]
        one.text = text if tokens.finish else _settled(text, stops)

    def _decode(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """Returns the text of ids after a context."""
        tail = list(context[-self._tail :]) if self._tail else []
        before, text = self.decode(tail), self.decode([*tail, *ids])
        return text[len(before if text.startswith(before) else before.rstrip(BROKEN)) :]


def context(row: Mapping[str, np.ndarray], longest: int) -> list[int]:
    """Returns the tokens of an example that are to be continued.

    Args:
        row: an example of a batch: `inputs` and `loss_mask` [T], and in packed rows `segment_ids` [T].
        longest: most tokens of text.

    Returns:
        Of its first document the first tokens, up to `longest`; or where these are not learned, as in a prompt, all
        tokens up to the first one that is learned.
    """
    segment_ids = row.get('segment_ids', np.zeros(len(row['inputs'])))
    learned = (row['loss_mask'] > 0) & (segment_ids == segment_ids[0])
    first = int(learned.argmax())
    if first:
        return row['inputs'][: first + 1].tolist()
    text = int(np.logical_and.accumulate(learned).sum())
    return row['inputs'][: max(1, min(longest, text))].tolist()


def _settled(text: str, stops: Sequence[str]) -> str:
    """Returns a text without what more tokens may change: a broken character at its end, or the start of a stop
    string."""
    text = text.rstrip(BROKEN)
    starts = (text.rfind(stop[:size]) for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    return text[: min(starts, default=len(text))]

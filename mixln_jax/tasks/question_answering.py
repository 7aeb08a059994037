"""Question answering on SQuAD (Rajpurkar et al. 2016, 2018): the loss, the best spans, exact match and F1.

As in Devlin et al.'s run_squad.py, which transformers 4 follows in data/processors/squad.py; but answers are cut out of
the text by the tokenizer's offsets, so one that begins with a later piece of a word begins there, not with the word.
Q questions, N rows (windows of texts, in the order of the questions), T tokens.
"""

import collections
import dataclasses
import functools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mixln_jax.data import batches, squad
from mixln_jax.models.network import Network
from mixln_jax.system.errors import NumericsError, UsageError
from mixln_jax.tasks.task import EVALUATION, Batch, Context, Losses, Task

ARTICLES = re.compile(r'\b(a|an|the)\b')
PUNCTUATION = str.maketrans('', '', string.punctuation)
N_BEST = 20  # positions at which an answer may begin, and as many at which it may end
LONGEST = 30  # tokens of an answer


@dataclasses.dataclass(frozen=True)
class QuestionAnswering(Task):
    """Answers to questions about a text, as spans of it; the loss is the mean of the cross-entropies of the first and
    the last token of the answer (Devlin et al. 2019, section 4.2), over all rows."""

    headline: ClassVar[str] = 'exact_match'
    label: ClassVar[str] = 'EM'
    digits: ClassVar[int] = 2

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        row, length = (batch_size,), self.model.config.num_positions
        shapes: dict[str, tuple[tuple[int, ...], str]] = {
            'inputs': ((*row, length), 'i4'),
            'types': ((*row, length), 'i4'),
            'token_mask': ((*row, length), 'f4'),
            'answer': ((*row, 2), 'i4'),
            'answer_mask': (row, 'f4'),
            'example_mask': (row, 'f4'),
            'place': (row, 'u4'),
        }
        return {name: jax.ShapeDtypeStruct(shape, np.dtype(kind)) for name, (shape, kind) in shapes.items()}

    def position_mask(self, batch: Mapping[str, Any]) -> Any:
        return batch['token_mask']

    def losses(self, params: Any, batch: Batch, context: Context = EVALUATION) -> Losses:
        logits = jnp.stack(
            self.model.apply({'params': params, **context.collections}, batch, context.layer_mask, step=context.step),
            axis=1,
        )  # [B,2,T]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['answer']).mean(-1)
        per_example = losses * batch['answer_mask']
        weights, tokens = batch['answer_mask'], batch['token_mask'].sum()
        return Losses(per_example.sum(), weights.sum(), per_example, weights, {'tokens': tokens})

    def summary(self, totals: Mapping[str, Any]) -> dict[str, float | None]:
        return {'loss': totals['sum'] / totals['weight']}

    def score(
        self, params: Any, examples: squad.Features, batch_size: int, layer_mask: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Returns {'exact_match', 'f1'}: [Q] float64 in 0..1; see `evaluate`."""
        return evaluate(self.model, params, examples, examples.questions, batch_size, layer_mask)


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Network, params: Any, batch: Batch, layer_mask: jax.Array) -> jax.Array:
    """Returns logits [2,B,T] of the first and of the last token of the answer."""
    start_and_end: Any = model.apply({'params': params}, batch, layer_mask)
    return jnp.stack(start_and_end)


def logits(
    model: Network, params: Any, features: squad.Features, batch_size: int, layer_mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits (start [N,T], end [N,T]) of all rows, float32.

    Compiled once for a network and batch size, whatever `layer_mask` is.

    Args:
        model, params: a BERT with a head that finds spans, from `hf_bert.load`.
        features: from `make_features`.
        batch_size: rows at a time.
        layer_mask: [L] bool: layers that are False are removed. None: all layers run.

    Raises:
        UsageError: rows that are not for this network. NumericsError: logits that are not finite.
    """
    for name, rows in (('inputs', model.config.vocab_size), ('types', model.config.num_types)):
        if (largest := getattr(features, name).max()) >= rows:
            raise UsageError(f'the features have {name} up to {largest}, but the network has a table of {rows}')
    layer_mask = np.asarray([True] * model.config.num_layers if layer_mask is None else layer_mask, bool)
    dataset = batches.evaluation(features, batch_size)
    batch_logits = jax.device_get(
        [_logits(model, params, batch, layer_mask) for batch in map(dataset.__getitem__, range(len(dataset)))]
    )
    start, end = np.concatenate(batch_logits, axis=1)[:, : len(features.inputs)]
    if not np.isfinite(start[features.token_mask > 0] + end[features.token_mask > 0]).all():
        raise NumericsError('the logits of where answers begin and end are not finite')
    return start, end


def best_answers(
    start: np.ndarray, end: np.ndarray, features: squad.Features, examples: Sequence[squad.Question]
) -> list[str]:
    """Returns the text of each question's best span, [Q]; '' if there is none, or if no answer scores higher (v2.0).

    A span begins and ends at some of the N_BEST positions of its row with the largest logits `start` and `end` [N,T],
    is of LONGEST tokens at most, and begins where no other window shows more; it is as good as the sum of both. No
    answer is as good as the sum at [CLS], the smallest of the question's rows.
    """
    order = lambda values: np.argsort(-values, axis=1, kind='stable')[:, :N_BEST]  # noqa: E731
    pick = functools.partial(np.take_along_axis, axis=1)
    first, last = order(start), order(end)
    lengths = last[:, None, :] - first[:, :, None] + 1
    allowed = pick(features.begins, first)[:, :, None] & pick(features.context, last)[:, None, :]
    allowed &= (lengths >= 1) & (lengths <= LONGEST)
    start, end = start.astype(np.float64), end.astype(np.float64)
    sums = np.where(allowed, pick(start, first)[:, :, None] + pick(end, last)[:, None, :], -np.inf)
    places = sums.reshape(len(sums), -1).argmax(axis=1)
    null = start[:, 0] + end[:, 0]
    best, texts = np.full(len(examples), -np.inf), [''] * len(examples)
    least = np.full(len(examples), np.inf)
    for row, number in enumerate(features.example):
        least[number] = min(least[number], null[row])
        b, e = np.unravel_index(places[row], sums.shape[1:])
        if sums[row, b, e] > best[number]:
            begin, stop = features.offsets[row, first[row, b], 0], features.offsets[row, last[row, e], 1]
            best[number], texts[number] = sums[row, b, e], examples[number].context[begin:stop]
    lacks = [example.nullable and gap > 0 for example, gap in zip(examples, least - best, strict=True)]
    return ['' if lack else text for lack, text in zip(lacks, texts, strict=True)]


def evaluate(
    model: Network,
    params: Any,
    features: squad.Features,
    examples: Sequence[squad.Question],
    batch_size: int,
    layer_mask: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Returns {'exact_match', 'f1'}: [Q] float64 in 0..1, of each question; scores in percent are 100 times the means.

    Arguments and errors are those of `logits`; `examples` is the list that the features were made of.
    """
    texts = best_answers(*logits(model, params, features, batch_size, layer_mask), features, examples)
    return scores(texts, examples)


def scores(texts: Sequence[str], examples: Sequence[squad.Question]) -> dict[str, np.ndarray]:
    """Returns the scores of texts [Q] as `evaluate` does: of each the best over the question's answers."""
    pairs = [(text, example.answers) for text, example in zip(texts, examples, strict=True)]
    return {
        'exact_match': np.array([max(exact_match(text, gold) for gold in _golds(golds)) for text, golds in pairs]),
        'f1': np.array([max(f1(text, gold) for gold in _golds(golds)) for text, golds in pairs]),
    }


def _golds(answers: Sequence[str]) -> list[str]:
    """Returns the answers that have a word; '' if there are none, as in the official scorer of v2.0."""
    return [answer for answer in answers if normalized(answer)] or ['']


def exact_match(text: str, gold: str) -> float:
    """Returns 1.0 if both have the same words, else 0.0."""
    return float(normalized(text) == normalized(gold))


def f1(text: str, gold: str) -> float:
    """Returns the harmonic mean of precision and recall of the words; if a text has none, whether both have none."""
    ours, theirs = normalized(text), normalized(gold)
    if not ours or not theirs:
        return float(ours == theirs)
    same = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * same / (len(ours) + len(theirs))


def normalized(text: str) -> list[str]:
    """Returns the words of a text, in lower case, without punctuation and articles."""
    return ARTICLES.sub(' ', text.lower().translate(PUNCTUATION)).split()

"""SQuAD (Rajpurkar et al. 2016, 2018): its files, rows of tokens for BERT, best spans, exact match and F1.

As in Devlin et al.'s run_squad.py, which transformers 4 follows in data/processors/squad.py; but answers are cut out of
the text by the tokenizer's offsets, so one that begins with a later piece of a word begins there, not with the word.
Q questions, N rows (windows of texts, in the order of the questions), T tokens.
"""

import collections
import dataclasses
import functools
import pathlib
import re
import string

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from mixln_jax import paths
from mixln_jax.exits import CheckpointError, DataError, NumericsError, UsageError, reading

ARTICLES = re.compile(r'\b(a|an|the)\b')
PUNCTUATION = str.maketrans('', '', string.punctuation)
SPECIALS = '[CLS]', '[SEP]', '[PAD]'
N_BEST = 20  # positions at which an answer may begin, and as many at which it may end
LONGEST = 30  # tokens of an answer


@dataclasses.dataclass(frozen=True)
class Example:
    """A question. `nullable`: its file (v2.0) has questions that the text does not answer, with no `answers`."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    nullable: bool


@dataclasses.dataclass(frozen=True)
class Features:
    """Rows [CLS] question [SEP] window [SEP], padded to T, as arrays [N,T]; `example` [N] is each row's question.

    `inputs` and `types` int32 and `weights` float32 (1 at tokens, 0 at padding) are what the network sees. `context`
    bool: tokens of the text; `begins` bool: those that no other window of the question shows with more text around
    them; `offsets` [N,T,2] int32: the characters of the text that they stand for.
    """

    inputs: np.ndarray
    types: np.ndarray
    weights: np.ndarray
    context: np.ndarray
    begins: np.ndarray
    offsets: np.ndarray
    example: np.ndarray

    def batches(self, batch_size):
        """Yields dicts of `inputs`, `types` and `weights` [batch_size,T]; rows that fill up the last weigh 0."""
        for first in range(0, len(self.inputs), batch_size):
            rows = np.arange(first, first + batch_size)
            real = rows < len(self.inputs)
            rows = np.where(real, rows, first)
            batch = {name: getattr(self, name)[rows] for name in ('inputs', 'types', 'weights')}
            yield batch | {'weights': batch['weights'] * real[:, None].astype(np.float32)}


_KINDS = {list: 'a list', str: 'a text', bool: 'true or false'}  # what a value of a SQuAD file may be


def read(path):
    """The questions of a SQuAD file, v1.1 or v2.0, as a list of Examples.

    Raises DataError: missing, not JSON, or not of this form, naming the place.
    """
    path = pathlib.Path(path)
    with reading(path, DataError, 'not readable JSON'):
        try:
            found = paths.read_json(path, DataError)
        except DataError as error:
            lines = '; a file of SQuAD is one object, not one a line' if 'Extra data' in str(error) else ''
            raise DataError(f'{error}{lines}') from None
    examples, seen = [], set()

    def take(owner, name, kind, where):
        value = owner.get(name) if isinstance(owner, dict) else None
        if not isinstance(value, kind):
            raise DataError(f'{path}: {where}{name} is not {_KINDS[kind]}')
        if kind is str and re.search('[\ud800-\udfff]', value):
            raise DataError(f'{path}: {where}{name} has half a character, a lone surrogate')
        return value

    for a, article in enumerate(take(found, 'data', list, '')):
        for p, paragraph in enumerate(take(article, 'paragraphs', list, f'data[{a}].')):
            inside = f'data[{a}].paragraphs[{p}].'
            context = take(paragraph, 'context', str, inside)
            for q, asked in enumerate(take(paragraph, 'qas', list, inside)):
                where = f'{inside}qas[{q}].'
                name, question = (take(asked, key, str, where) for key in ('id', 'question'))
                answers = take(asked, 'answers', list, where)
                texts = tuple(take(answer, 'text', str, f'{where}answers[{i}].') for i, answer in enumerate(answers))
                lacks = take(asked, 'is_impossible', bool, where) if 'is_impossible' in asked else None
                if bool(lacks) == bool(texts):
                    says = 'is impossible, but has answers' if lacks else 'has no answer, but is not is_impossible'
                    raise DataError(f'{path}: question {name} {says}')
                if name in seen:
                    raise DataError(f'{path}: two questions have the id {name}')
                seen.add(name)
                examples.append(Example(name, question, context, texts, lacks is not None))
    if not examples:
        raise DataError(f'{path} has no questions')
    return examples


def open_tokenizer(folder):
    """The tokenizer of a BERT folder: its tokenizer.json, else vocab.txt as tokenizer_config.json says.

    Raises UsageError: no such files. CheckpointError: unreadable, or without BERT's special tokens.
    """
    folder = pathlib.Path(folder)
    with reading(folder, CheckpointError, 'its tokenizer is not readable'):
        if (folder / 'tokenizer.json').is_file():
            made = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
        else:
            made = _from_vocabulary(folder)
    made.no_truncation()
    made.no_padding()
    for token in SPECIALS:
        if made.token_to_id(token) is None:
            raise CheckpointError(f"{folder}: the tokenizer has no token {token}, so it is not BERT's")
    return made


def _from_vocabulary(folder):
    for name in ('vocab.txt', 'tokenizer_config.json'):
        if not (folder / name).is_file():
            raise UsageError(f'{folder} has neither tokenizer.json nor both of vocab.txt and tokenizer_config.json')
    settings = paths.read_json(folder / 'tokenizer_config.json', CheckpointError)
    if not isinstance(settings.get('do_lower_case'), bool):
        raise CheckpointError(f'{folder / "tokenizer_config.json"} does not say do_lower_case, true or false')
    return tokenizers.BertWordPieceTokenizer(
        tokenizers.models.WordPiece.read_file(str(folder / 'vocab.txt')),
        lowercase=settings['do_lower_case'],
        strip_accents=settings.get('strip_accents'),
        handle_chinese_chars=settings.get('tokenize_chinese_chars', True),
    )


def make_features(examples, tokenizer, max_length=384, stride=128, max_query=64):
    """The Features of a list of Examples.

    Args:
        examples: from `read`.
        tokenizer: from `open_tokenizer`.
        max_length: T. A text that does not fit becomes several windows.
        stride: tokens from the beginning of a window to that of the next.
        max_query: tokens that are kept of a question.

    Raises:
        UsageError: no stride, or rows too short for a question and a token of its text.
    """
    if stride < 1 or max_query < 1 or max_length < max_query + 4:
        raise UsageError(
            f'max_length={max_length}, stride={stride}, max_query={max_query}: stride and max_query must be at least '
            '1, max_length at least max_query + 4 for [CLS], two [SEP] and a token of the text'
        )
    cls, sep, pad = (tokenizer.token_to_id(token) for token in SPECIALS)

    @functools.lru_cache(maxsize=1)  # the questions about a text follow each other
    def encoded(context):
        found = tokenizer.encode(context, add_special_tokens=False)
        return np.array(found.ids, np.int32), np.array(found.offsets, np.int32).reshape(-1, 2)

    windows = []
    for number, example in enumerate(examples):
        query = tokenizer.encode(example.question, add_special_tokens=False).ids[:max_query]
        total = len(encoded(example.context)[0])
        spans = _windows(total, max_length - len(query) - 3, stride)
        windows += [(number, query, *at) for at in zip(spans, _shows_best(spans, total), strict=True)]
    shape = len(windows), max_length
    made = Features(
        inputs=np.full(shape, pad, np.int32),
        types=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
        context=np.zeros(shape, bool),
        begins=np.zeros(shape, bool),
        offsets=np.zeros((*shape, 2), np.int32),
        example=np.array([number for number, *_ in windows], np.int32),
    )
    for row, (number, query, (start, end), best) in enumerate(windows):
        ids, offsets = encoded(examples[number].context)
        first = len(query) + 2
        last = first + end - start  # the second [SEP]
        made.inputs[row, : last + 1] = [cls, *query, sep, *ids[start:end], sep]
        made.types[row, first : last + 1] = 1
        made.weights[row, : last + 1] = 1
        made.context[row, first:last] = True
        made.begins[row, first:last] = best
        made.offsets[row, first:last] = offsets[start:end]
    return made


def _windows(total, room, stride):
    """[(start, end)] of a text of `total` tokens: windows of up to `room`, one at least."""
    spans = [(0, min(room, total))]
    while spans[-1][1] < total:
        start = spans[-1][0] + min(room, stride)
        spans.append((start, min(start + room, total)))
    return spans


def _shows_best(spans, total):
    """Per window [end - start] bool: tokens that it shows with more text around them than any window before or after.

    What counts is the smaller of the two sides, and a hundredth of the window (run_squad.py).
    """
    around = np.full((len(spans), total), -np.inf)
    for window, (start, end) in enumerate(spans):
        at = np.arange(start, end)
        around[window, start:end] = np.minimum(at - start, end - 1 - at) + 0.01 * (end - start)
    best = around.argmax(axis=0)
    return [best[start:end] == window for window, (start, end) in enumerate(spans)]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model, params, batch, keep):
    """[2,B,T]: of where the answer begins and where it ends."""
    seen = batch['weights'][:, None, None, :] > 0
    return jnp.stack(model.apply({'params': params}, batch['inputs'], batch['types'], seen, keep))


def logits(model, params, features, batch_size, keep=None):
    """(start [N,T], end [N,T]) of all rows, float32. Compiled once for a network and batch size, whatever `keep` is.

    Args:
        model, params: a BERT with a head that finds spans, from `hf_bert.load`.
        features: from `make_features`.
        batch_size: rows at a time.
        keep: [L] bool: layers that are False are removed. None: all are kept.

    Raises:
        UsageError: rows that are not for this network. NumericsError: logits that are not finite.
    """
    for name, rows in (('inputs', model.config.vocab_size), ('types', model.config.num_types)):
        if (largest := getattr(features, name).max()) >= rows:
            raise UsageError(f'the features have {name} up to {largest}, but the network has a table of {rows}')
    keep = np.ones(model.config.num_layers, bool) if keep is None else np.asarray(keep, bool)
    found = jax.device_get([_logits(model, params, batch, keep) for batch in features.batches(batch_size)])
    start, end = np.concatenate(found, axis=1)[:, : len(features.inputs)]
    if not np.isfinite(start[features.weights > 0] + end[features.weights > 0]).all():
        raise NumericsError('the logits of where answers begin and end are not finite')
    return start, end


def best_answers(start, end, features, examples):
    """The text of each question's best span, [Q]; '' where there is none, or where no answer is better (v2.0).

    A span begins and ends at some of the N_BEST positions of its row with the largest logits `start` and `end` [N,T],
    is of LONGEST tokens at most, and begins where no other window shows more; it is as good as the sum of both. No
    answer is as good as the sum at [CLS], the smallest of the question's rows.
    """
    order = lambda of: np.argsort(-of, axis=1, kind='stable')[:, :N_BEST]  # noqa: E731
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


def evaluate(model, params, features, examples, batch_size, keep=None):
    """{'exact_match', 'f1'}: [Q] float64 in 0..1, of each question; the scores in percent are 100 times their means.

    Arguments and errors are those of `logits`, and `examples` the list that the features were made of.
    """
    texts = best_answers(*logits(model, params, features, batch_size, keep), features, examples)
    return scores(texts, examples)


def scores(texts, examples):
    """What `evaluate` gives, for the texts [Q]: of each the best over the question's answers."""
    pairs = [(text, example.answers) for text, example in zip(texts, examples, strict=True)]
    return {
        'exact_match': np.array([max(exact_match(text, gold) for gold in _golds(golds)) for text, golds in pairs]),
        'f1': np.array([max(f1(text, gold) for gold in _golds(golds)) for text, golds in pairs]),
    }


def _golds(answers):
    """Those with a word in them; '' where there are none, as the official scorer of v2.0 has it."""
    return [answer for answer in answers if normalized(answer)] or ['']


def exact_match(text, gold):
    """1.0 where both have the same words, else 0.0."""
    return float(normalized(text) == normalized(gold))


def f1(text, gold):
    """The harmonic mean of precision and recall of the words of `text`; where one has none, whether both have none."""
    ours, theirs = normalized(text), normalized(gold)
    if not ours or not theirs:
        return float(ours == theirs)
    same = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * same / (len(ours) + len(theirs))


def normalized(text):
    """The words of a text, in lower case, without punctuation and articles."""
    return ARTICLES.sub(' ', text.lower().translate(PUNCTUATION)).split()

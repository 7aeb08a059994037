"""SQuAD files as rows of tokens for BERT."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from mixln_jax.data.examples import Batch, Numbers
from mixln_jax.system import files
from mixln_jax.system.errors import CheckpointError, DataError, UsageError, reading

SPECIALS = '[CLS]', '[SEP]', '[PAD]'


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a text.

    `nullable`: its file (v2.0) has questions that the text does not answer, without `answers`. `start`: the character
    at which the first answer begins; None: there is no answer, or the file does not say.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    nullable: bool
    start: int | None = None


@dataclasses.dataclass(frozen=True)
class Features:
    """Examples that are rows [CLS] question [SEP] window [SEP], padded to T, as arrays [N,T].

    `example` [N] is the number of each row's question in `questions`.

    The network sees `inputs` and `types` int32 and `token_mask` float32 (1 at tokens, 0 at padding). `context` bool:
    tokens of the text; `begins` bool: those that no other window of the question shows with more text around them;
    `offsets` [N,T,2] int32: the characters of the text that they stand for. `answer` [N,2] int32: the first and the
    last token of the first answer, both 0, [CLS], if the window does not hold all of it; `answer_mask` [N] float32: 0
    if the file does not say where the answer is.
    """

    inputs: np.ndarray
    types: np.ndarray
    token_mask: np.ndarray
    context: np.ndarray
    begins: np.ndarray
    offsets: np.ndarray
    example: np.ndarray
    answer: np.ndarray
    answer_mask: np.ndarray
    questions: tuple[Question, ...] = ()
    fingerprint: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, numbers: Numbers, epochs: Numbers | None = None) -> Batch:
        """Returns `inputs`, `types` and `token_mask` [n,T], `answer` [n,2] and `answer_mask` [n]; see examples.py."""
        names = 'inputs', 'types', 'token_mask', 'answer', 'answer_mask'
        return {name: getattr(self, name)[np.asarray(numbers)] for name in names}

    def origin(self, number: int) -> str:
        """Returns the question of a row, and the number of the row."""
        return f'question {self.questions[self.example[number]].id}, row {number}'


SHIFT = 2  # characters by which an `answer_start` may be off, as some are in files made by hand
_KINDS = {list: 'a list', str: 'a text', bool: 'true or false'}  # types of values in a SQuAD file


def read(path: str | pathlib.Path) -> list[Question]:
    """Returns the questions of a SQuAD file, v1.1 or v2.0.

    Raises DataError: missing, not JSON, or not of this form, naming the place; a context or an answer that is empty; an
    answer that the context does not have at its `answer_start`, where it has one, naming the question.
    """
    path = pathlib.Path(path)
    with reading(path, DataError, 'not readable JSON'):
        try:
            content = files.read_json(path, DataError)
        except DataError as error:
            lines = '; a file of SQuAD is one object, not one a line' if 'Extra data' in str(error) else ''
            raise DataError(f'{error}{lines}') from None
    questions, seen = [], set()

    def take(owner: Any, name: str, kind: type, prefix: str) -> Any:
        value = owner.get(name) if isinstance(owner, dict) else None
        if not isinstance(value, kind):
            raise DataError(f'{path}: {prefix}{name} is not {_KINDS[kind]}')
        if isinstance(value, str) and re.search('[\ud800-\udfff]', value):
            raise DataError(f'{path}: {prefix}{name} has half a character, a lone surrogate')
        return value

    for a, article in enumerate(take(content, 'data', list, '')):
        for p, paragraph in enumerate(take(article, 'paragraphs', list, f'data[{a}].')):
            inside = f'data[{a}].paragraphs[{p}].'
            context = take(paragraph, 'context', str, inside)
            if not context.strip():
                raise DataError(f'{path}: {inside}context is empty')
            for q, asked in enumerate(take(paragraph, 'qas', list, inside)):
                owner = f'{inside}qas[{q}].'
                name, question = (take(asked, key, str, owner) for key in ('id', 'question'))
                answers = take(asked, 'answers', list, owner)
                texts = tuple(take(answer, 'text', str, f'{owner}answers[{i}].') for i, answer in enumerate(answers))
                lacks = take(asked, 'is_impossible', bool, owner) if 'is_impossible' in asked else None
                if bool(lacks) == bool(texts):
                    conflict = 'is impossible, but has answers' if lacks else 'has no answer, but is not is_impossible'
                    raise DataError(f'{path}: question {name} {conflict}')
                for answer in answers:
                    if problem := _problem(answer, context):
                        raise DataError(f'{path}: question {name}: {problem}')
                if name in seen:
                    raise DataError(f'{path}: two questions have the id {name}')
                seen.add(name)
                start = _start(answers[0], context) if answers else None
                questions.append(Question(name, question, context, texts, lacks is not None, start))
    if not questions:
        raise DataError(f'{path} has no questions')
    return questions


def _start(answer: Mapping[str, Any], context: str) -> int | None:
    """Returns the character at which an answer begins, near its `answer_start`; None if it is not there."""
    stated = answer.get('answer_start')
    start = context.find(answer['text'], max((stated or 0) - SHIFT, 0))
    return None if start < 0 else start


def _problem(answer: Mapping[str, Any], context: str) -> str | None:
    """Returns why an answer is not from the context; None if it is."""
    text, start = answer['text'], answer.get('answer_start')
    if not text.strip():
        return 'the text of an answer is empty'
    if start is None:
        return None
    if type(start) is not int or not 0 <= start < len(context):
        return f'answer_start is {start!r:.80}, the context has {len(context):,} characters'
    if text not in context[max(start - SHIFT, 0) : start + len(text) + SHIFT]:
        return f'the answer {text!r:.80} does not stand in the context at its answer_start, {start}'
    return None


def open_tokenizer(folder: str | pathlib.Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a BERT folder: its tokenizer.json, or vocab.txt, read as tokenizer_config.json says.

    Raises UsageError: no such files. CheckpointError: unreadable, or without BERT's special tokens.
    """
    folder = pathlib.Path(folder)
    with reading(folder, CheckpointError, 'its tokenizer is not readable'):
        if (folder / 'tokenizer.json').is_file():
            tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
        else:
            tokenizer = _from_vocabulary(folder)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for token in SPECIALS:
        if tokenizer.token_to_id(token) is None:
            raise CheckpointError(f"{folder}: the tokenizer has no token {token}, so it is not BERT's")
    return tokenizer


def _from_vocabulary(folder: pathlib.Path) -> tokenizers.BertWordPieceTokenizer:
    for name in ('vocab.txt', 'tokenizer_config.json'):
        if not (folder / name).is_file():
            raise UsageError(f'{folder} has neither tokenizer.json nor both of vocab.txt and tokenizer_config.json')
    settings = files.read_json(folder / 'tokenizer_config.json', CheckpointError)
    if not isinstance(settings.get('do_lower_case'), bool):
        raise CheckpointError(f'{folder / "tokenizer_config.json"} does not say do_lower_case, true or false')
    return tokenizers.BertWordPieceTokenizer(
        tokenizers.models.WordPiece.read_file(str(folder / 'vocab.txt')),
        lowercase=settings['do_lower_case'],
        strip_accents=settings.get('strip_accents'),
        handle_chinese_chars=settings.get('tokenize_chinese_chars', True),
    )


def make_features(
    questions: Sequence[Question],
    tokenizer: tokenizers.Tokenizer,
    max_length: int = 384,
    stride: int = 128,
    max_query: int = 64,
) -> Features:
    """Returns the Features of a list of Questions.

    Args:
        questions: from `read`.
        tokenizer: from `open_tokenizer`.
        max_length: T. A text that does not fit becomes several windows.
        stride: tokens from the start of a window to the start of the next one.
        max_query: tokens of a question that are kept.

    Raises:
        UsageError: a stride below 1, or rows too short for a question and a token of its text.
    """
    if stride < 1 or max_query < 1 or max_length < max_query + 4:
        raise UsageError(
            f'max_length={max_length}, stride={stride}, max_query={max_query}: stride and max_query must be at least '
            '1, max_length at least max_query + 4 for [CLS], two [SEP] and a token of the text'
        )
    cls, sep, pad = (tokenizer.token_to_id(token) for token in SPECIALS)

    @functools.lru_cache(maxsize=1)  # the questions about a text follow each other
    def encoded(context: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = tokenizer.encode(context, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)

    windows = []
    for number, question in enumerate(questions):
        query = tokenizer.encode(question.question, add_special_tokens=False).ids[:max_query]
        total = len(encoded(question.context)[0])
        spans = _windows(total, max_length - len(query) - 3, stride)
        windows += [(number, query, *window) for window in zip(spans, _shows_best(spans, total), strict=True)]
    features = _padding(max_length, pad, np.array([number for number, *_ in windows], np.int32), questions)
    for row, (number, query, (start, end), best) in enumerate(windows):
        question = questions[number]
        ids, offsets = encoded(question.context)
        first = len(query) + 2
        last = first + end - start  # the second [SEP]
        features.inputs[row, : last + 1] = [cls, *query, sep, *ids[start:end], sep]
        features.types[row, first : last + 1] = 1
        features.token_mask[row, : last + 1] = 1
        features.context[row, first:last] = True
        features.begins[row, first:last] = best
        features.offsets[row, first:last] = offsets[start:end]
        if question.answers:
            features.answer[row], features.answer_mask[row] = _labels(question, offsets, start, end, first)
    return features


def _padding(max_length: int, pad: int | None, example: np.ndarray, questions: Sequence[Question]) -> Features:
    """Returns Features [N,T] of the questions `example` [N], with nothing but padding."""
    shape = len(example), max_length
    return Features(
        inputs=np.full(shape, pad, np.int32),
        types=np.zeros(shape, np.int32),
        token_mask=np.zeros(shape, np.float32),
        context=np.zeros(shape, bool),
        begins=np.zeros(shape, bool),
        offsets=np.zeros((*shape, 2), np.int32),
        example=example,
        answer=np.zeros((len(example), 2), np.int32),
        answer_mask=np.ones(len(example), np.float32),
        questions=tuple(questions),
    )


def _labels(question: Question, offsets: np.ndarray, start: int, end: int, first: int) -> tuple[tuple[int, int], float]:
    """Returns the (first, last) token of the first answer in its row, and its weight: 0 if it is not known where the
    answer is.

    The row holds the tokens `start` to `end` of the text, from position `first` on. The result is (0, 0) if they do
    not cover the whole answer (run_squad.py).
    """
    if question.start is None:
        return (0, 0), 0.0
    covered = (offsets[:, 1] > question.start) & (offsets[:, 0] < question.start + len(question.answers[0]))
    tokens = np.flatnonzero(covered)
    if not len(tokens) or tokens[0] < start or tokens[-1] >= end:
        return (0, 0), 1.0
    return (tokens[0] - start + first, tokens[-1] - start + first), 1.0


def _windows(total: int, room: int, stride: int) -> list[tuple[int, int]]:
    """Returns [(start, end)] of the windows of a text of `total` tokens: at least one, each of up to `room` tokens."""
    spans = [(0, min(room, total))]
    while spans[-1][1] < total:
        start = spans[-1][0] + min(room, stride)
        spans.append((start, min(start + room, total)))
    return spans


def _shows_best(spans: Sequence[tuple[int, int]], total: int) -> list[np.ndarray]:
    """Returns for each window [end - start] bool: the tokens that it shows with more text around them than any other.

    The text around a token is the smaller of the two sides, plus a hundredth of the window (run_squad.py).
    """
    around = np.full((len(spans), total), -np.inf)
    for window, (start, end) in enumerate(spans):
        tokens = np.arange(start, end)
        around[window, start:end] = np.minimum(tokens - start, end - 1 - tokens) + 0.01 * (end - start)
    best = around.argmax(axis=0)
    return [best[start:end] == window for window, (start, end) in enumerate(spans)]

r"""Templates: how a conversation becomes text and token ids, and which of them are learned.

A template is Jinja: the tokenizer's own chat template, which is somebody else's code and runs in a sandbox, or one of
NAMED. What it renders here has marks in it, noncharacters of Unicode, so that a message that spells the template's own
markers does not change what is learned:

BEGIN, END  around a block {% generation %} of the template: what the assistant says
EOS         stands for the tokenizer's eos, which need not have a text
CUT         after the first character of a special token's name in a message, which so remains text
"""

import contextlib
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2.ext
import jinja2.sandbox
import numpy as np

from mixln_jax.data.tokenizers import Tokenizer
from mixln_jax.system import limits
from mixln_jax.system.errors import DataError

CUT, EOS, BEGIN, END = '\ufdd0\ufdd1\ufdd2\ufdd3'
TODAY = datetime.datetime(2024, 7, 26)  # the day of all training: what a run learns does not depend on when it starts
SECONDS, MEMORY = 10, 10**9  # what a template may take for one text
LONGEST, LARGEST_POWER = 10**8, 1000  # characters of a text; exponents
ANOTHER = 'name another with config.data.template'
UNCLEAR = (
    'does not tell what is learned: what it renders of the first messages is not how it begins for all of them; put '
    f'{{% generation %}} and {{% endgeneration %}} around the answers, or {ANOTHER}'
)

Message = Mapping[str, Any]  # `role`, `content`, and whatever else a template reads
Tools = Sequence[Mapping[str, Any]]  # what the assistant may call
Span = tuple[int, int]  # first character, and the one after the last
_Render = Callable[..., str]  # (messages, add_generation_prompt=False) -> text


def _alpaca(request: str, line: str, paragraph: str) -> str:
    """Returns the template of Stanford's Alpaca with its own ends of the request, of lines and of paragraphs."""
    task, complete = 'Below is an instruction that describes a task', 'Write a response that appropriately completes'
    alone, given = (
        f'{task}{more}. {complete} the {request}'
        for more in ('', ', paired with an input that provides further context')
    )
    return (
        "{% for m in messages %}{% if m.role == 'user' %}"
        f'{{{{ ({given!r} if m.input else {alone!r}) if loop.first else {paragraph!r} }}}}'
        f"{{{{ '### Instruction:' ~ {line!r} ~ (m.instruction | default(m.content)) ~ {paragraph!r} }}}}"
        f"{{% if m.input %}}{{{{ '### Input:' ~ {line!r} ~ m.input ~ {paragraph!r} }}}}{{% endif %}}"
        f"{{{{ '### Response:' ~ {line!r} }}}}" + _ANSWER + _UNKNOWN
    )


_ANSWER = "{% elif m.role == 'assistant' %}{% generation %}{{ m.content ~ eos }}{% endgeneration %}"
_UNKNOWN = "{% else %}{{ raise_exception('it does not know the role ' ~ m.role) }}{% endif %}{% endfor %}"
_INDENT = ' ' * 16
NAMED = {
    'alpaca': _alpaca('request.\n\n', '\n', '\n\n'),
    # LLM-Adapters' finetune.py, for Commonsense170K, with the indentation of its source code
    'llm_adapters': _alpaca(f'request.  \n\n{_INDENT}', f'\n{_INDENT}', f'\n{_INDENT}\n{_INDENT}'),
    'chatml': (
        "{% for m in messages %}{% if m.role in ('system', 'user') %}"
        "{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ eos ~ '\\n' }}"
        "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
        "{% generation %}{{ m.content ~ eos }}{% endgeneration %}{{ '\\n' }}" + _UNKNOWN + ''
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    'plain': "{% for m in messages %}{% if m.role in ('system', 'user') %}{{ m.content }}" + _ANSWER + _UNKNOWN,
}


def portable(name: str) -> str:
    """Returns the Jinja of one of NAMED as transformers reads it, which calls eos `eos_token`."""
    return re.sub(r'\beos\b', 'eos_token', NAMED[name])


class _Generation(jinja2.ext.Extension):
    """The block {% generation %}, by which a template says what the assistant says, as in transformers."""

    tags = {'generation'}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method('_marked'), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return BEGIN + caller() + END


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox without large powers: no signal ends the computation of one."""

    intercepted_binops = frozenset(['**'])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if abs(right) > LARGEST_POWER or abs(left) > 2**64:
            raise jinja2.TemplateError('a power of numbers this large')
        return super().call_binop(context, operator, left, right)


def _environment(today: datetime.datetime | None) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Returns what templates run in, set up as transformers does."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters['tojson'] = tojson
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = lambda form: (today or datetime.datetime.now()).strftime(form)
    return environment


def open_template(name: str, tokenizer: Tokenizer, today: datetime.datetime | None = TODAY) -> 'Template':
    """Returns one of NAMED, or the tokenizer's own template for `chat`.

    Args:
        name: the value of config.data.template.
        tokenizer: makes ids of what is rendered.
        today: the date that templates tell; None: the true one.

    Raises:
        DataError: the tokenizer has no template of its own, or one that is not Jinja.
    """
    if name in NAMED:
        return Template(f'the template {name}', NAMED[name], tokenizer, today)
    if not tokenizer.chat_template:
        others = ', '.join(NAMED)
        raise DataError(
            f'{tokenizer.origin}: this tokenizer has no chat template; name another with config.data.template: {others}'
        )
    return Template(f'the chat template of {tokenizer.origin}', tokenizer.chat_template, tokenizer, today)


class Template:
    """A template, with the tokenizer that makes ids of what it renders.

    All methods raise DataError, naming the template: Jinja's errors, a role that the template does not know, or, where
    it has no block {% generation %}, a text of which it cannot be told who says what.
    """

    def __init__(self, name: str, source: str, tokenizer: Tokenizer, today: datetime.datetime | None = TODAY):
        """Prepares a template; `name` stands for it in messages, `source` is its Jinja. See `open_template`."""
        self._name, self._tokenizer = name, tokenizer
        self.fingerprint = hashlib.blake2b(f'{source}{today}'.encode(), digest_size=16).hexdigest()
        self._roles: set[str] = set()  # those that it is known to know
        self._generation = re.search(r'\{%[-+]?\s*generation\s*[-+]?%\}', source) is not None
        names = sorted((token for token in tokenizer.special_tokens if len(token) > 1), key=len, reverse=True)
        self._special = re.compile('|'.join(map(re.escape, names)) or '(?!)')
        self._turn_end = re.compile(rf'{self._special.pattern}|{EOS}')
        self._variables = dict(tokenizer.special_names, eos=EOS)
        with self._running():
            self._jinja = _environment(today).from_string(source)

    def prompt(self, messages: Sequence[Message], tools: Tools | None = None) -> np.ndarray:
        """Returns the ids [n] after which the assistant answers."""
        render = self._renderer(tools)
        safe = [self._safe(message) for message in messages]
        self._check_tools(render, safe, tools)
        text, _ = _unmarked(render(safe, True))
        return self._encode(text, [])[0]

    def tokens(
        self, messages: Sequence[Message], learn: str = 'completions', tools: Tools | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids [n] int32 of a conversation, and which of them are learned, [n] bool.

        Args:
            messages: its turns.
            learn: `completions`: what the assistant says, with the token that ends its turn; what comes after its last
                turn is left out. `all`: everything.
            tools: what the assistant may call.
        """
        safe = [self._safe(message) for message in messages]
        render = self._renderer(tools)
        self._check_roles(render, safe)
        self._check_tools(render, safe, tools)
        told = _unmarked(render(safe)) if self._generation else self._by_prefixes(render, safe)
        text, spans = self._with_ends(*told)
        ids, learned = self._encode(text, spans)
        if learn == 'all':
            return ids, np.ones_like(learned)
        count = int(np.flatnonzero(learned)[-1]) + 1 if learned.any() else len(ids)
        return ids[:count], learned[:count]

    def _safe(self, value: Any) -> Any:
        """Returns a message, or a value in it, of which no text spells a special token."""
        if isinstance(value, dict):
            return {self._safe(name): self._safe(member) for name, member in value.items()}
        if isinstance(value, list):
            return [self._safe(member) for member in value]
        if not isinstance(value, str):
            return value
        if mark := re.search(f'[{CUT}{EOS}{BEGIN}{END}]', value):
            raise DataError(f'a message has U+{ord(mark[0]):X}, which is no character')
        return self._special.sub(lambda found: found[0][0] + CUT + found[0][1:], value)

    def _renderer(self, tools: Tools | None) -> _Render:
        """Returns what renders messages with tools."""
        return functools.partial(self._render, self._safe(list(tools)) if tools else None)

    def _render(self, tools: Tools | None, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        with self._running():
            text = self._jinja.render(
                messages=list(messages),
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        if len(text) > LONGEST:
            raise DataError(f'{self._name}: template error: it makes {len(text):,} characters of one record')
        return text

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Turns whatever a template raises, which is code, into one line."""
        try:
            with limits.limited(SECONDS, MEMORY):
                yield
        except limits.TooLong:
            message = f'{self._name}: template error: it takes more than {SECONDS} s and may never end'
            raise DataError(message) from None
        except MemoryError:
            raise DataError(f'{self._name}: template error: it takes more than {MEMORY / 1e9:g} GB') from None
        except Exception as error:
            line = f'line {error.lineno}: ' if isinstance(error, jinja2.TemplateSyntaxError) else ''
            message = ' '.join(str(error).split()) or type(error).__name__
            raise DataError(f'{self._name}: template error: {line}{message}') from error

    def _check_roles(self, render: _Render, messages: Sequence[Message]) -> None:
        """Finds roles whose messages the template leaves out: each role is tried once."""
        for number, message in enumerate(messages):
            if message['role'] in self._roles or message.get('tool_calls'):
                continue
            if 'instruction' not in message and not self._shows(render, messages, number):
                if self._shows_last(render, messages[: number + 1]):
                    raise DataError(f'{self._name} {UNCLEAR}')
                raise DataError(f'{self._name} does not know the role {message["role"]!r}: it leaves out what it says')
            self._roles.add(message['role'])

    def _shows(self, render: _Render, messages: Sequence[Message], number: int) -> bool:
        """Returns whether the content of a message changes the text."""
        message = messages[number]
        changed = [*messages[:number], {**message, 'content': f'{message["content"]}x'}, *messages[number + 1 :]]
        return render(changed) != render(messages)

    def _shows_last(self, render: _Render, messages: Sequence[Message]) -> bool:
        """Returns whether the template takes these messages as a whole conversation and shows the last of them."""
        try:
            return self._shows(render, messages, len(messages) - 1)
        except DataError:
            return False

    def _check_tools(self, render: _Render, messages: Sequence[Message], tools: Tools | None) -> None:
        """Finds tools, and calls of them, that the template leaves out."""
        if tools and render(messages) == self._render(None, messages):
            raise DataError(f'{self._name} does not know tools: it leaves them out; {ANOTHER}')
        for number, message in enumerate(messages):
            if message.get('tool_calls'):
                without = {'role': message['role'], 'content': message.get('content') or ''}
                if render([*messages[:number], without, *messages[number + 1 :]]) == render(messages):
                    raise DataError(f'{self._name} does not know tool_calls: it leaves them out; {ANOTHER}')

    def _by_prefixes(self, render: _Render, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """Returns the text, and what each turn of the assistant adds to the text before it."""
        whole, spans = render(messages), []
        for number, message in enumerate(messages):
            if message['role'] == 'assistant':
                before = render(messages[:number], True)
                after = whole if number == len(messages) - 1 else render(messages[: number + 1])
                if not (after.startswith(before) and whole.startswith(after)):
                    raise DataError(f'{self._name} {UNCLEAR}')
                spans.append((len(before), len(after)))
        return whole, spans

    def _with_ends(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Returns text and spans, each of which ends with the token that ends its turn. A last turn without one gets
        the tokenizer's eos."""
        ended = []
        for start, end in spans:
            inside = [found.end() for found in self._turn_end.finditer(text, start, end)]
            if inside and not text[inside[-1] : end].strip():
                end = inside[-1]
            elif after := re.compile(rf'\s*(?:{self._turn_end.pattern})').match(text, end):
                end = after.end()
            elif not text[end:].strip():
                text, end = text[:end] + EOS, end + 1
            ended.append((start, end))
        return text, ended

    def _encode(self, text: str, spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of a text with CUT and EOS, and which of them have a part in `spans`."""
        inside = np.zeros(len(text), bool)
        for start, end in spans:
            inside[start:end] = True
        ids, learned, place = [np.zeros(0, np.int32)], [np.zeros(0, bool)], 0
        for piece in re.split(f'([{CUT}{EOS}])', text):
            part, place = inside[place : place + len(piece)], place + len(piece)
            if piece == EOS:
                ids.append(np.array([self._tokenizer.eos_id], np.int32))
                learned.append(part)
            elif piece and piece != CUT:
                piece_ids, ends = self._tokenizer.read_specials(piece)
                ids.append(piece_ids)
                learned.append(_covered(piece, part, ends))
        return np.concatenate(ids), np.concatenate(learned)


def _unmarked(text: str) -> tuple[str, list[Span]]:
    """Returns a text without BEGIN and END, and the spans between them."""
    pieces, spans, length, start = [], [], 0, 0
    for piece in re.split(f'([{BEGIN}{END}])', text):
        if piece == BEGIN:
            start = length
        elif piece == END:
            spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return ''.join(pieces), spans


def _covered(text: str, inside: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns which tokens stand for something `inside`, [n] bool: for more than a blank, unless they are all blank.

    Args:
        text: of m characters.
        inside: [m] bool.
        ends: [n], the byte at which each token ends. One that stands for no byte is as the one before it, or the first
            that does.
    """
    if not len(ends):
        return np.zeros(0, bool)
    points = np.frombuffer(text.encode('utf-32-le'), '<u4')
    inside = np.repeat(inside, 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF))
    solid = ~np.isin(np.frombuffer(text.encode(), np.uint8), list(b' \t\n\r'))
    within = lambda flags: np.diff(np.append(0, np.cumsum(flags))[np.append(0, ends)])  # noqa: E731
    covered = np.where(within(solid) > 0, within(solid & inside) > 0, inside[np.maximum(ends, 1) - 1])
    wide = np.diff(ends, prepend=0) > 0
    return covered[np.maximum.accumulate(np.where(wide, np.arange(len(ends)), wide.argmax()))]

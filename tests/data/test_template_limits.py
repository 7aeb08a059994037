"""Templates that never end, or fill the memory, are refused in one line that names them."""

import resource
import signal

import pytest

from mixln_jax.data import chat, tokenizers
from mixln_jax.system.errors import DataError

TURNS = [{'role': 'user', 'content': 'a'}]
LOOP = '{% for i in range(99999) %}'
LONG = {
    'nested loops': LOOP * 3 + 'a' + '{% endfor %}' * 3,
    'a loop whose condition is false': LOOP + '{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}',
    'macros': '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}',
    'filters': LOOP + '{{ range(99999) | map("string") | map("length") | sum }}{% endfor %}',
}
LARGE = {
    'a text times a number': '{{ "a" * (10000000000) }}',
    'a list times a number': '{{ ([0] * (10000000000)) | length }}',
    'doubled': '{% set n = namespace(x="a") %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}',
    'a filter': '{{ "a" | center(10000000000) }}',
    'a method': '{{ "a".ljust(10000000000) }}',
    'a format': '{{ "%10000000000d" % 1 }}',
    'output': LOOP + '{{ "a" * 99999 }}{% endfor %}',
}


def rendered(source):
    return chat.Template('the template x', source, tokenizers.Bytes()).prompt(TURNS)


@pytest.mark.parametrize('source', LONG.values(), ids=LONG)
def test_time(monkeypatch, source):
    monkeypatch.setattr(chat, 'SECONDS', 0.3)
    with pytest.raises(DataError, match='^the template x: template error: it takes more than 0.3 s and may never end$'):
        rendered(source)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert signal.getsignal(signal.SIGVTALRM) == signal.SIG_DFL


@pytest.mark.parametrize('source', LARGE.values(), ids=LARGE)
def test_memory(source):
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(DataError, match='^the template x: template error: it (takes more than 1 GB|makes )'):
        rendered(source)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_powers():
    assert len(rendered('{{ 2 ** 10 }}')) == 4
    with pytest.raises(DataError, match='^the template x: template error: a power of numbers this large$'):
        rendered('{{ 10 ** (10 ** 8) > 0 }}')


def test_output(monkeypatch):
    monkeypatch.setattr(chat, 'LONGEST', 10)
    with pytest.raises(DataError, match='^the template x: template error: it makes 11 characters of one record$'):
        rendered('{{ "a" * 11 }}')
    assert len(rendered('{{ "a" * 10 }}')) == 10

"""Conversations as token ids, and which of them the assistant says, against transformers' apply_chat_template."""

import json

import numpy as np
import pytest
import transformers
import vocabularies

from mixln_jax.data import chat

SPECIALS = {'bos_token': '<|begin|>', 'eos_token': '<|im_end|>', 'pad_token': '<|pad|>'}
MARKERS = ['<|im_start|>', '<|eot_id|>', '<|start_header_id|>', '<|end_header_id|>']

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As Llama 3's: loops over messages with set, trim, and a date.
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# As Mistral's: roles alternate, one error, one eos after each answer.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
TOOLS = """\
{% set ns = namespace(n=0) %}
{% for m in messages %}
    {% if loop.index > 9 %}
        {% break %}
    {% endif %}
    {% set ns.n = ns.n + 1 %}
{{ ns.n }}:{{ m.content | tojson }}
    {% if m.role == 'assistant' %}
{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}
{% endfor %}
"""  # what the sandbox has besides: tojson, namespace, loop controls; and indented blocks
TEMPLATES = {'chatml': CHATML, 'llama': LLAMA, 'mistral': MISTRAL, 'tools': TOOLS}

TURNS = [
    {'role': 'user', 'content': ' What is größer? 🙂\n'},
    {'role': 'assistant', 'content': ' A house,\n\nor "two" <b>.'},
    {'role': 'user', 'content': 'And\tthen?'},
    {'role': 'assistant', 'content': 'the quick brown fox'},
]
SYSTEM = [{'role': 'system', 'content': 'Be brief. '}]
EMPTY = [{'role': 'user', 'content': ''}, {'role': 'assistant', 'content': ''}]
FILES = [('byte_level', False), ('byte_level', True), ('unigram', False)]  # vocabulary, template in a file of its own


def opened(folder, template, vocabulary='byte_level', jinja_file=False):
    """(our tokenizer, transformers') of one folder."""
    body = json.loads(vocabularies.content(vocabulary))
    settings = {**SPECIALS, 'tokenizer_class': 'PreTrainedTokenizerFast'}
    settings |= {} if jinja_file else {'chat_template': template}
    first = max(len(body['model']['vocab']), 1 + max(token['id'] for token in body['added_tokens']))
    for number, name in enumerate([*SPECIALS.values(), *MARKERS]):
        body['added_tokens'].append({
            'id': first + number, 'content': name, 'special': True,
            'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
        })  # fmt: skip
    if jinja_file:
        (folder / 'chat_template.jinja').write_text(template)
    ours = vocabularies.with_settings(folder, json.dumps(body).encode(), settings)
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


def theirs(tokenizer, messages, **options):
    found = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return found['input_ids'], found.get('assistant_masks')


@pytest.mark.parametrize('vocabulary, jinja_file', FILES)
@pytest.mark.parametrize('generation', [True, False], ids=['block', 'prefixes'])
@pytest.mark.parametrize('name', TEMPLATES)
def test_ids_and_masks(tmp_path, name, generation, vocabulary, jinja_file):
    """Ours are theirs up to the end of the last turn; without blocks, prefixes tell the same."""
    marked = TEMPLATES[name]
    ours, expected = opened(tmp_path, marked, vocabulary, jinja_file)
    if not generation:
        plain = marked
        for tag in ('{%- generation %}', '{%- endgeneration %}', '{% generation %}', '{% endgeneration %}'):
            plain = plain.replace(tag, '')
        other = tmp_path / 'plain'
        other.mkdir()
        ours, _ = opened(other, plain, vocabulary, jinja_file)
    template = chat.open_template('chat', ours)
    for messages in (TURNS[:2], TURNS, EMPTY, *([SYSTEM + TURNS] if name != 'mistral' else [])):
        ids, mask = theirs(expected, messages, return_assistant_tokens_mask=True)
        got, learned = template.tokens(messages)
        assert got.tolist() == ids[: len(got)]
        if name == 'tools' and not generation:
            continue  # what a template says twice, only a block tells apart
        assert np.flatnonzero(learned).tolist() == np.flatnonzero(mask).tolist()
        assert learned[-1] and not any(mask[len(got) :])
        everything, flags = template.tokens(messages, 'all')
        assert everything.tolist() == ids and flags.all()


@pytest.mark.parametrize('vocabulary, jinja_file', FILES)
@pytest.mark.parametrize('name', TEMPLATES)
def test_prompts(tmp_path, name, vocabulary, jinja_file):
    ours, expected = opened(tmp_path, TEMPLATES[name], vocabulary, jinja_file)
    template = chat.open_template('chat', ours)
    for messages in (TURNS[:1], TURNS[:3]):
        ids, _ = theirs(expected, messages, add_generation_prompt=True)
        assert template.prompt(messages).tolist() == ids


@pytest.mark.parametrize('name', chat.NAMED)
def test_named_templates_in_exports(tmp_path, name):
    """What an export writes for transformers gives the ids, the mask and the prompts of the run."""
    ours, expected = opened(tmp_path, chat.portable(name))
    template = chat.open_template(name, ours)
    for messages in (TURNS[:2], TURNS, EMPTY):
        ids, mask = theirs(expected, messages, return_assistant_tokens_mask=True)
        got, learned = template.tokens(messages)
        assert got.tolist() == ids[: len(got)]
        assert np.flatnonzero(learned).tolist() == np.flatnonzero(mask).tolist()
        assert template.prompt(messages[:-1]).tolist() == theirs(expected, messages[:-1], add_generation_prompt=True)[0]


CALLS = (
    "{% if tools %}{{ '<|im_start|>tools\\n' ~ tools | tojson ~ '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{% for call in m.tool_calls or [] %}{{ '[call] ' ~ call.function | tojson }}{% endfor %}"
    "{{ (m.content or '') ~ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content ~ '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOOL = {'type': 'function', 'function': {'name': 'add', 'description': 'Adds <é>.', 'parameters': {'type': 'object'}}}
CALL = {'type': 'function', 'function': {'name': 'add', 'arguments': {'a': 1, 'b': [2]}}}
CALLED = [
    {'role': 'user', 'content': '1 + 2?'},
    {'role': 'assistant', 'content': None, 'tool_calls': [CALL]},
    {'role': 'tool', 'name': 'add', 'content': '3'},
    {'role': 'assistant', 'content': 'It is 3.'},
]


@pytest.mark.parametrize('generation', [True, False], ids=['block', 'prefixes'])
def test_tools(tmp_path, generation):
    ours, expected = opened(tmp_path, CALLS)
    if not generation:
        (other := tmp_path / 'plain').mkdir()
        ours, _ = opened(other, CALLS.replace('{% generation %}', '').replace('{% endgeneration %}', ''))
    template = chat.open_template('chat', ours)
    ids, mask = theirs(expected, CALLED, tools=[TOOL], return_assistant_tokens_mask=True)
    got, learned = template.tokens(CALLED, tools=[TOOL])
    assert got.tolist() == ids[: len(got)]
    assert np.flatnonzero(learned).tolist() == np.flatnonzero(mask).tolist()
    ids, _ = theirs(expected, CALLED[:3], tools=[TOOL], add_generation_prompt=True)
    assert template.prompt(CALLED[:3], [TOOL]).tolist() == ids

"""Chat templates against transformers' apply_chat_template: the same ids, and the same learned tokens."""

import json

import numpy as np
import pytest
import transformers
import vocabularies

from mixln_jax.data import chat

CHATML = (
    "{{ bos_token }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Blocks on lines of their own, whose blanks Jinja removes, a loop that stops, and JSON.
LINES = """\
{%- if messages[0].role == 'system' -%}
    {% set system = messages[0].content %}
{%- endif -%}
{% for message in messages %}
    {% if loop.index > 9 %}{% break %}{% endif %}
    {% if message.role == 'assistant' %}
[A] {% generation %}{{ message.content }} {{ eos_token }}{% endgeneration %}

    {% elif message.role == 'user' %}
[U] {{ message.content }} {{ {'é': [1, '<']} | tojson }} {{ system | default('none') }}
    {% endif %}
{% endfor %}
"""
CONVERSATIONS = [
    [('user', 'Hi'), ('assistant', 'yo')],
    [
        ('system', 'Be short.'), ('user', ' Wie geht es dir?\n\n'), ('assistant', 'größer 🙂'),
        ('user', '日本'), ('assistant', '語 '),
    ],
    [('user', ''), ('assistant', '')],
]  # fmt: skip


def opened(folder, name, template):
    """(ours, transformers') tokenizer of the same files."""
    spec = json.loads(vocabularies.content(name))
    size = max(len(spec['model']['vocab']), 1 + max(token['id'] for token in spec['added_tokens']))
    for number, token in enumerate(('<|im_start|>', '<|im_end|>')):
        of = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        spec['added_tokens'].append({'id': size + number, 'content': token} | of)
    (folder / 'tokenizer.json').write_text(json.dumps(spec))
    settings = {'eos_token': '</s>', 'bos_token': '<s>' if name == 'byte_level' else '</s>'}
    settings |= {'chat_template': template, 'tokenizer_class': 'PreTrainedTokenizerFast'}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings))
    ours = vocabularies.open_file(folder / 'tokenizer.json')
    return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize('name', ['byte_level', 'unigram'])
@pytest.mark.parametrize('template', [CHATML, LINES], ids=['chatml', 'lines'])
@pytest.mark.parametrize('number', range(len(CONVERSATIONS)))
def test_ids_and_masks(tmp_path, name, template, number):
    ours, theirs = opened(tmp_path, name, template)
    messages = [{'role': role, 'content': text} for role, text in CONVERSATIONS[number]]
    made = chat.open_template('chat', ours)
    wanted = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, _ = made.tokens(messages, 'all')
    assert ids.tolist() == wanted['input_ids']
    ids, learned = made.tokens(messages)
    mask = np.array(wanted['assistant_masks'])[: len(ids)] > 0
    pieces = lambda flags: [theirs.decode(ids[i]) for i in np.flatnonzero(flags)]  # noqa: E731
    assert pieces(learned) == pieces(mask)


@pytest.mark.parametrize('name', ['byte_level', 'unigram'])
def test_prompts(tmp_path, name):
    ours, theirs = opened(tmp_path, name, CHATML)
    messages = [{'role': role, 'content': text} for role, text in CONVERSATIONS[1][:-1]]
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)['input_ids']
    assert chat.open_template('chat', ours).prompt(messages).tolist() == wanted


def test_without_generation_it_is_what_the_turn_adds(tmp_path):
    """The same template with and without the block learns the same tokens."""
    without = CHATML.replace('{% generation %}', '').replace('{% endgeneration %}', '')
    messages = [{'role': role, 'content': text} for role, text in CONVERSATIONS[1]]
    made = []
    for template in (CHATML, without):
        ours, _ = opened(tmp_path, 'byte_level', template)
        made.append(chat.open_template('chat', ours).tokens(messages))
    for one, other in zip(*made, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('named', chat.NAMED)
def test_named_templates_in_exports(tmp_path, named):
    """What an export writes for transformers gives the ids, the mask and the prompts of the run."""
    ours, theirs = opened(tmp_path, 'byte_level', chat.portable(named))
    made = chat.open_template(named, ours)
    for conversation in (CONVERSATIONS[0], CONVERSATIONS[1][1:]):
        messages = [{'role': role, 'content': text} for role, text in conversation]
        wanted = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, learned = made.tokens(messages)
        assert ids.tolist() == wanted['input_ids'][: len(ids)]
        assert np.flatnonzero(learned).tolist() == np.flatnonzero(wanted['assistant_masks']).tolist()
        wanted = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)['input_ids']
        assert made.prompt(messages[:-1]).tolist() == wanted

"""Templates: what they render, and which tokens are learned, by expectation written by hand."""

import re

import pytest
import vocabularies
from vocabularies import CHAT as OWN
from vocabularies import with_chat_template as own

from mixln_jax.data import chat, tokenizers
from mixln_jax.system.errors import DataError

# With {% generation %}, and the end of a turn outside.
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %}"
    '<|im_end|>{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}'
)
UNMARKED = "{% for m in messages %}{{ m.role[0] ~ ':' ~ m.content ~ '\\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def turns(*contents, roles=('user', 'assistant')):
    return [{'role': roles[number % 2], 'content': content} for number, content in enumerate(contents)]


def shown(template, messages, tokenizer, learn='completions'):
    """What is learned in brackets, special tokens as their names or as .; '|' between tokens is left out."""
    ids, learned = template.tokens(messages, learn)
    text, before = '', False
    for i, is_learned in zip(ids.tolist(), learned.tolist(), strict=True):
        text += '[' * (is_learned and not before) + ']' * (before and not is_learned)
        special = i == tokenizer.eos_id or not tokenizer.can_yield(i)
        named = getattr(tokenizer, '_tokenizer', None)
        text += ('.' if i == tokenizer.eos_id else named.id_to_token(i)) if special else tokenizer.decode([i])
        before = is_learned
    return text + ']' * before


class TestNamed:
    BYTES = tokenizers.Bytes()

    def shown(self, name, messages, learn='completions'):
        return shown(chat.open_template(name, self.BYTES), messages, self.BYTES, learn)

    def test_plain(self):
        assert self.shown('plain', turns('Hi ', 'yo')) == 'Hi [yo.]'
        assert self.shown('plain', turns('Hi ', 'yo'), 'all') == '[Hi yo.]'

    def test_several_turns(self):
        messages = [{'role': 'system', 'content': 'S'}, *turns('a', 'b', 'c', 'd', 'e')]
        assert self.shown('plain', messages) == 'Sa[b.]c[d.]'  # what comes after the last answer teaches nothing
        assert self.shown('plain', messages, 'all') == '[Sab.cd.e]'
        assert self.shown('chatml', messages[:3]) == (
            '<|im_start|>system\nS.\n<|im_start|>user\na.\n<|im_start|>assistant\n[b.]'
        )

    def test_an_empty_completion_ends_at_once(self):
        assert self.shown('plain', turns('Hi', '')) == 'Hi[.]'
        assert self.shown('plain', turns('', '')) == '[.]'

    def test_alpaca(self):
        begin = 'Below is an instruction that describes a task'
        request = 'Write a response that appropriately completes the request.'
        assert self.shown('alpaca', turns('Add.', '3', 'Why?', '4')) == (
            f'{begin}. {request}\n\n### Instruction:\nAdd.\n\n### Response:\n[3.]'
            '\n\n### Instruction:\nWhy?\n\n### Response:\n[4.]'
        )
        record = [{'role': 'user', 'content': '', 'instruction': 'Add.', 'input': '1 2'}, *turns('', '3')[1:]]
        assert self.shown('alpaca', record) == (
            f'{begin}, paired with an input that provides further context. {request}\n\n### Instruction:\nAdd.\n\n'
            '### Input:\n1 2\n\n### Response:\n[3.]'
        )

    def test_llm_adapters(self):
        """The text of LLM-Adapters' finetune.py, blanks included."""
        indent = ' ' * 16
        assert self.shown('llm_adapters', turns('Is it?', 'the correct answer is true')) == (
            'Below is an instruction that describes a task. Write a response that appropriately completes the request.'
            f'  \n\n{indent}### Instruction:\n{indent}Is it?\n{indent}\n{indent}### Response:\n'
            f'{indent}[the correct answer is true.]'
        )

    @pytest.mark.parametrize('name', chat.NAMED)
    def test_a_text_that_spells_markers_changes_no_mask(self, name):
        markers = '<|im_start|>assistant\nno</s>\n\n### Response:\n{% generation %}'
        assert self.shown(name, turns(markers, 'yo')).endswith('[yo.]')
        assert self.shown(name, turns(markers, 'yo')).count('[') == 1
        assert self.shown(name, turns('Hi', markers)).endswith(f'[{markers}.]')

    @pytest.mark.parametrize('name', chat.NAMED)
    def test_an_unknown_role(self, name):
        with pytest.raises(DataError, match=f'^the template {name}: template error: .*the role tool$'):
            chat.open_template(name, self.BYTES).tokens([*turns('a', 'b'), {'role': 'tool', 'content': 'x'}])

    @pytest.mark.parametrize('name', chat.NAMED)
    def test_a_prompt_is_what_comes_before_an_answer(self, name):
        template, messages = chat.open_template(name, self.BYTES), turns('Hi', 'yo', 'a', 'b')
        ids, learned = template.tokens(messages)
        first = learned.argmax()
        assert template.prompt(messages[:1]).tolist() == ids[:first].tolist()
        second = len(ids) - 1 - learned[::-1].argmin() + 1
        assert template.prompt(messages[:3]).tolist() == ids[:second].tolist()

    @pytest.mark.parametrize('name', ['alpaca', 'chatml'])
    @pytest.mark.parametrize('kind', vocabularies.KINDS)
    def test_every_kind_of_tokenizer(self, kind, name, tmp_path):
        """Blanks between prompt and answer, which tokens take up in every way, belong to no answer."""
        tokenizer = vocabularies.open_named(kind, tmp_path)
        one, two = vocabularies.words()[:2]
        template = chat.open_template(name, tokenizer)
        for answer in (one, f'{one} {two}', f' {one}  ', f'{one}\n'):
            ids, learned = template.tokens(turns(two, answer, two, answer))
            starts = [i for i in range(len(ids)) if learned[i] and not learned[i - 1]]
            assert len(starts) == 2 and learned[-1]
            ends = [i for i in range(len(ids)) if learned[i] and (i + 1 == len(ids) or not learned[i + 1])]
            for start, end in zip(starts, ends, strict=True):
                assert ids[end] == tokenizer.eos_id and tokenizer.eos_id not in ids[start:end]
                assert tokenizer.decode(ids[start:end]).split() == answer.split()


class TestOwn:
    def test_masks(self, tmp_path):
        tokenizer = own(tmp_path)
        template = chat.open_template('chat', tokenizer)
        assert shown(template, turns('Hi', 'yo', 'a', 'b'), tokenizer) == (
            '<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[yo<|im_end|>]\n'
            '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[b<|im_end|>]'
        )
        assert shown(template, turns('Hi', ''), tokenizer).endswith('<|im_start|>assistant\n[<|im_end|>]')
        assert shown(template, turns('Hi', 'yo'), tokenizer, 'all') == (
            '[<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n]'
        )

    def test_the_end_of_a_turn_outside_of_generation_is_learned(self, tmp_path):
        tokenizer = own(tmp_path, GENERATION)
        template = chat.open_template('chat', tokenizer)
        assert shown(template, turns('Hi', 'yo', 'a', ''), tokenizer) == 'U:Hi\nA:[yo<|im_end|>]U:a\nA:[<|im_end|>]'

    def test_a_last_turn_without_an_end_gets_the_eos(self, tmp_path):
        tokenizer = own(tmp_path, UNMARKED)
        template = chat.open_template('chat', tokenizer)
        assert shown(template, turns('Hi', 'yo', 'a', 'b'), tokenizer) == 'u:Hi\na:[yo\n]u:a\na:[b\n.]'

    def test_a_blank_that_ends_an_answer_and_begins_the_next_token(self, tmp_path):
        """That token says what comes after the answer, and is not learned."""
        one, two = vocabularies.words()[:2]
        template = f"{{% for m in messages %}}{{{{ '{two} ' ~ m.content }}}}{{% endfor %}}"
        template += f"{{% if add_generation_prompt %}}{{{{ '{two} ' }}}}{{% endif %}}"
        tokenizer = own(tmp_path, template, 'unigram', bos_token='</s>')
        ids, learned = chat.open_template('chat', tokenizer).tokens(turns(*[f'{one} '] * 4))
        learned[learned.argmax() + learned[learned.argmax() :].argmin() :] = False  # the first answer alone
        assert tokenizer.decode(ids[learned]).split() == [one]

    def test_the_eos_that_is_padding_too(self, tmp_path):
        tokenizer = own(tmp_path, OWN, eos_token='<|im_end|>', pad_token='<|im_end|>')
        assert tokenizer.pad_id == tokenizer.eos_id
        template = chat.open_template('chat', tokenizer)
        assert shown(template, turns('Hi', 'yo'), tokenizer).endswith('<|im_start|>assistant\n[yo.]')

    @pytest.mark.parametrize('template', [OWN, GENERATION])
    def test_special_tokens_in_a_text_are_letters(self, tmp_path, template):
        tokenizer = own(tmp_path, template)
        made, ends = chat.open_template('chat', tokenizer), tokenizer.eos_id
        turn_end = tokenizer._tokenizer.token_to_id('<|im_end|>')
        plain, _ = made.tokens(turns('Hi', 'yo'))
        text = 'no<|im_end|>\n<|im_start|>assistant\nyes</s>'
        for messages in (turns(text, 'yo'), turns('Hi', text)):
            ids, learned = made.tokens(messages)
            assert (ids == turn_end).sum() == (plain == turn_end).sum() and ends not in ids
            assert tokenizer.decode(ids[learned]) == messages[1]['content']
            assert learned.tolist() == sorted(learned)  # one span, at the end

    def test_jinja_file_beside_wins_and_is_saved(self, tmp_path):
        plain = own(tmp_path, '', chat_template=None)
        assert plain.chat_template == ''
        (tmp_path / 'chat_template.jinja').write_text(GENERATION)
        tokenizer = own(tmp_path, OWN)
        assert tokenizer.chat_template == GENERATION
        assert tokenizer.fingerprint == plain.fingerprint  # it decides no ids of texts
        tokenizer.save(tmp_path / 'saved')
        assert tokenizers.load(tmp_path / 'saved').chat_template == GENERATION
        assert tokenizer.export(tmp_path / 'exported')
        assert (tmp_path / 'exported/chat_template.jinja').read_text() == GENERATION

    def test_the_default_of_several(self, tmp_path):
        several = [{'name': 'tools', 'template': 'x'}, {'name': 'default', 'template': OWN}]
        assert own(tmp_path, several).chat_template == OWN

    def test_the_day_is_always_the_same(self, tmp_path):
        tokenizer = own(tmp_path, "{{ strftime_now('%d %b %Y') }}" + UNMARKED)
        made = chat.open_template('chat', tokenizer)
        assert shown(made, turns('Hi', 'yo'), tokenizer) == '26 Jul 2024u:Hi\na:[yo\n.]'

    CONDITIONAL = '{% if messages | length > 2 %}x{% endif %}' + UNMARKED
    BAD = {
        'syntax': ('{% for', 'template error: '),
        'raised': ("{{ raise_exception('roles must alternate') }}", 'template error: roles must alternate'),
        'undefined': ('{{ messages[9].content }}', 'template error: '),
        'not a prefix': (CONDITIONAL, 'does not tell what is learned: .*data.template'),
        'silent': ("{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}", "the role 'user'"),
        'rewritten': (
            '{% for m in messages %}{% if m.role == "user" or loop.last %}{{ m.content }}{% endif %}{% endfor %}',
            'does not tell what is learned: .*generation',
        ),
        'sandbox': ("{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}", 'template error: '),
        'change': ('{{ messages.append(1) }}', 'template error: '),
        'huge': ('{% for i in range(10**9) %}{% endfor %}', 'template error: '),
    }

    @pytest.mark.parametrize('template, message', BAD.values(), ids=BAD)
    def test_what_is_wrong_names_the_template(self, tmp_path, template, message):
        tokenizer = own(tmp_path, template)
        with pytest.raises(DataError, match=f'^the chat template of {tmp_path}/tokenizer.json.*{message}') as raised:
            chat.open_template('chat', tokenizer).tokens(turns('Hi', 'yo', 'a', 'b'))
        assert '\n' not in str(raised.value)

    def test_no_template(self, tmp_path):
        for tokenizer in (tokenizers.Bytes(), own(tmp_path, '')):
            with pytest.raises(DataError, match='has no chat template; .*config.data.template: alpaca'):
                chat.open_template('chat', tokenizer)

    def test_marks_in_a_text(self):
        template = chat.open_template('plain', tokenizers.Bytes())
        for mark in (chat.CUT, chat.EOS, chat.BEGIN, chat.END):
            with pytest.raises(DataError, match='^a message has U[+]FDD'):
                template.tokens(turns(f'a{mark}', 'b'))


TOOL = {'type': 'function', 'function': {'name': 'add'}}
CALLING = {'role': 'assistant', 'content': None, 'tool_calls': [TOOL]}
SAYS_TOOLS = "{{ tools | tojson if tools }}{% for m in messages %}{{ m.content or '' }}{% endfor %}"
STRIPS = (  # as Qwen3's: what the assistant thought is left out of all turns but the last
    "{% for m in messages %}{{ m.role ~ ': ' }}{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>') | last }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize(
    'source, messages, tools, message',
    [
        (vocabularies.CHAT, turns('Hi', 'yo'), [TOOL], 'does not know tools: it leaves them out; name another'),
        (SAYS_TOOLS, [*turns('Hi'), CALLING], [TOOL], 'does not know tool_calls: it leaves them out; name another'),
        (
            STRIPS,
            turns('a', '<think>b</think>c', 'd', 'e'),
            None,
            'put {% generation %} and {% endgeneration %} around',
        ),
    ],
)
def test_what_a_template_leaves_out(tmp_path, source, messages, tools, message):
    template = chat.open_template('chat', vocabularies.with_chat_template(tmp_path, source))
    with pytest.raises(DataError, match=re.escape(message)) as refused:
        template.tokens(messages, tools=tools)
    assert str(refused.value).endswith('name another with config.data.template') and '\n' not in str(refused.value)


def test_a_tool_does_not_spell_a_special_token(tmp_path):
    tokenizer = vocabularies.with_chat_template(tmp_path, SAYS_TOOLS)
    ids = chat.open_template('chat', tokenizer).prompt(turns('Hi'), [{'name': '</s>'}])
    assert tokenizer.eos_id not in ids and '</s>' in tokenizer.decode(ids.tolist())

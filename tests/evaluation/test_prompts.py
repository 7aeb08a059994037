"""What ends an answer: the end of a text, and the token that ends a turn of the template."""

import pytest
import vocabularies

from mixln_jax.data import chat
from mixln_jax.evaluation import prompts
from mixln_jax.runs.encoder import TextEncoder


@pytest.mark.parametrize('name, token', [('chat', '<|im_end|>'), ('chatml', None), ('plain', None)])
def test_the_end_of_a_turn_ends_an_answer(tmp_path, name, token):
    """In the tokenizer's own template that is another token than eos; in named ones it is eos."""
    tokenizer = vocabularies.with_chat_template(tmp_path)
    encoder = TextEncoder(tokenizer, [], tokenizer.eos_id, (tokenizer.eos_id,))
    ended = prompts.with_turn_end(encoder, chat.open_template(name, tokenizer))
    expected = [] if token is None else [tokenizer.read_specials(token)[0].item()]
    assert ended.end_ids == (tokenizer.eos_id, *expected) and tokenizer.eos_id not in expected
    assert prompts.with_turn_end(encoder, None) is encoder

"""Texts that a run writes at each evaluation: where answers end."""

import json

import jax
import jax.numpy as jnp
import orjson
import pytest
import vocabularies

from mixln_jax import config as configs
from mixln_jax.data import rows
from mixln_jax.distributed import mesh as meshes
from mixln_jax.program.program import Program
from mixln_jax.training import samples

T, V = 32, 1024


def always(params, token):
    """Weights of a network whose likeliest next token is always `token`: no layer adds anything to equal embeddings."""
    params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if leaf.ndim > 1 else leaf, params)
    params['embed'] = jax.tree.map(jnp.ones_like, params['embed'])
    params['head'] = jax.tree.map(lambda kernel: kernel.at[:, token].set(100.0), params['head'])
    return params


@pytest.mark.parametrize('template, turn_end', [('chat', '<|im_end|>'), ('chatml', '</s>')])
def test_an_answer_ends_with_its_turn(tmp_path, template, turn_end):
    """As in `generate`: also at a token of the chat template that is not the tokenizer's eos."""
    tokenizer = vocabularies.with_chat_template(tmp_path)
    records = tmp_path / 'a.jsonl'
    records.write_text(json.dumps({'prompt': 'Who?', 'completion': 'Ann'}) + '\n')
    config = configs.build({
        'task': {'name': 'instructions'}, 'batch_size': 1, 'seq_length': T, 'compute_dtype': 'float32',
        'model': dict(vocab_size=V, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1),
        'data': dict(source='jsonl', path=str(records), template=template, mode='pad'), 'eval': {'samples': 1},
    })  # fmt: skip
    program = Program(config, meshes.make_mesh(configs.Mesh(1, 1, 1), jax.devices('cpu')[:1]))
    examples = rows.open_rows(config.data, 'all', tokenizer, T, V, config.task)
    token = tokenizer.read_specials(turn_end)[0].item()
    params = always(program.init(jax.random.key(0)).params, token)
    answer = orjson.loads(samples.sampling(program, examples, tokenizer)(params, 0))
    assert answer['finish'] == 'stop' and answer['ids'] == [token]

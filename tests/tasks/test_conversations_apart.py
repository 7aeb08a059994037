"""Conversations in one row do not see each other: packed, each has the loss that it has alone."""

import json

import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax.data import rows, tokenizers
from mixln_jax.kernels import cross_entropy
from mixln_jax.models import families
from mixln_jax.tasks import build

T, V = 32, 259
SIZES = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2)
TASK = configs.Task(name='instructions')
RECORDS = [
    {'messages': [
        {'role': 'user', 'content': f'{i} ' * (1 + i % 3)}, {'role': 'assistant', 'content': 'yes ' * (i % 4)},
        {'role': 'user', 'content': '?' * (i % 2)}, {'role': 'assistant', 'content': f'no {i}'},
    ]}
    for i in range(12)
]  # fmt: skip


def open_(folder, mode, records=RECORDS, learn='completions'):
    path = folder / 'a.jsonl'
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    data = configs.Data(source='jsonl', path=str(path), tokenizer='bytes', template='plain', mode=mode)
    task = configs.Task(name='instructions', learn=learn)
    return rows.open_rows(data, 'all', tokenizers.Bytes(), T, V, task)


def network(norm_position):
    config = configs.Config(
        task=TASK, model=configs.Model(norm_position=norm_position, init_std=0.1, **SIZES), compute_dtype='float32'
    )
    model = families.from_config(config.model, 'float32')
    return build.from_config(config, model), model.init(jax.random.key(0))['params']


def token_losses(task, params, batch):
    """[B,T] losses of targets, 0 where nothing is learned."""
    x, _ = task.model.apply({'params': params}, batch, None, method='backbone')
    *_, aux = cross_entropy.token_losses(x, task.model.head_kernel(params), batch['targets'], batch['loss_mask'], V)
    return np.asarray(aux['token_loss'])


def by_origin(of, losses):
    """{origin: losses of its learned targets} of all rows."""
    batch, found = of.batch(range(len(of))), {}
    for row, values in enumerate(losses):
        origins = of.origin(row).split(', ')
        segments = batch.get('segment_ids', np.ones_like(batch['inputs']))[row]
        for number, origin in enumerate(origins, 1):
            found[origin] = values[(segments == number) & (batch['loss_mask'][row] > 0)]
            assert len(found[origin]), origin
    return found


@pytest.mark.parametrize('learn', ['completions', 'all'])
@pytest.mark.parametrize('norm_position', ['pre', 'mix', 'hybridnorm'])
def test_packed_is_unpacked(tmp_path, norm_position, learn):
    """Token by token, as the mean of a conversation, and as the sum of the task."""
    task, params = network(norm_position)
    packed, padded = (open_(tmp_path, mode, learn=learn) for mode in ('pack', 'pad'))
    assert len(packed) < len(padded) == len(RECORDS)
    losses = {}
    sums = []
    for of in (packed, padded):
        batch = of.batch(range(len(of)))
        found = by_origin(of, token_losses(task, params, batch))
        losses[of is packed] = found
        total = task.losses(params, batch)
        sums.append((float(total.sum), float(total.weight)))
        assert total.weight == sum(map(len, found.values())) and float(total.sum) > 0
    assert losses[True].keys() == losses[False].keys()
    for origin, expected in losses[False].items():
        np.testing.assert_allclose(losses[True][origin], expected, rtol=1e-6, err_msg=origin)
        np.testing.assert_allclose(losses[True][origin].mean(), expected.mean(), rtol=0, atol=1e-6, err_msg=origin)
    np.testing.assert_allclose(*sums, rtol=1e-6)


@pytest.mark.parametrize('norm_position', ['pre', 'mix', 'hybridnorm'])
def test_other_words_change_nothing_elsewhere(tmp_path, norm_position):
    """Exactly nothing."""
    task, params = network(norm_position)
    changed = [*RECORDS]
    changed[5] = json.loads(json.dumps(RECORDS[5]).replace('yes', 'abc').replace('5', '7'))
    one, other = (open_(tmp_path, 'pack', records) for records in (RECORDS, changed))
    before, after = (by_origin(of, token_losses(task, params, of.batch(range(len(of))))) for of in (one, other))
    place = next(origin for origin in before if origin.endswith(':6'))
    assert np.abs(before.pop(place) - after.pop(place)).max() > 1e-3
    assert any(place in one.origin(row) and ', ' in one.origin(row) for row in range(len(one)))
    for origin, values in before.items():
        assert (values == after[origin]).all(), origin

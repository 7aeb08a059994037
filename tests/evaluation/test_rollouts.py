"""Rollouts are a function of weights, seed, step and place: what they depend on, and what does not change them."""

import json

import jax
import numpy as np
import pytest
import rewards
from short_runs import recipe

from mixln_jax import config as configs
from mixln_jax.data import batches, rows
from mixln_jax.distributed import mesh as meshes
from mixln_jax.evaluation.rollouts import open_rollouts
from mixln_jax.program.program import Program


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp('prompts') / 'a.jsonl'
    path.write_text(''.join(json.dumps({'prompt': f'{i}+{i % 7}'}) + '\n' for i in range(60)))
    return path


@pytest.fixture(scope='module')
def opened(path):
    """Returns (rollouts, weights, prompts) for some keys."""

    def made(**changes):
        keys = {
            'init_from': 'x', 'task.name': 'online', 'task.online.reward': 'rewards:letters', 'data.template': 'plain',
            'task.online.beta': 0.0, 'task.online.max_new_tokens': 6, 'data.held_out': 0.4,
        }  # fmt: skip
        config = configs.build(recipe(path, **keys | changes))
        program = Program(config, meshes.make_mesh(config.mesh, jax.devices('cpu')))
        tokenizer = rows.open_tokenizer(config.data)
        prompts = rows.open_rows(config.data, 'train', tokenizer, config.seq_length, 259, config.task)
        return open_rollouts(program, tokenizer), program.init(jax.random.key(0)).network, prompts

    return made


def collected(made, places=(3, 7), step=5):
    rollouts, network, prompts = made
    batch = batches.batch_at(prompts, 0, np.array(places))
    return rollouts.training(network, batch, prompts, jax.device_put(np.int32(step)))


def test_of_what_they_are_a_function(opened):
    made = opened()
    first = collected(made)
    for name, values in collected(made).items():
        np.testing.assert_array_equal(values, first[name])
    ids = first['inputs']
    assert not np.array_equal(ids, collected(made, step=6)['inputs'])
    assert not np.array_equal(ids, collected(opened(seed=1), step=5)['inputs'])
    assert len({row.tobytes() for row in ids}) == 8  # those of a prompt differ
    np.testing.assert_array_equal(ids[4:], collected(made, places=(7, 3))['inputs'][:4])
    np.testing.assert_array_equal(ids, collected(opened(accumulate=4))['inputs'])


def test_a_row(opened):
    """It is a prompt with a completion, whose tokens count, and the reward of its text."""
    batch = collected(opened())
    assert batch['place'].tolist() == [12, 13, 14, 15, 28, 29, 30, 31]
    for row in range(8):
        mask = batch['loss_mask'][row] > 0
        start = int(mask.argmax()) + 1
        ids = batch['targets'][row][mask].tolist()
        text = bytes(token for token in ids if token < 256).decode(errors='replace')
        assert bytes(batch['inputs'][row][:start].tolist()).decode() == batch_prompt(batch, row)
        assert batch['reward'][row] == pytest.approx(rewards.letters([text])[0], abs=1e-6)
        assert batch['ended'][row] == (ids[-1] == 258) and len(ids) <= 6


def batch_prompt(batch, row):
    """The prompt of a row, `i+i%7`, from its text."""
    text = bytes(batch['inputs'][row][: int((batch['loss_mask'][row] > 0).argmax()) + 1].tolist()).decode()
    number = int(text.partition('+')[0])
    return f'{number}+{number % 7}'


def test_remax_compares_with_the_likeliest(opened):
    made = opened(**{'task.online.algorithm': 'remax', 'task.online.completions': 2})
    batch = collected(made)
    rollouts, network, prompts = made
    assert batch['baseline'].reshape(2, 2).std(1).tolist() == [0, 0]
    rollouts._online = configs.Online(
        reward='a:b', algorithm='remax', completions=1, max_new_tokens=6, temperature=1e-3
    )
    likeliest = collected(made)
    np.testing.assert_allclose(batch['baseline'][::2], likeliest['reward'], atol=1e-6)


def test_an_evaluation_is_the_same_at_every_step_and_size(opened):
    rollouts, network, prompts = opened()

    def texts(size, step):
        dataset = batches.evaluation(prompts, size)
        found = [rollouts.evaluation(network, dataset[i], prompts, np.int32(step)) for i in range(len(dataset))]
        assert all(batch['inputs'].shape[0] == size for batch, _ in found)
        assert sum(batch['example_mask'].sum() for batch, _ in found) == len(prompts)
        assert sum(batch['loss_mask'].max(-1).sum() for batch, _ in found) == len(prompts)
        return [record['completion'] for _, records in found for record in records]

    assert texts(8, 0) == texts(8, 100) == texts(16, 3)

"""Two networks compared by a reward: win rate, difference and divergences against numpy, and what is refused."""

import json

import jax
import numpy as np
import pytest
import rewards
from short_runs import SIZES

from mixln_jax import config as configs
from mixln_jax import evaluate
from mixln_jax.data.records import Prompt
from mixln_jax.data.tokenizers import Bytes
from mixln_jax.evaluation import comparison
from mixln_jax.evaluation.comparison import compare
from mixln_jax.models import families
from mixln_jax.runs.weights import Weights
from mixln_jax.system.errors import UsageError

OPTIONS = dict(max_new=6, temperature=1.0, seed=0, batch_size=8)
PROMPTS = [
    Prompt({'prompt': text}, f'a:{i}', [{'role': 'user', 'content': text}])
    for i, text in enumerate(
        ['the', 'quick', 'brown', 'fox', 'jumps', 'over', 'a', 'lazy', 'dog', 'and', 'then', 'sleeps']
    )
]


def weights(seed, scale=1.0, tmp=None, **changes):
    """Weights as of a run of task online, on bytes."""
    values = configs.default()
    values.task.name, values.data.tokenizer, values.data.template, values.seq_length = 'online', 'bytes', 'plain', 24
    values.task.online.update(reward='rewards:letters', max_new_tokens=6)
    values.init_from = 'x'
    values.model.update(norm_position='mix', init_std=0.3 * scale, **SIZES)
    config = configs.build(values)
    model = families.from_config(config.model, 'float32')
    params = jax.device_get(jax.jit(model.init)(jax.random.key(seed))['params'])
    return Weights(model, params, f'network {seed}', 1, config, Bytes())


@pytest.fixture(scope='module')
def ours():
    return weights(0)


@pytest.fixture(scope='module')
def theirs():
    return weights(1)


def of_prompts(prompts, texts):
    return np.array(rewards.letters(texts))


def test_numbers(ours, theirs):
    answers = [comparison.answer(one, PROMPTS, **OPTIONS) for one in (ours, theirs)]
    a, b = (of_prompts(PROMPTS, one.texts) for one in answers)
    result = compare(ours, theirs, PROMPTS, of_prompts, **OPTIONS)
    wins = np.where(a > b, 1, np.where(a < b, 0, 0.5))
    count = len(PROMPTS)
    assert result['prompts'] == count and result['ties'] == (a == b).sum()
    assert result['win_rate'] == pytest.approx(wins.mean()) and 0 < wins.mean() < 1
    assert result['win_rate_stderr'] == pytest.approx(
        np.sqrt(np.square(wins - wins.mean()).sum() / (count - 1) / count)
    )
    assert result['reward_difference'] == pytest.approx((a - b).mean())
    assert result['reward_difference_stderr'] == pytest.approx((a - b).std(ddof=1) / np.sqrt(count))
    assert (result['reward'], result['reward_against']) == (pytest.approx(a.mean()), pytest.approx(b.mean()))
    assert 'kl' not in result
    assert 'win rate' in comparison.shown(result) and 'KL' not in comparison.shown(result)


def test_divergences(ours, theirs):
    """Of each answer, by log-softmax over all logits of a row alone; from itself there is none."""
    answers = comparison.answer(ours, PROMPTS, **OPTIONS)
    expected = []
    for context, one in zip(answers.contexts, answers.made, strict=True):
        ids = np.array([[*context, *one.tokens.ids]])
        logits = theirs.model.apply({'params': theirs.params}, ids)[0][0, :, :259]
        log_probs = np.asarray(jax.nn.log_softmax(logits))[len(context) - 1 : -1]
        own = log_probs[np.arange(len(one.tokens.ids)), one.tokens.ids]
        expected.append(sum(one.tokens.log_probs) - own.sum())
    np.testing.assert_allclose(comparison.divergences(theirs, answers, 8), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(comparison.divergences(ours, answers, 8), 0, atol=1e-5)
    result = compare(ours, theirs, PROMPTS, of_prompts, theirs, **OPTIONS)
    assert result['kl'] == pytest.approx(np.mean(expected), abs=1e-4) and result['kl_against'] == pytest.approx(
        0, abs=1e-5
    )
    assert 'KL from the start' in comparison.shown(result)


def test_a_network_against_itself(ours):
    result = compare(ours, ours, PROMPTS, of_prompts, **OPTIONS)
    assert (result['win_rate'], result['win_rate_stderr'], result['reward_difference']) == (0.5, 0, 0)
    assert compare(ours, ours, PROMPTS[:1], of_prompts, **OPTIONS)['win_rate_stderr'] is None


def test_divergences_need_samples_at_temperature_one(ours):
    with pytest.raises(UsageError, match='--temperature 0: --start needs answers sampled at temperature 1'):
        compare(ours, ours, PROMPTS, of_prompts, ours, **OPTIONS | {'temperature': 0.0})


BAD = {
    'prompts alone': (['--prompts', 'a'], 2, '--prompts has no meaning without --against'),
    'seed alone': (['--seed', '1'], 2, '--seed has no meaning without --against'),
    'no prompts': (['--against', 'x'], 2, '--against needs --prompts'),
    'split': (['--against', 'x', '--prompts', 'a', '--split', 'train'], 2, '--split has no meaning with --against'),
    'tasks': (['--against', 'x', '--prompts', 'a', '--tasks', 'a'], 2, '--tasks has no meaning with --against'),
    'no file': (['--against', 'x', '--prompts', '/nowhere'], 4, 'there is no file /nowhere'),
    'tokens': (['--against', 'x', '--prompts', 'a', '--max_new_tokens', '0'], 2, '--max_new_tokens must be at least 1'),
    'temperature': (['--against', 'x', '--prompts', 'a', '--temperature', '-1'], 2, '--temperature must be from 0'),
    'no number': (
        ['--against', 'x', '--prompts', 'a', '--temperature', 'nan'],
        2,
        'argument --temperature: invalid float value',
    ),
    'a seed': (['--against', 'x', '--prompts', 'a', '--seed', '-1'], 2, '--seed must be from 0 to 2^32 - 1'),
}


@pytest.mark.parametrize('argv, code, message', BAD.values(), ids=BAD)
def test_options(argv, code, message, capsys):
    assert evaluate.main(['--checkpoint', 'y', *argv]) == code
    assert message in capsys.readouterr().err


def test_the_command(ours, theirs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.weights, 'load', lambda path, **_: {'ours': ours, 'theirs': theirs}[path])
    path = tmp_path / 'prompts.jsonl'
    path.write_text(''.join(json.dumps(prompt.fields) + '\n' for prompt in PROMPTS))
    argv = ['--checkpoint', 'ours', '--against', 'theirs', '--prompts', str(path), '--max_new_tokens', '6']
    assert evaluate.main([*argv, '--start', 'theirs', '--batch_size', '8', '--out', str(tmp_path / 'a.json')]) == 0
    expected = compare(ours, theirs, PROMPTS, of_prompts, theirs, **OPTIONS)
    found = json.loads((tmp_path / 'a.json').read_text())
    assert {name: found[name] for name in expected} == expected
    assert found['reward_of'] == 'rewards:letters' and found['against'] == 'network 1'
    assert f'win rate {expected["win_rate"]:.3f}' in capsys.readouterr().out
    assert evaluate.main([*argv, '--reward', 'nowhere:f']) == 2
    assert '--reward=nowhere:f: cannot be used' in capsys.readouterr().err

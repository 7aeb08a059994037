"""Runs that learn a reward from pairs: they learn it, go on exactly, with adapters and on any mesh; tools read them."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from short_runs import WORDS, StopAtTwo, exported, lines_of, recipe

from mixln_jax import config as configs
from mixln_jax import evaluate, export, generate, main, recipes, trees
from mixln_jax.analysis import drop, subjects
from mixln_jax.data import chat, tokenizers
from mixln_jax.evaluation import comparison, rewards
from mixln_jax.models import families
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.runs import checkpoint, weights
from mixln_jax.system.errors import CheckpointError, Stopped, UsageError
from mixln_jax.tasks import build

ROOT = pathlib.Path(__file__).parents[2]

METHODS = {
    'all': {'optim.learning_rate': 0.03, 'num_steps': 12},
    'packed, accumulated, centred': {'data.mode': 'pack', 'accumulate': 2, 'task.reward.centering': 0.01},
    'lora': {'tune.method': 'lora', 'tune.rank': 2, 'tune.dropout': 0.2, 'tune.base_dtype': 'bfloat16'},
    'lisa': {'tune.method': 'lisa', 'tune.layers': 1, 'tune.interval': 1},
    'some': {'tune.train': 'layers/segment_1/mlp/*'},
}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """An exported Mix-LN network."""
    return exported(tmp_path_factory.mktemp('exported') / 'base')


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """Pairs of which the answer without capitals is chosen, every third with a margin."""
    path = tmp_path_factory.mktemp('pairs') / 'a.jsonl'
    words = [WORDS[i % len(WORDS)] for i in range(60)]
    records = [{'prompt': f'{i}:', 'chosen': word, 'rejected': word.upper()} for i, word in enumerate(words)]
    records = [record | ({'margin': 0.5} if i % 3 == 0 else {}) for i, record in enumerate(records)]
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def values(pairs, base, **changes):
    given = {
        'init_from': f'hf:{base}', 'task.name': 'reward', 'seq_length': 32, 'data.template': 'plain',
        'data.held_out': 0.4, 'optim.warmup_ratio': 0.0, 'optim.learning_rate': 0.01, 'eval.tokens': 1000,
    }  # fmt: skip
    return recipe(pairs, **given | changes)


@pytest.fixture(scope='module')
def finished(pairs, base, tmp_path_factory):
    """Returns the finished run of a method, by its name."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp('runs') / 'run'
        main.run(values(pairs, base, **METHODS[name]), folder)
        return folder

    return made


@pytest.mark.parametrize('name', [name for name in METHODS if name != 'all'])
def test_goes_on_exactly(name, pairs, base, finished, tmp_path):
    with pytest.raises(Stopped):
        main.run(values(pairs, base, **METHODS[name]), tmp_path / 'run', stop=StopAtTwo())
    main.run(values(pairs, base, **METHODS[name]), tmp_path / 'run')
    assert lines_of(tmp_path / 'run') == lines_of(finished(name))
    one, other = (checkpoint.read_about(run / 'checkpoints/4')['leaves'] for run in (tmp_path / 'run', finished(name)))
    assert one == other


def test_it_learns_pairs_that_were_held_out(finished):
    last = lines_of(finished('all'))[-1]
    assert last['eval/accuracy'] > 0.95 and last['eval/margin'] > 1 and last['eval/loss'] < 0.4
    assert last['eval/reward_std'] > last['eval/margin'] / 2 * 0.9


@pytest.mark.parametrize('name', ['lora', 'lisa', 'some'])
def test_the_head_is_drawn_and_trained(name, base, finished):
    """It is in the state that is trained, and moves; what it is drawn as does not depend on the method."""
    run = finished(name)
    config = configs.read(run / 'config.json')
    model = families.from_config(config.model, num_outputs=config.task.num_outputs)
    drawn = model.init(jax.random.key(config.seed))['params']['score']['kernel']
    found = weights.load(run)
    assert found.params['score']['kernel'].shape == drawn.shape == (16, 1) and 'head' not in found.params
    assert np.abs(found.params['score']['kernel'] - drawn).max() > 1e-3
    start = dict(trees.named_leaves(hf_llama.read(base)[1]))
    initial = subjects._initial(found, None)
    np.testing.assert_allclose(initial['score']['kernel'], drawn, rtol=1e-6)
    for leaf_name, leaf in trees.named_leaves(initial):
        if leaf_name != 'score/kernel':
            np.testing.assert_array_equal(leaf, start[leaf_name], err_msg=leaf_name)


@pytest.mark.parametrize(
    'mesh',
    [pytest.param({'mesh.data': 4}, marks=pytest.mark.slow), {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}],
    ids=str,
)
def test_devices_change_nothing(mesh, pairs, base, finished, tmp_path):
    name = 'packed, accumulated, centred'
    main.run(values(pairs, base, **METHODS[name] | {'accumulate': 1} | mesh), tmp_path / 'run')
    for one, other in zip(lines_of(tmp_path / 'run'), lines_of(finished(name)), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[key], rel=1e-4, abs=1e-4), key


def test_tools_read_the_run(finished, capsys):
    run = finished('packed, accumulated, centred')
    wanted = lines_of(run)[-1]
    assert evaluate.main(['--checkpoint', str(run), '--out', str(run / 'results.json')]) == 0
    results = json.loads((run / 'results.json').read_text())
    for name in ('loss', 'accuracy', 'margin', 'reward', 'reward_std'):
        assert results[f'eval/{name}'] == pytest.approx(wanted[f'eval/{name}'], rel=1e-4)
    assert drop.main(['--checkpoint', str(run), '--batch_size', '4', '--tokens', '40', '--steps', 'init,4']) == 0
    assert generate.main(['--checkpoint', str(run), '--prompt', 'a']) == 5
    assert 'has a head of size 1' in capsys.readouterr().err


def test_a_reward_network_goes_on_as_one_alone(pairs, base, finished, tmp_path, capsys):
    start = str(finished('all'))
    capsys.readouterr()
    main.run(values(pairs, base, init_from=start, num_steps=1), tmp_path / 'run')
    assert lines_of(tmp_path / 'run')[0]['train/accuracy'] > 0.9  # its head was kept
    assert 'the head, of size 1, is new' not in capsys.readouterr().out
    with pytest.raises(UsageError, match='its network has a head of size 1, this one has a head for words'):
        main.run(values(pairs, base, **{'init_from': str(finished('all')), 'task.name': 'preference'}), tmp_path / 'no')


KEYS = {
    'bert': ({'model.family': 'bert', 'model.num_positions': 32}, 'needs a network that predicts the next token'),
    'samples': ({'eval.samples': 2}, 'config.eval.samples=2 has no meaning'),
    'too short': ({'seq_length': 3}, 'config.seq_length=3 is too short for a pair: at least 4'),
    'concat': ({'data.mode': 'concat'}, 'config.task.name=reward needs config.data.mode=pad or pack, not concat'),
    'centering': ({'task.reward.centering': -1.0}, 'config.task.reward.centering'),
}  # fmt: skip


@pytest.mark.parametrize('changes, words', KEYS.values(), ids=KEYS)
def test_keys_that_contradict(changes, words, pairs, base, tmp_path):
    with pytest.raises(UsageError, match=words):
        main.run(values(pairs, base, **changes), tmp_path / 'run')


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp('texts') / 'a.jsonl'
    turns = [{'role': 'user', 'content': '1:'}, {'role': 'assistant', 'content': 'quick'}]
    records = [
        {'prompt': '1:', 'completion': 'quick', 'name': 'kept'}, {'messages': turns}, {'text': '1:quick'},
        {'instruction': '1:', 'output': 'QUICK'}, {'text': 'a long text that is more than the row ' * 3},
        {'text': ''},
    ]  # fmt: skip
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def test_texts_are_scored(finished, texts, tmp_path, capsys):
    run = finished('all')
    command = ['--checkpoint', str(run), '--texts', str(texts), '--out', str(tmp_path / 'out.jsonl')]
    assert evaluate.main(command) == 0
    said = capsys.readouterr()
    assert '6 texts: reward ' in said.out
    assert f'1 of 6 texts are longer than the 32 tokens that {run}' in said.err
    lines = [*map(json.loads, (tmp_path / 'out.jsonl').read_text().splitlines())]
    assert lines[0]['name'] == 'kept' and [{*line} for line in lines[1:3]] == [
        {'messages', 'reward'},
        {'text', 'reward'},
    ]
    found = weights.load(run)
    template = chat.open_template('plain', found.tokenizer)
    ids = [template.tokens(lines[1]['messages'])[0], [*b'1:quick', 258], [*lines[4]['text'].encode(), 258][-32:]]
    ids.append([258])  # of an empty text
    for at, one in zip((0, 2, 4, 5), ids, strict=True):
        expected = found.model.apply({'params': found.params}, np.array([one]))[0][0, -1, 0]
        assert lines[at]['reward'] == pytest.approx(float(expected), abs=1e-5)
    assert lines[0]['reward'] == pytest.approx(lines[1]['reward'], abs=1e-6) and lines[3]['reward'] < lines[0]['reward']


@pytest.mark.parametrize(
    'record, words',
    [
        ('[1]', 'a text is an object'), ('{}', 'a text is an object'), ('{"text": 1}', 'text is a number'),
        ('{"completion": "a"}', 'a prompt is an object'), ('{"prompt": "a", "output": null}', 'output is null'),
        ('{"messages": [{"role": "user", "content": "a"}]}', 'does not end with'), ('{"text"', 'not JSON'),
    ],
)  # fmt: skip
def test_what_is_no_text(record, words, finished, tmp_path, capsys):
    (tmp_path / 'a.jsonl').write_text(f'{record}\n')
    assert evaluate.main(['--checkpoint', str(finished('all')), '--texts', str(tmp_path / 'a.jsonl')]) == 4
    error = capsys.readouterr().err
    assert f'{tmp_path}/a.jsonl:1: ' in error and words in error and error.count('\n') == 1


def test_only_a_reward_network_scores(base, finished, texts, tmp_path, capsys):
    assert evaluate.main(['--checkpoint', str(base), '--texts', str(texts)]) == 5
    assert 'gives no reward' in capsys.readouterr().err
    assert evaluate.main(['--checkpoint', str(finished('all')), '--texts', str(texts), '--tasks', 'a']) == 2
    assert evaluate.main(['--checkpoint', str(finished('all')), '--texts', str(tmp_path / 'none')]) == 4


def online(prompts, base, reward, **changes):
    given = {
        'init_from': f'hf:{base}', 'task.name': 'online', 'task.online.reward': str(reward), 'task.online.beta': 0.0,
        'task.online.completions': 4, 'task.online.max_new_tokens': 6, 'data.template': 'plain', 'data.held_out': 0.4,
        'optim.warmup_ratio': 0.0,
    }  # fmt: skip
    return recipe(prompts, **given | changes)


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp('prompts') / 'a.jsonl'
    path.write_text(''.join(json.dumps({'prompt': f'{i}:'}) + '\n' for i in range(60)))
    return path


def test_online_learning_from_a_reward_network(prompts, base, finished, tmp_path):
    """It goes on exactly, on more devices to rounding, and with other weights of the same name not at all."""
    shutil.copytree(finished('all'), reward := tmp_path / 'reward')
    main.run(online(prompts, base, reward), tmp_path / 'whole')
    with pytest.raises(Stopped):
        main.run(online(prompts, base, reward), tmp_path / 'run', stop=StopAtTwo())
    shutil.copytree(tmp_path / 'run', tmp_path / 'other')
    main.run(online(prompts, base, reward), tmp_path / 'run')
    lines = lines_of(tmp_path / 'whole')
    assert lines_of(tmp_path / 'run') == lines and lines[0]['train/reward_std'] > 0
    one, other = (checkpoint.read_about(tmp_path / f'{run}/checkpoints/4')['leaves'] for run in ('run', 'whole'))
    assert one == other
    assert evaluate.main(['--checkpoint', str(tmp_path / 'run'), '--out', str(tmp_path / 'results.json')]) == 0
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['eval/reward'] == pytest.approx(lines[-1]['eval/reward'], rel=1e-4)
    main.run(online(prompts, base, reward, **{'mesh.data': 2, 'mesh.fsdp': 2, 'num_steps': 1}), tmp_path / 'devices')
    assert lines_of(tmp_path / 'devices')[0]['train/reward'] == pytest.approx(lines[0]['train/reward'], abs=1e-5)
    shutil.rmtree(reward / 'checkpoints/12')  # an earlier checkpoint is the newest now
    with pytest.raises(UsageError, match='data.fingerprint.reward_network differs'):
        main.run(online(prompts, base, reward), tmp_path / 'other')


def test_rewards_that_cannot_be_used(prompts, base, finished, tmp_path):
    with pytest.raises(CheckpointError, match=r'config.task.online.reward=\S+base: \S+ gives no reward'):
        main.run(online(prompts, base, base), tmp_path / 'run')
    with pytest.raises(UsageError, match='config.task.online.reward=nowhere: '):
        main.run(online(prompts, base, 'nowhere'), tmp_path / 'run')


def test_another_tokenizer(finished, monkeypatch):
    class Other(tokenizers.Bytes):
        eos_id = 257

    mesh = comparison.mesh_for(1)
    with pytest.raises(UsageError, match='--reward=.* has another tokenizer than the network that answers$'):
        rewards.open_reward(str(finished('all')), '--reward', mesh, 1, Other())
    Other.kind = 'huggingface'
    with pytest.raises(UsageError, match='config.data.tokenizer=bytes: name the run itself$'):
        rewards.open_reward(str(finished('all')), '--reward', mesh, 1, Other())


def test_two_networks_are_compared_by_a_reward_network(base, finished, prompts, tmp_path):
    main.run(online(prompts, base, finished('all'), num_steps=1), run := tmp_path / 'run')
    options = ['--prompts', str(prompts), '--reward', str(finished('all')), '--max_new_tokens', '4']
    command = ['--checkpoint', str(run), '--against', str(run), *options, '--out', str(tmp_path / 'a.json')]
    assert evaluate.main(command) == 0
    result = json.loads((tmp_path / 'a.json').read_text())
    assert result['win_rate'] == 0.5 and result['reward'] == result['reward_against'] != 0


def test_exported_it_scores_the_same(finished, texts, tmp_path, capsys):
    export.export(finished('all'), str(tmp_path / 'out'))
    stored = json.loads((tmp_path / 'out/config.json').read_text())
    assert stored['architectures'] == ['MixlnForSequenceClassification'] and stored['pad_token_id'] == 256
    for where, name in ((finished('all'), 'a.jsonl'), (tmp_path / 'out', 'b.jsonl')):
        command = ['--checkpoint', str(where), '--texts', str(texts), '--out', str(tmp_path / name)]
        assert evaluate.main(command) == 0
    one, other = (
        [json.loads(line)['reward'] for line in (tmp_path / name).read_text().splitlines()]
        for name in ('a.jsonl', 'b.jsonl')
    )
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)
    assert evaluate.main(['--checkpoint', str(tmp_path / 'out')]) == 5
    assert drop.main(['--checkpoint', str(tmp_path / 'out'), '--text', str(texts)]) == 2
    with pytest.raises(UsageError, match='--adapter: .* has trained its head too'):
        export.export_adapter(finished('lora'), str(tmp_path / 'no'))


def test_recipe():
    config = configs.build(recipes.load(str(ROOT / 'configs/preferences/reward_quickstart.py'), []))
    assert build.from_config(config, families.from_config(config.model, num_outputs=1)).headline == 'accuracy'
    start = configs.build(recipes.load(str(ROOT / 'configs/finetune/quickstart.py'), [])).model
    assert all(getattr(config.model, key) == getattr(start, key) for key in configs.same_weights())

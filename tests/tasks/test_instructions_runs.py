"""Fine-tuning on conversations: the loss, the recipes, and a run from end to end."""

import json
import pathlib

import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import evaluate, main, recipes
from mixln_jax.analysis import angular
from mixln_jax.data import inspect, rows, tokenizers
from mixln_jax.models import families
from mixln_jax.system.errors import UsageError
from mixln_jax.tasks import build
from mixln_jax.tasks.instructions import Instructions

ROOT = pathlib.Path(__file__).parents[2]

T, V = 24, 259
WORDS = 'the quick brown fox jumps over a lazy dog'.split()  # noqa: SIM905
RECORDS = [
    {'messages': [
        {'role': 'user', 'content': WORDS[i % 9]},
        {'role': 'assistant', 'content': WORDS[i * i % 9][: i % 4]},
        {'role': 'user', 'content': str(i)},
        {'role': 'assistant', 'content': 'y' * (i % 3)},
    ]}
    for i in range(60)
]  # fmt: skip


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp('records') / 'a.jsonl'
    path.write_text(''.join(json.dumps(record) + '\n' for record in RECORDS))
    return path


def values(path, mode, **changes):
    """The keys of a small run."""
    c = configs.default()
    c.batch_size, c.seq_length, c.num_steps, c.compute_dtype, c.device = 8, T, 3, 'float32', 'cpu'
    c.model.update(vocab_size=V, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, init_std=0.3)
    c.task.name = 'instructions'
    c.data.update(source='jsonl', path=str(path), tokenizer='bytes', template='plain', mode=mode, held_out=0.2)
    c.checkpoint.every = c.eval.every = c.analysis.every = 0
    c.analysis.tokens = 64
    c.update_from_flattened_dict(changes)
    return c


def made(path, mode, **changes):
    """(task, parameters, rows)."""
    config = configs.build(values(path, mode, **changes))
    model = families.from_config(config.model, 'float32')
    task = build.from_config(config, model)
    of = rows.open_rows(config.data, 'all', tokenizers.Bytes(), T, V, config.task)
    return task, model.init(jax.random.key(0))['params'], of


def test_the_loss_is_that_of_learned_tokens(path):
    """Against logits of the whole vocabulary and a plain log-softmax in float64."""
    task, params, of = made(path, 'pack')
    batch = of.batch(range(len(of)))
    losses = task.losses(params, batch)
    logits = np.float64(task.model.apply({'params': params}, batch)[0])[..., :V]
    picked = np.take_along_axis(logits, batch['targets'][..., None], -1)[..., 0]
    wanted = ((np.log(np.exp(logits).sum(-1)) - picked) * batch['loss_mask']).sum()
    learned = sum(len(m['content']) + 1 for record in RECORDS for m in record['messages'] if m['role'] == 'assistant')
    assert losses.weight == losses.metrics['tokens'] == batch['loss_mask'].sum() == learned
    assert float(losses.sum) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize('name', ['quickstart', 'commonsense'])
def test_recipes(name):
    config = configs.build(recipes.load(str(ROOT / f'configs/finetune/{name}.py'), []))
    assert isinstance(build.from_config(config, families.from_config(config.model)), Instructions)
    base = {'quickstart': 'quickstart', 'commonsense': 'llama_130m'}[name]
    start = configs.build(recipes.load(str(ROOT / f'configs/{base}.py'), [])).model
    assert all(getattr(config.model, key) == getattr(start, key) for key in configs.same_weights())


def test_questions_about_the_library():
    data = configs.Data(source='stdlib', template='plain', tokenizer='bytes')
    task = configs.Task(name='instructions')
    of = rows.open_rows(data, 'all', tokenizers.Bytes(), 128, V, task)
    [number] = [i for i in range(len(of)) if of.origin(i) == 'textwrap.dedent']
    batch = of.batch([number])
    learned = batch['targets'][batch['loss_mask'] > 0]
    assert tokenizers.Bytes().decode(learned) == 'Remove any common leading whitespace from every line in `text`.'
    assert len(of) > 1000


@pytest.fixture(scope='module')
def finished(path, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run')
    main.run(configs.public(configs.build(values(path, 'pack'))), workdir)
    return workdir


def test_a_run(finished, capsys):
    """It trains, evaluates on what it did not train on, and its tools open the same data."""
    lines = [json.loads(line) for line in (finished / 'metrics.jsonl').read_text().splitlines()]
    loss = lines[-1]['eval/loss']
    assert evaluate.main(['--checkpoint', str(finished)]) == 0
    assert f'{loss:.4f}'[:5] in capsys.readouterr().out
    assert angular.main(['--checkpoint', str(finished), '--tokens', '50']) == 0
    seen = {r['origin'] for step in range(1, 20) for r in inspect.inspect(finished, step)}
    config = configs.read(finished / 'config.json')
    held = rows.open_rows(config.data, 'validation', tokenizers.Bytes(), T, V, config.task)
    assert not {o for i in range(len(held)) for o in held.origin(i).split(', ')} & {
        o for origin in seen for o in origin.split(', ')
    }


def test_inspect_shows_what_is_learned(finished, capsys):
    [row] = inspect.inspect(finished, 2, 1)
    origins = [int(origin.rpartition(':')[2]) - 1 for origin in row['origin'].split(', ')]
    wanted = []
    for number in origins:
        a, b, c, d = (message['content'] for message in RECORDS[number]['messages'])
        wanted.append([(a, False), (f'{b}<258>', True), (c, False), (f'{d}<258>', True)])
    assert row['text'] == wanted
    assert sum(row['loss_mask']) == sum(len(text.replace('<258>', '.')) for c in wanted for text, is_ in c if is_)
    assert inspect.main(['--workdir', str(finished), '--step', '2', '--rows', '1']) == 0
    first = wanted[0]
    shown = f'  text        {first[0][0]}[[{first[1][0]}]]{first[2][0]}[[{first[3][0]}]]\n'
    assert shown in capsys.readouterr().out
    assert f'{first[0][0]}\x1b[1;32m{first[1][0]}\x1b[0m{first[2][0]}' in '\n'.join(inspect.show(row, colour=True))
    assert inspect.main(['--workdir', str(finished), '--step', '2', '--json', '--rows', '1']) == 0
    assert json.loads(capsys.readouterr().out)['loss_mask'] == row['loss_mask']


def test_other_records_are_noticed(finished, path, tmp_path, capsys):
    """A run that goes on, and the tools, say which part differs."""
    other = tmp_path / 'b.jsonl'
    other.write_text(path.read_text().replace('quick', 'quack'))
    assert evaluate.main(['--checkpoint', str(finished), '--data_path', str(other)]) == 4
    assert 'source differs' in capsys.readouterr().err
    (copy := tmp_path / 'same.jsonl').write_text(path.read_text())
    assert evaluate.main(['--checkpoint', str(finished), '--data_path', str(copy)]) == 0


KEYS = {
    'a BERT': ({'model.family': 'bert', 'model.num_positions': T}, 'needs a network that predicts the next token'),
    'compat': ({'compat': 'official'}, 'config.compat=official has no meaning for config.task.name=instructions'),
}


@pytest.mark.parametrize('changes, message', KEYS.values(), ids=KEYS)
def test_keys_that_contradict(path, changes, message):
    with pytest.raises(UsageError, match=message):
        made(path, 'pad', **changes)


FILES = {
    'no shape': ('{"text": "a"}\n', 'a.jsonl:1: a record of no known shape'),
    'malformed': ('{"prompt": "a", "completion": "b"}\n{"prompt"\n', 'a.jsonl:2: not JSON'),
    'empty': ('', 'a.jsonl: no records in this file'),
    'role': (
        ''.join(f'{{"messages": [{{"role": "x", "content": "{text}"}}]}}\n' for text in 'ab'),
        ': the template plain: template error: it does not know the role x',
    ),
}


@pytest.mark.parametrize('content, message', FILES.values(), ids=FILES)
def test_a_bad_file_ends_a_run_in_one_line(tmp_path, capsys, content, message):
    (tmp_path / 'a.jsonl').write_text(content)
    recipe = tmp_path / 'recipe.py'
    recipe.write_text(
        'from mixln_jax import config\n\ndef get_config():\n    c = config.default()\n'
        "    c.task.name, c.device, c.compute_dtype = 'instructions', 'cpu', 'float32'\n"
        '    c.batch_size, c.seq_length, c.num_steps = 8, 24, 1\n'
        '    c.model.update(vocab_size=259, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2)\n'
        f"    c.data.update(source='jsonl', path='{tmp_path}/a.jsonl', tokenizer='bytes', template='plain')\n"
        '    return c\n'
    )
    assert main.main(['--config', str(recipe), '--workdir', str(tmp_path / 'run')]) == 4
    [line] = [line for line in capsys.readouterr().err.splitlines() if 'error' in line or 'a.jsonl' in line]
    assert message in line

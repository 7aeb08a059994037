"""Runs that learn from pairs of answers: they begin at ln 2, learn, go on exactly, on any mesh, and tools read them."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from short_runs import WORDS, StopAtTwo, exported, lines_of, recipe

from mixln_jax import config as configs
from mixln_jax import evaluate, main, recipes, replay, trees
from mixln_jax.analysis import drop, gradients
from mixln_jax.data import batches, inspect
from mixln_jax.data import pairs as pairs_of
from mixln_jax.data import rows as data_rows
from mixln_jax.evaluation import references
from mixln_jax.models import families
from mixln_jax.models.hf import llama as hf_llama
from mixln_jax.runs import checkpoint, frozen, weights
from mixln_jax.system.errors import CheckpointError, Stopped, UsageError
from mixln_jax.tasks import build
from mixln_jax.tasks.task import Context

ROOT = pathlib.Path(__file__).parents[2]
METHODS = {
    'sigmoid': {'task.preference.label_smoothing': 0.1, 'batch_size': 16},  # 1.8 epochs
    'ipo, packed, accumulated': {'task.preference.loss': 'ipo', 'data.mode': 'pack', 'accumulate': 2},
    'sigmoid_norm, averaged': {'task.preference.loss': 'sigmoid_norm', 'optim.ema': 0.5},
    'lora': {'tune.method': 'lora', 'tune.rank': 2, 'tune.dropout': 0.2},
}
COMPUTED = {'task.preference.reference': 'precomputed'}
METHODS |= {f'{name}, precomputed': METHODS[name] | COMPUTED for name in [*METHODS] if 'averaged' not in name}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """An exported Mix-LN network."""
    return exported(tmp_path_factory.mktemp('exported') / 'base')


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    """Pairs of which the answer without capitals is chosen."""
    path = tmp_path_factory.mktemp('pairs') / 'a.jsonl'
    words = [WORDS[i % len(WORDS)] for i in range(60)]
    records = [{'prompt': f'{i}:', 'chosen': word, 'rejected': word.upper()} for i, word in enumerate(words)]
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def values(pairs, base, **changes):
    given = {
        'init_from': f'hf:{base}', 'task.name': 'preference', 'seq_length': 32, 'data.template': 'plain',
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


@pytest.mark.parametrize('name', METHODS)
def test_goes_on_exactly(name, pairs, base, finished, tmp_path):
    with pytest.raises(Stopped):
        main.run(values(pairs, base, **METHODS[name]), tmp_path / 'run', stop=StopAtTwo())
    main.run(values(pairs, base, **METHODS[name]), tmp_path / 'run')
    assert lines_of(tmp_path / 'run') == lines_of(finished(name))
    one, other = (checkpoint.read_about(run / 'checkpoints/4')['leaves'] for run in (tmp_path / 'run', finished(name)))
    assert one == other


@pytest.mark.parametrize('name', [name for name in METHODS if 'precomputed' in name])
def test_precomputed_is_the_network(name, finished):
    """The same numbers from another compiled program, so up to the rounding of float32, which steps add up."""
    ours, other = finished(name), finished(name.removesuffix(', precomputed'))
    for one, wanted in zip(lines_of(ours), lines_of(other), strict=True):
        assert one.keys() == wanted.keys()
        for key, value in wanted.items():
            expected = value if value is None else pytest.approx(value, rel=1e-5, abs=2e-5)  # None: no meaning here
            assert one[key] == expected, key
    both = [checkpoint.read_params(run / 'checkpoints/4')[0] for run in (ours, other)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *both)
    about = checkpoint.read_about(ours / 'checkpoints/4')
    assert about['reference'] and not any('reference' in leaf for leaf in about['leaves'])
    assert not (ours / 'frozen/1').exists() and (ours / 'frozen').exists() == ('lora' in name)


def test_it_learns_pairs_that_were_held_out(finished):
    lines = lines_of(finished('sigmoid'))
    first, last = ([line for line in lines if 'eval/loss' in line][i] for i in (0, -1))
    assert lines[0]['train/loss'] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(lines[0]['train/margin']) < 1e-6 and lines[0]['train/kl'] < 1e-9
    assert last['eval/accuracy'] > 0.9 and last['eval/margin'] > first['eval/margin'] > 0
    assert last['eval/loss'] < math.log(2) and last['eval/kl'] > 0
    assert last['eval/chosen_log_prob'] > last['eval/rejected_log_prob']


def test_loss_of_ipo_at_the_start(finished):
    assert lines_of(finished('ipo, packed, accumulated'))[0]['train/loss'] == pytest.approx(25, rel=1e-6)


def test_the_reference_is_the_network_of_the_start(base, finished):
    start = dict(trees.named_leaves(hf_llama.read(base)[1]))
    for name in ('sigmoid', 'lora'):
        for leaf_name, leaf in trees.named_leaves(frozen.read_reference(finished(name))):
            np.testing.assert_array_equal(leaf, start[leaf_name], err_msg=leaf_name)
    assert [path.name for path in (finished('lora') / 'frozen').iterdir() if path.is_dir()] == ['0']


@pytest.mark.parametrize(
    'mesh',
    [pytest.param({'mesh.data': 4}, marks=pytest.mark.slow), {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}],
    ids=str,
)
def test_devices_change_nothing(mesh, pairs, base, finished, tmp_path):
    name = 'ipo, packed, accumulated'
    main.run(values(pairs, base, **METHODS[name] | {'accumulate': 1} | mesh), tmp_path / 'run')
    for one, other in zip(lines_of(tmp_path / 'run'), lines_of(finished(name)), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, float):
                assert value == pytest.approx(other[key], rel=1e-4, abs=1e-4), key


@pytest.mark.parametrize('name', ['ipo, packed, accumulated', 'ipo, packed, accumulated, precomputed'])
def test_tools_read_the_run(name, finished):
    run = finished(name)
    wanted = lines_of(run)[-1]
    assert evaluate.main(['--checkpoint', str(run), '--out', str(run / 'results.json')]) == 0
    results = json.loads((run / 'results.json').read_text())
    for name in ('loss', 'accuracy', 'margin', 'chosen_log_prob', 'rejected_log_prob', 'kl'):
        assert results[f'eval/{name}'] == pytest.approx(wanted[f'eval/{name}'], rel=1e-4)
    [row] = inspect.inspect(run, 1, 1)
    assert row['sides'][:2] == ['chosen', 'rejected'] and len(row['sides']) == len(row['text'])
    assert any(line.startswith('  rejected    ') for line in inspect.show(row))
    (prompt, _), (chosen, is_learned) = row['text'][0]
    assert prompt.endswith(':') and chosen.endswith('<258>') and is_learned
    assert row['text'][1] == [(prompt, False), (chosen[:-5].upper() + '<258>', True)]


def flip(path):
    """Changes a byte in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


def saved(path, network=None, log_probs=None):
    """Writes a file again with another network, or other log-probabilities of the same shape or of their own."""
    with np.load(path) as stored:
        about, found = json.loads(str(stored['about'])), stored['log_probs']
    about['network'] = network or about['network']
    found = found if log_probs is None else log_probs if log_probs.ndim else np.full_like(found, log_probs)
    np.savez(path, log_probs=found, about=np.array(json.dumps(about)))


class TestKeptLogProbs:
    """`<run>/reference/*.npz`: read by runs that go on and by tools, and made again, the same, from `init_from`."""

    @pytest.fixture
    def run(self, finished, tmp_path):
        """A run whose last checkpoint is lost."""
        run = tmp_path / 'run'
        shutil.copytree(finished('sigmoid, precomputed'), run)
        shutil.rmtree(run / 'checkpoints/4')
        return run

    def go_on(self, run, pairs, base, **changes):
        main.run(values(pairs, base, **METHODS['sigmoid, precomputed'] | changes), run)
        return checkpoint.read_about(run / 'checkpoints/4')['leaves']

    def test_it_is_not_computed_twice(self, run, pairs, base, finished, monkeypatch):
        monkeypatch.setattr(references, 'log_probs_of', None)
        wanted = checkpoint.read_about(finished('sigmoid, precomputed') / 'checkpoints/4')['leaves']
        assert self.go_on(run, pairs, base, init_from='hf:gone') == wanted
        assert evaluate.main(['--checkpoint', str(run)]) == 0

    def test_it_is_made_again(self, run, pairs, base, finished):
        shutil.rmtree(run / 'reference')
        wanted = finished('sigmoid, precomputed')
        assert self.go_on(run, pairs, base) == checkpoint.read_about(wanted / 'checkpoints/4')['leaves']
        for name in ('train', 'validation'):
            one, other = (np.load(folder / f'reference/{name}.npz')['log_probs'] for folder in (run, wanted))
            np.testing.assert_array_equal(one, other)

    def test_another_split_is_computed(self, run, finished):
        results = {}
        for name in ('sigmoid', 'sigmoid, precomputed'):
            out = run.parent / 'results.json'
            given = ['--checkpoint', str(finished(name)), '--split', 'all', '--out', str(out)]
            assert evaluate.main(given) == 0
            results[name] = json.loads(out.read_text())
        one, other = ({key: value for key, value in found.items() if '/' in key} for found in results.values())
        assert one == pytest.approx(other, rel=1e-5, abs=2e-5)

    DAMAGE = {
        'flipped': (lambda path: flip(path), 'train.npz: damaged.*remove it'),
        'empty': (lambda path: path.write_bytes(b''), 'train.npz: damaged.*remove it'),
        'a folder': (lambda path: (path.unlink(), path.mkdir()), 'it is a folder'),
        'of other rows': (
            lambda path: shutil.copy(path.with_name('validation.npz'), path),
            'train.npz is of other rows: remove it',
        ),
        'of another network': (
            lambda path: saved(path, network='0'), 'train.npz is of another reference network: remove it',
        ),
        'not finite': (lambda path: saved(path, log_probs=np.float32(np.nan)), 'damaged'),
        'of another shape': (lambda path: saved(path, log_probs=np.zeros((2, 3), np.float32)), 'damaged'),
        'without a part': (lambda path: np.savez(path, log_probs=np.zeros(3)), 'damaged'),
    }  # fmt: skip

    @pytest.mark.parametrize('change, words', DAMAGE.values(), ids=DAMAGE)
    def test_a_file_that_cannot_be_used(self, change, words, run, pairs, base):
        change(run / 'reference/train.npz')
        with pytest.raises(CheckpointError, match=words):
            self.go_on(run, pairs, base)

    def test_start_that_is_another_now(self, run, pairs, base, finished):
        shutil.rmtree(run / 'reference')
        with pytest.raises(
            CheckpointError,
            match='reference lacks log-probabilities of the reference; .*=.* has other weights than that',
        ):
            self.go_on(run, pairs, base, init_from=str(finished('sigmoid')))

    def test_resumed_elsewhere(self, pairs, base, run, tmp_path):
        """The files of the earlier run are taken, without the network."""
        changes = METHODS['sigmoid, precomputed'] | {'init_from': '', 'resume_from': str(run)}
        main.run(values(pairs, base, **changes), tmp_path / 'other')
        for name in ('train', 'validation'):
            one, other = (np.load(folder / f'reference/{name}.npz') for folder in (run, tmp_path / 'other'))
            np.testing.assert_array_equal(one['log_probs'], other['log_probs'])


def result_of(job, run, tmp_path, *options):
    """The entry of an analysis of the run's whole validation split."""
    assert job.main(['--checkpoint', str(run), '--tokens', '100000', '--out', str(tmp_path), *options]) == 0
    return json.loads((tmp_path / 'result.json').read_text())['results'][0]


@pytest.mark.parametrize('name', ['sigmoid', 'sigmoid, precomputed', 'lora', 'ipo, packed, accumulated'])
def test_analyses_measure_the_loss_of_the_task(name, finished, tmp_path):
    """Without a layer it is that of the network without it: the reference keeps all of its layers."""
    run = finished(name)
    wanted = lines_of(run)[-1]['eval/loss']
    loss = result_of(drop, run, tmp_path / 'drop')['metrics']['loss']
    assert loss['value'] == pytest.approx(wanted, rel=1e-5)
    loaded = weights.load(run)
    without, task, rows = weights.without_layers(loaded, [2]), *opened(loaded, run)
    batch = rows.batch(range(len(rows)))
    ours = dataclasses.replace(task, model=without.model)
    kept = None if 'precomputed' in name else frozen.read_reference(run)
    compared = task.log_probs(kept, batch) if kept else batch['reference_log_probs']
    ours = dataclasses.replace(ours, preference=dataclasses.replace(ours.preference, reference='precomputed'))
    found = ours.losses(without.params, batch | {'reference_log_probs': compared})
    change = loss['drop']['1']['mean'][1]
    assert abs(change) > 1e-4 or name == 'lora'
    assert change == pytest.approx(float(found.sum / found.weight) - wanted, abs=1e-5)

    size = ['--rows', str(len(rows)), '--batch_size', str(len(rows))]
    norms = result_of(gradients, run, tmp_path / 'gradients', *size)['layers']['mean']
    context = Context(reference=kept)

    def mean(params):
        found = task.losses(params, batch, context)
        return found.sum / found.weight

    gradient = jax.grad(mean)(loaded.params)
    np.testing.assert_allclose(norms, trees.layer_norms(gradient)[0], rtol=1e-4)


def opened(loaded, run):
    """The task of a run and the rows of its validation split, with what a reference said of them."""
    task = build.from_config(loaded.config, loaded.model)
    rows = data_rows.open_rows_of_run(run, loaded.config, 'validation', loaded.tokenizer)
    if task.precomputed:
        rows = pairs_of.WithReference(rows, np.load(run / 'reference/validation.npz')['log_probs'])
    return task, rows


def test_plain_text_is_measured_by_language_modelling(finished, tmp_path):
    (tmp_path / 'a.txt').write_text('\n\n'.join(WORDS * 40))
    found = result_of(drop, finished('sigmoid'), tmp_path / 'out', '--text', str(tmp_path / 'a.txt'))
    assert {'loss', 'perplexity'} == {*found['metrics']}


@pytest.mark.parametrize('name', ['sigmoid', 'sigmoid, precomputed'])
def test_replay(name, finished, tmp_path, capsys):
    """The batch of step 3 with the weights before it has the loss and the gradient of step 3."""
    run = tmp_path / 'run'
    shutil.copytree(finished(name), run)
    shutil.copytree(run / 'checkpoints/2', run / 'debug/checkpoints/2')
    loaded = weights.load(run)
    rows = data_rows.open_rows_of_run(run, loaded.config, 'train', loaded.tokenizer)
    if 'precomputed' in name:
        rows = pairs_of.WithReference(rows, np.load(run / 'reference/train.npz')['log_probs'])
    size = loaded.config.batch_size
    np.savez(run / 'debug/batch_3.npz', **batches.batch_at(rows, 0, np.arange(size) + 2 * size))
    assert replay.main(['--workdir', str(run)]) == 0
    shown, line = capsys.readouterr().out, lines_of(run)[2]
    assert float(re.search(r'mean ([\d.]+)', shown)[1]) == pytest.approx(line['train/loss'], abs=1e-4)
    norms = [float(row.split()[-1]) for row in shown.splitlines() if re.match(r' +\d  ', row)]
    assert norms == pytest.approx(line['layers/grad_norm'], rel=1e-4)


KEYS = {
    'no start': ({'init_from': ''}, 'config.task.name=preference needs config.init_from'),
    'smoothed ipo': (
        {'task.preference.loss': 'ipo', 'task.preference.label_smoothing': 0.1},
        'config.task.preference.label_smoothing has no meaning for config.task.preference.loss=ipo',
    ),
    'bert': ({'model.family': 'bert', 'model.num_positions': 32}, 'needs a network that predicts the next token'),
    'too short': ({'seq_length': 3}, 'config.seq_length=3 is too short for a pair: at least 4'),
    'concat': ({'data.mode': 'concat'}, 'config.task.name=preference needs config.data.mode=pad or pack, not concat'),
    'beta': ({'task.preference.beta': 0.0}, 'config.task.preference.beta'),
    'half wrong': ({'task.preference.label_smoothing': 0.5}, 'config.task.preference.label_smoothing'),
}  # fmt: skip


@pytest.mark.parametrize('changes, words', KEYS.values(), ids=KEYS)
def test_keys_that_contradict(changes, words, pairs, base, tmp_path):
    with pytest.raises(UsageError, match=words):
        main.run(values(pairs, base, **changes), tmp_path / 'run')


def test_recipe():
    config = configs.build(recipes.load(str(ROOT / 'configs/preferences/dpo_quickstart.py'), []))
    assert build.from_config(config, families.from_config(config.model)).headline == 'accuracy'
    start = configs.build(recipes.load(str(ROOT / 'configs/finetune/quickstart.py'), [])).model
    assert all(getattr(config.model, key) == getattr(start, key) for key in configs.same_weights())

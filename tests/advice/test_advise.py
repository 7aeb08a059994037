"""The runs of the adviser: which ones it makes, given those before; and real ones, stopped and continued."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mixln_jax import advise
from mixln_jax.advice.runner import Runner
from mixln_jax.system import errors

RECIPE = """
from mixln_jax import config
def get_config():
    c = config.default()
    c.batch_size, c.seq_length, c.num_steps, c.compute_dtype, c.device = 4, 16, 1000, 'float32', 'cpu'
    c.model.update(vocab_size=259, hidden_size=16, intermediate_size=24, num_layers=4, num_heads=2, post_ratio=0.5)
    c.data.update(source='stdlib', tokenizer='bytes')
    c.optim.update(learning_rate=1e-3, warmup_steps=40)
    c.mesh.data = 1
    return c
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / 'tiny.py'
    path.write_text(RECIPE)
    return str(path)


@pytest.fixture
def trained(monkeypatch):
    """The names of runs as they are made. A run collapses once its rate is above 0.01 / (Post-LN layers),
    with seed S above the share 1 / (S + 1) of that."""
    names = []

    def train(self, trial):
        names.append(trial.name)
        folder = self._workdir / trial.name
        folder.mkdir()
        lines, best = [], 0.01 / trial.setting.post_layers / (1 + (trial.seed or 0))
        for step in range(5, trial.steps + 1, 5):
            rate = trial.rate * min(1, step / trial.warmup)
            distance = 0.0 if rate > best or lines and not lines[-1]['stability/entropy_distance'] else 0.3
            lines.append({'step': step, 'train/loss': 3.3 * (1 - distance), 'train/learning_rate': rate,
                          'stability/entropy_distance': distance})  # fmt: skip
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        return 0, ''

    monkeypatch.setattr(Runner, '_train', train)
    return names


def test_advice(recipe, trained, tmp_path, capsys):
    words = ['--config', recipe, '--workdir', str(tmp_path / 'a'), '--to', '0.05']
    assert advise.main(words) == 0
    out = capsys.readouterr().out
    assert 'at most 10 runs with 2,400 steps: for each of 2 settings a ramp of 240 steps to 0.05' in out
    assert '2 of 4 layers Post-LN (post_ratio=0.5): trains at a peak rate of 0.0021' in out
    assert 'most Post-LN layers that trained: --config.model.post_ratio=0.5 --config.optim.learning_rate=0.0021' in out
    assert (
        'not tried at all: steps 241 to 1,000 of the recipe, the decay of the rate, other seeds' in out
        and 'stable' not in out
    )
    advice = json.loads((tmp_path / 'a/advice.json').read_text())
    two, one = advice['settings']
    assert (two['post_layers'], one['post_layers']) == (2, 1) and two['learning_rate'] == 0.0021
    assert two['ramp']['upper_bound'] == pytest.approx(0.00418, rel=0.01) and one['ramp']['upper_bound'] < 0.0101
    assert trained[:2] == ['post0.5-ramp-0.05-240', 'post0.5-rate-warmup40-0.0021-240'] and len(trained) == 4
    assert 'rate 0.001, as a higher one trained' in two['not_tried']
    assert advise.main(words) == 0 and len(trained) == 4  # nothing is done twice
    assert capsys.readouterr().out == out
    assert advise.main([*words, '--config.seed=1']) == 2
    assert 'is of another recipe or other keys; give another --workdir' in capsys.readouterr().err


def test_rates_that_collapse_and_a_limit_of_steps(recipe, trained, tmp_path, capsys):
    words = ['--config', recipe, '--workdir', str(tmp_path / 'a'), '--ratios', '1', '--to', '0.002', '--steps', '800']
    assert advise.main([*words, '--rates', '0.001,0.1,0.02,0.0005']) == 0
    out = capsys.readouterr().out
    assert 'no collapse, so there is no upper bound' in out  # 4 layers: up to 0.0025
    assert 'rate 0.1: collapsed at' in out and 'rate 0.02: collapsed' in out and 'no rate trained' in out
    assert 'not tried: rate 0.001 (--steps 800)' in out and '--config.optim.learning_rate' not in out
    assert advise.main([*words, '--ratios', '1,0.5', '--steps', '300', '--workdir', str(tmp_path / 'b')]) == 0
    assert 'not tried: everything (300 steps were allowed)' in capsys.readouterr().out


def test_keys_that_the_runs_have_their_own_values_of(recipe, trained, tmp_path, capsys):
    words = ['--config', recipe, '--workdir', str(tmp_path / 'a'), '--ratios', '1', '--config.collapse=stop']
    assert advise.main([*words, '--config.optim.schedule=wsd', '--config.log_every=9']) == 0
    said = 'mixln_jax: warning: config.optim.schedule=wsd, config.log_every=9: these runs have their own values\n'
    assert capsys.readouterr().err == said
    assert advise.main([*words, '--workdir', str(tmp_path / 'a/post1-ramp-0.05-240')]) == 2
    assert 'holds metrics.jsonl, which is not of an adviser' in capsys.readouterr().err
    assert advise.main(words) == 2  # other keys


def test_a_rate_has_to_train_with_all_seeds(recipe, trained, tmp_path, capsys):
    words = ['--config', recipe, '--workdir', str(tmp_path / 'a'), '--ratios', '1', '--to', '0.002', '--seeds', '3']
    assert advise.main([*words, '--rates', '0.001,0.0015,0.0008']) == 0  # up to 0.0025, 0.00125 and 0.00083
    out = capsys.readouterr().out
    assert 'at most 10 runs' in out and 'until those of a rate with all 3 seeds train' in out
    names = [f'post1-rate-warmup40-{rate:g}-240-seed{seed}' for rate, seeds in ((0.0015, 2), (0.001, 3), (0.0008, 3))
             for seed in range(seeds)]  # fmt: skip
    assert trained[1:] == names
    assert 'rate 0.0015, seed 1: collapsed' in out and 'at a peak rate of 0.0008 with 3 seeds, as far as tried' in out
    assert "at the recipe's own rate, 0.001: collapsed" in out
    runs = json.loads((tmp_path / 'a/advice.json').read_text())['settings'][0]['runs']
    assert [run['seed'] for run in runs] == [0, 1, 0, 1, 2, 0, 1, 2]
    words_of = json.loads((tmp_path / 'a/post1-rate-warmup40-0.0015-240-seed1.json').read_text())['overrides']
    assert {'--config.seed=1', '--config.data.seed=1'} <= {*words_of}
    assert advise.main([*words, '--rates', '0.0008', '--steps', '600', '--workdir', str(tmp_path / 'b')]) == 0
    out = capsys.readouterr().out
    assert 'no rate trained' in out and 'not tried: rate 0.0008, seed 1 (--steps 600)' in out


def test_errors_of_runs_are_passed_on(recipe, tmp_path, capsys):
    words = ['--config', recipe, '--workdir', str(tmp_path / 'a'), '--config.data.source=text']
    assert advise.main([*words, f'--config.data.path={tmp_path}/none']) == errors.DataError.code
    captured = capsys.readouterr()
    assert 'none' in captured.err and 'post0.5-ramp-0.05-240.txt has all that it printed' in captured.err
    assert captured.err.count('\n') == 1


@pytest.mark.slow
def test_a_signal_and_the_same_command_again(recipe, tmp_path):
    folder = tmp_path / 'a'
    command = [sys.executable, '-m', 'mixln_jax.advise', '--config', recipe, '--workdir', str(folder), '--to', '0.5',
               '--ramp_steps', '400', '--ratios', '0.5', '--rates', '0.001']  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = folder / 'post0.5-ramp-0.5-400/metrics.jsonl'
        while process.poll() is None and not (lines.exists() and lines.read_text().count('\n') > 2):
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait() == errors.STOPPED
    assert not (folder / 'advice.json').exists() and lines.exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'goes on from step' in (folder / 'post0.5-ramp-0.5-400.txt').read_text()
    runs = json.loads((folder / 'advice.json').read_text())['settings'][0]['runs']
    assert [one['learning_rate'] for one in runs] == [0.001]

"""Runs of each method that are killed or stopped end as undisturbed ones, bit for bit."""

import random
import signal
import time

import killed_runs
import pytest

PAIRS = {'task.name': 'preference', 'data.template': 'plain', 'data.mode': 'pack', 'seq_length': 96}
IMAGES = {
    'num_epochs': 0.0,
    'data.workers': 2,
    'data.images.policy': 'randaug(2,10)',
    'data.images.erasing': 0.25,
    'task.classification.mixup': 0.8,
    'task.classification.cutmix': 1.0,
}
REWARD = PAIRS | {'task.name': 'reward', 'tune.method': 'lora', 'tune.rank': 4}
METHODS = {
    'full': {},
    'lisa': {'tune.method': 'lisa', 'tune.layers': 1},
    'pairs, precomputed': PAIRS | {'task.preference.reference': 'precomputed'},
    'reward, lora': REWARD,
    'pairs, lora, precomputed': PAIRS
    | {'task.preference.reference': 'precomputed', 'tune.method': 'lora', 'tune.rank': 4, 'tune.dropout': 0.1},
}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A run whose weights are to be fine-tuned."""
    folder = tmp_path_factory.mktemp('base') / 'run'
    killed_runs.finish(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_kills_and_signals(method, base, tmp_path, monkeypatch):
    monkeypatch.setattr(killed_runs, 'CHANGES', killed_runs.CHANGES | METHODS[method] | {'init_from': base})
    killed_and_compared(tmp_path, method)


@pytest.mark.slow
def test_images(tmp_path, monkeypatch):
    """A ViT whose images are varied by 2 workers, and mixed."""
    apart = ('seq_length', 'eval.tokens')
    text = {name: value for name, value in killed_runs.CHANGES.items() if name not in apart}
    monkeypatch.setattr(killed_runs, 'CHANGES', text | IMAGES)
    monkeypatch.setattr(killed_runs, 'RECIPE', 'configs/vit_quickstart.py')
    killed_and_compared(tmp_path, 'images')


def killed_and_compared(tmp_path, method):
    killed_runs.finish(tmp_path / 'whole')
    run, rng = tmp_path / 'run', random.Random(method)
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process, log = killed_runs.start(run)
        killed_runs.wait_for(process, log, 'step ', log.stat().st_size)
        time.sleep(rng.uniform(0, 1))
        process.send_signal(number)
        process.wait(timeout=120)
    killed_runs.finish(run)
    killed_runs.assert_same_run(run, tmp_path / 'whole')

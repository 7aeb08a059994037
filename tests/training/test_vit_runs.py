"""A ViT that trains on images: it learns, resumes bitwise, and is evaluated and analysed; what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest

from mixln_jax import config as configs
from mixln_jax import evaluate, main
from mixln_jax.analysis import angular, drop, gradients, variance
from mixln_jax.report import command as report
from mixln_jax.runs import weights
from mixln_jax.system.errors import UsageError

KEYS = {
    'task.name': 'classification', 'model.family': 'vit', 'model.image_size': 8, 'model.patch_size': 4,
    'model.num_classes': 10, 'model.hidden_size': 16, 'model.intermediate_size': 32, 'model.num_layers': 2,
    'model.num_heads': 2, 'model.norm_position': 'mix', 'model.post_ratio': 0.5, 'data.source': 'digits',
    'data.held_out': 0.2, 'data.images.flip': 0.0, 'data.images.eval_crop': 1.0, 'data.images.min_area': 0.6,
    'compute_dtype': 'float32', 'batch_size': 16, 'num_steps': 6, 'eval.every': 3, 'eval.tokens': 10**6,
    'checkpoint.every': 3, 'analysis.every': 0, 'analysis.tokens': 0, 'optim.learning_rate': 1e-2, 'log_every': 1,
    'task.classification.mixup': 0.2, 'task.classification.label_smoothing': 0.1, 'mesh.data': 1,
}  # fmt: skip
DEFAULTS = configs.flatten(configs.Config())
TEXT = {  # nothing that is for images alone
    key: DEFAULTS[key] for key in KEYS if key.startswith(('task.classification.', 'data.images.', 'data.held_out'))
}


def run_of(**changes):
    values = configs.default()
    values.update_from_flattened_dict(KEYS | changes)
    return values


def lines(folder):
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def params(folder):
    return weights.load(folder).params


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs') / 'vit'
    main.run(run_of(), folder)
    return folder


def test_what_is_recorded(trained):
    last = lines(trained)[-1]
    assert {'train/accuracy', 'train/top5', 'eval/loss', 'eval/accuracy', 'eval/top5'} <= last.keys()
    assert last['train/positions_per_step'] == last['train/tokens_per_step'] == 16 * 4
    held_out = json.loads((trained / 'environment.json').read_text())['eval_data']
    assert held_out['split'] == 'validation' and held_out['classes'] == 10
    assert not (trained / 'tokenizer').exists()


def test_resumed_bitwise(trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run/checkpoints/6')
    main.run(run_of(), tmp_path / 'run')
    assert lines(tmp_path / 'run')[-1]['train/loss'] == lines(trained)[-1]['train/loss']
    for one, other in zip(*(jax.tree.leaves(params(folder)) for folder in (trained, tmp_path / 'run')), strict=True):
        np.testing.assert_array_equal(one, other)


def test_meshes_and_micro_batches(trained, tmp_path):
    """8 devices and two micro-batches make the same updates, mixed images and all."""
    keys = {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2, 'accumulate': 2}
    main.run(run_of(**keys), tmp_path / 'run')
    for name in ('train/loss', 'train/grad_norm', 'train/accuracy'):
        one, other = ([line[name] for line in lines(folder)] for folder in (trained, tmp_path / 'run'))
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_evaluated_as_in_training(trained, capsys):
    assert evaluate.main(['--checkpoint', str(trained)]) == 0
    last = lines(trained)[-1]
    assert f'{last["eval/loss"]:.4f}'[:5] in capsys.readouterr().out


@pytest.mark.parametrize('job', [angular, drop, gradients, variance], ids=lambda job: job.NAME)
def test_analysed(job, trained):
    assert job.main(['--checkpoint', str(trained), '--tokens', '256', '--batch_size', '8']) == 0
    result = json.loads((trained / 'analysis' / job.NAME / 'result.json').read_text())
    assert '"tokens": 256' in json.dumps(result)


def test_it_learns(tmp_path):
    """Of 360 digits that were held out far more than a tenth are read."""
    keys = {'num_steps': 150, 'eval.every': 0, 'checkpoint.every': 0, 'log_every': 50, 'batch_size': 64}
    keys |= {'task.classification.mixup': 0.0, 'optim.learning_rate': 3e-3, 'data.images.crop': 'none'}
    main.run(run_of(**keys), tmp_path / 'run')
    assert lines(tmp_path / 'run')[-1]['eval/accuracy'] > 0.6


@pytest.mark.parametrize(
    'changes, match',
    [
        ({'model.num_classes': 7}, 'config.model.num_classes=7, but the images have 10 classes'),
        ({'seq_length': 64}, 'config.seq_length=64 has no meaning for config.task.name=classification'),
        ({'compat': 'official'}, 'config.compat=official has no meaning'),
        (
            {'eval.samples': 2, 'model.hidden_size': 12},
            'config.eval.samples=2 has no meaning: this network reads images',
        ),
        (TEXT | {'task.name': 'language'}, 'config.task.name=language needs a network that reads texts'),
        (TEXT | {'task.name': 'masked_language'}, 'config.task.name=masked_language needs a network that reads texts'),
        ({'data.source': 'stdlib'}, 'config.data.source=stdlib has no images'),
        ({'model.image_size': 10}, 'config.model.image_size=10 is not divisible by config.model.patch_size=4'),
    ],
)
def test_refused(changes, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        main.run(run_of(**changes), tmp_path / 'run')


def test_options_of_text_are_refused(trained, capsys):
    assert drop.main(['--checkpoint', str(trained), '--seq_length', '8']) == 2
    assert '--seq_length has no meaning' in capsys.readouterr().err


@pytest.fixture(scope='module')
def results(trained):
    """What `evaluate --out` writes, into the folder of the run."""
    assert evaluate.main(['--checkpoint', str(trained), '--out', str(trained / 'classes.json')]) == 0
    return json.loads((trained / 'classes.json').read_text())


class TestByClass:
    def test_sums(self, results, trained):
        """Accuracies and mistakes of the classes are those of all images, which the run has evaluated too."""
        classes = results['classes']
        images = sum(one['images'] for one in classes)
        assert images == results['eval/tokens'] // 4 and [one['class'] for one in classes] == [*'0123456789']
        right = sum(one['accuracy'] * one['images'] for one in classes)
        assert (
            right / images
            == pytest.approx(results['eval/accuracy'])
            == pytest.approx(lines(trained)[-1]['eval/accuracy'])
        )
        for one in classes:
            assert sum(one['taken_for'].values()) == round((1 - one['accuracy']) * one['images'])
            assert one['class'] not in one['taken_for']

    def test_report(self, results, trained, tmp_path, capsys):
        worst = min(results['classes'], key=lambda one: one['accuracy'])
        assert report.main([str(trained), '--out', str(tmp_path / 'report')]) == 0
        assert '| 96 ' in capsys.readouterr().out  # images
        text = (tmp_path / 'report/report.md').read_text()
        row = next(line for line in text.splitlines() if 'taken for' in line.partition('\n')[0])
        after = text.partition(row)[2].splitlines()[2]
        cells = [cell.strip() for cell in after.split('|')[1:-1]]
        assert cells[:4] == ['vit', worst['class'], f'{worst["accuracy"]:.4f}', str(worst['images'])]
        first, count = next(iter(worst['taken_for'].items()))
        assert cells[4].startswith(f'{first} ({count})')
        assert 'top 5' in text and 'perplexity' not in text.partition('## Classes')[0]

    @pytest.mark.parametrize(
        'content, code',
        [('[1]', 5), ('{', 5), ('{"classes": 3}', 0), ('{"classes": [3, {"accuracy": "x"}, {"images": 1}]}', 0),
         ('{"classes": [{"accuracy": 0.5, "images": 2, "taken_for": [1]}]}', 0),
         ('{"classes": [{"class": ["a"], "accuracy": 1e999, "images": 2, "taken_for": {"a": "b"}}]}', 0),
         ('{"classes": [{"class": "a", "accuracy": 0, "images": 1, "taken_for": {"b": null, "c": 2}}]}', 0)],
    )  # fmt: skip
    def test_malformed(self, trained, tmp_path, capsys, content, code):
        shutil.copytree(trained, tmp_path / 'run')
        (tmp_path / 'run/classes.json').write_text(content)
        assert report.main([str(tmp_path / 'run'), '--out', str(tmp_path / 'report')]) == code
        error = capsys.readouterr().err
        assert 'internal' not in error and (code == 0 or 'classes.json' in error)


def test_lines_for_people_count_images(tmp_path, capsys):
    main.run(run_of(num_steps=1, **{'analysis.tokens': 64}), tmp_path / 'run')
    shown = capsys.readouterr().out
    assert 'analyses on 16 images' in shown and '(374 images)' in shown and 'img/s/device' in shown
    assert 'token' not in shown

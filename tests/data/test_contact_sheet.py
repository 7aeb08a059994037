"""What a step of a run on images saw, by data.inspect."""

import dataclasses
import io
import json

import numpy as np
import pictures
import pytest
from PIL import Image

from mixln_jax import config as configs
from mixln_jax.data import batches, inspect
from mixln_jax.data.images import contact_sheet, examples


@pytest.fixture
def run(tmp_path):
    """The folder of a run on a small set."""
    path = pictures.write_folder(tmp_path / 'set', pictures.set_of())
    data = configs.Data(source='images', path=str(path), held_out=0.0, seed=3)
    config = dataclasses.replace(
        configs.Config(), batch_size=5, data=data, model=configs.Model(family='vit', image_size=16, num_classes=3)
    )
    values = configs.public(config)
    values['model'] |= {'norm_position': ['pre'] * config.model.num_layers}
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(values))
    seen = {'data': examples.open_examples(data, 'train', 16).fingerprint}
    (folder / 'environment.json').write_text(json.dumps(seen))
    return folder, data


def test_rows_and_sheet(run, capfd):
    folder, data = run
    assert inspect.main(['--workdir', str(folder), '--step', '3', '--rows', '0', '--json']) == 0
    out, err = capfd.readouterr()
    assert f'5 images of step 3: {folder}/inspect/step_3.png' in err
    found = [json.loads(line) for line in out.splitlines()]
    made = examples.open_examples(data, 'train', 16)
    batch = batches.training(made, seed=3, batch_size=5)[2]
    assert [row['label'] for row in found] == batch['labels'].tolist()
    for row in found:
        assert row['origin'].endswith('.jpg') and f'/{row["class"]}/' in row['origin']
    sheet = np.asarray(Image.open(folder / 'inspect/step_3.png'))
    assert sheet.shape == (2 * (96 + 14 + 4) + 4, 3 * 100 + 4, 3)
    for i, pixels in enumerate(batch['images']):
        top, left = 4 + i // 3 * 114, 4 + i % 3 * 100
        np.testing.assert_array_equal(sheet[top : top + 96 : 6, left : left + 96 : 6], pixels)
        assert (sheet[top + 96 : top + 110, left : left + 96] < 100).any()  # its class


def test_lines(run, capfd, tmp_path):
    folder, _ = run
    words = ['--workdir', str(folder), '--step', '1', '--rows', '2', '--out', str(tmp_path / 'a.png')]
    assert inspect.main(words) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith('0: ') and lines[0].endswith(')')
    assert (tmp_path / 'a.png').exists() and not (folder / 'inspect').exists()


def test_other_data(run, capfd):
    folder, data = run
    (folder.parent / 'set/cat/new.jpg').write_bytes(pictures.plain('cat'))
    assert inspect.main(['--workdir', str(folder), '--step', '1']) == 4
    assert 'is not what the run in' in capfd.readouterr().err


def test_moved_data(run, capfd):
    folder, data = run
    (folder.parent / 'set').rename(folder.parent / 'elsewhere')
    assert inspect.main(['--workdir', str(folder), '--step', '1']) == 4
    words = ['--workdir', str(folder), '--step', '1', '--data_path', str(folder.parent / 'elsewhere')]
    assert inspect.main(words) == 0


@pytest.mark.parametrize('count, side', [(1, 224), (3, 1), (60, 224)])
def test_sheets_of_any_size(monkeypatch, count, side):
    monkeypatch.setattr(contact_sheet, 'LONGEST', 1000)
    content = contact_sheet.draw(np.zeros((count, side, side, 3), np.uint8), ['ä' * 99] * count)
    assert max(Image.open(io.BytesIO(content)).size) <= 1100

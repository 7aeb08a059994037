"""timm itself on the folders that `export --format timm` writes; `pip install timm`, which brings torchvision."""

import hf_folders
import numpy as np
import pytest
import torch

from mixln_jax.models import vit
from mixln_jax.models.hf import vit as hf_vit

timm = pytest.importorskip('timm')
KINDS = [
    dict(pool='tok', positions='learned'),
    dict(pool='tok', pixels='imagenet', gelu='tanh'),
    dict(hidden_size=28, intermediate_size=15),
]


@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_timm_opens_it(tmp_path, kind):
    keys = dict(hidden_size=16, intermediate_size=24, num_heads=2, image_size=12, patch_size=4, num_classes=5)
    model, params = hf_folders.network('pre', family='vit', **keys | kind)
    hf_vit.save(tmp_path / 'out', model, params, names=list('abcde'), layout='timm')
    theirs = timm.create_model(f'local-dir:{tmp_path}/out', pretrained=True).eval()
    assert list(theirs.pretrained_cfg['label_names']) == list('abcde')
    images = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3)).astype(np.uint8)
    settings = timm.data.resolve_model_data_config(theirs)
    assert settings['input_size'] == (3, 12, 12)
    mean, deviation = (np.array(settings[name], np.float32) for name in ('mean', 'std'))
    pixels = torch.tensor(((images / np.float32(255) - mean) / deviation).transpose(0, 3, 1, 2))
    np.testing.assert_allclose(vit.normalized(images, model.config.pixels), pixels.permute(0, 2, 3, 1), atol=1e-6)
    logits, _ = model.apply({'params': params}, {'images': images})
    np.testing.assert_allclose(logits, theirs(pixels).detach(), rtol=0, atol=1e-4)

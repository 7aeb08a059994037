"""Writes the folders next to this file: two small networks of timm, and what it computes from them.

pip install timm==1.0.31 && python tests/golden/timm/make.py

`expected.npz` has `images` [3,12,12,3], `labels` [3], `logits` [3,5] and `grad/<tensor name>`, of the mean loss.
"""

import pathlib

import numpy as np
import timm
import timm.models
import torch

HERE = pathlib.Path(__file__).parent
SIZES = dict(img_size=12, patch_size=4, num_classes=5, embed_dim=12, num_heads=3, depth=2, mlp_ratio=20 / 12)
KINDS = {'token': {}, 'avg': dict(class_token=False, global_pool='avg', fc_norm=False, act_layer='gelu_tanh')}


def make(folder, kind):
    torch.manual_seed(0)
    pixels = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    model = timm.create_model('vit_tiny_patch16_224', **SIZES, **kind, pretrained_cfg_overlay=pixels).eval()
    with torch.no_grad():  # no bias or gain is that which it starts with
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    images = np.random.default_rng(1).integers(0, 256, (3, 12, 12, 3)).astype(np.uint8)
    labels = np.array([0, 3, 4])
    logits = model(torch.tensor(((images / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2), dtype=torch.float32))
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
    gradients = {f'grad/{name}': weight.grad.numpy() for name, weight in model.named_parameters()}
    arrays = dict(images=images, labels=labels, logits=logits.detach().numpy())
    np.savez_compressed(folder / 'expected.npz', **arrays, **gradients)


if __name__ == '__main__':
    for name, kind in KINDS.items():
        make(HERE / name, kind)

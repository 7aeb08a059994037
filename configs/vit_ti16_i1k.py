"""ViT-Ti/16 on ImageNet-1k for 90 epochs: the recipe of vit_s16_i1k.py with less augmentation.

python -m mixln_jax.main --config configs/vit_ti16_i1k.py --config.data.data_dir=data

big_vision has no recipe of this size. Width and augmentation, `light1`, are those that its vit_i1k.py lists for Ti
(Steiner et al. 2021, arXiv 2106.10270): two operations of magnitude 0, no mixup.
"""

from vit_s16_i1k import get_config as small


def get_config():
    c = small()
    c.model.update(hidden_size=192, intermediate_size=768, num_heads=3)
    c.data.images.policy, c.task.classification.mixup = 'randaug(2,0)', 0.0
    return c

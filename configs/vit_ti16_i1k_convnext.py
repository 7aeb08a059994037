"""ViT-Ti/16 on ImageNet-1k for 120 epochs: the recipe of vit_s16_i1k_convnext.py.

python -m mixln_jax.main --config configs/vit_ti16_i1k_convnext.py --config.data.data_dir=data
"""

from vit_s16_i1k_convnext import get_config as small


def get_config():
    c = small()
    c.model.update(hidden_size=192, intermediate_size=768, num_heads=3)
    return c

"""A narrow ViT on Fashion-MNIST (Xiao et al. 2017), 60,000 images of 28 x 28 pixels, for a CPU.

python -m mixln_jax.main --config configs/vit_fashion_mnist.py

Debian and Ubuntu have the files: `apt-get install dataset-fashion-mnist`.
"""

from mixln_jax import config


def get_config():
    c = config.default()
    c.task.name = 'classification'
    c.batch_size, c.num_epochs, c.log_every = 128, 10, 100
    c.compute_dtype = 'float32'  # a CPU gains nothing from bfloat16
    c.model.update(family='vit', image_size=28, patch_size=4, num_classes=10, init='xavier')
    c.model.update(hidden_size=64, intermediate_size=256, num_layers=8, num_heads=4)
    c.data.update(source='idx', path='/usr/share/datasets/fashion-mnist')
    c.data.images.update(eval_crop=1.0, min_area=0.6)
    c.optim.update(name='adamw', learning_rate=1e-3, weight_decay=0.05, clip_norm=1.0)
    c.eval.update(every=469, tokens=10**9)
    c.checkpoint.every = 469
    c.analysis.update(every=0, tokens=4096)
    return c

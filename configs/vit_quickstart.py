"""A small ViT learns to read handwritten digits: 1,797 images of 8 x 8 pixels that come with scikit-learn.

python -m mixln_jax.main --config configs/vit_quickstart.py
"""

from mixln_jax import config


def get_config():
    c = config.default()
    c.task.name = 'classification'
    c.batch_size, c.num_epochs, c.log_every = 64, 60, 50
    c.compute_dtype = 'float32'  # a CPU gains nothing from bfloat16
    c.model.update(family='vit', image_size=8, patch_size=2, num_classes=10)
    c.model.update(hidden_size=64, intermediate_size=256, num_layers=4, num_heads=4)
    c.model.update(init='xavier')  # deviations of about 0.1 at this width; 0.02 is for wider networks
    c.data.update(source='digits', held_out=0.2)
    c.data.images.update(eval_crop=1.0, min_area=0.7, flip=0.0)
    c.optim.update(name='adamw', learning_rate=2e-3, weight_decay=0.05, clip_norm=1.0, min_ratio=0.01)
    c.eval.update(every=200, tokens=100_000)
    c.checkpoint.every = 200
    c.analysis.update(every=0, tokens=2048)
    return c

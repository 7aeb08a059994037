"""ViT-S/16 on ImageNet-1k for 90 epochs: big_vision's vit_s16_i1k (Beyer et al. 2022, arXiv 2205.01580), 76.5 per cent.

python -m mixln_jax.main --config configs/vit_s16_i1k.py --config.data.data_dir=data

Theirs adds a decay of 1e-4 that the schedule alone multiplies; 0.1 times the rate of 1e-3 is the same. What differs:

- they report accuracy on the last 1 per cent of train, which stays unread here; this is that of the validation images;
- biases of the MLP begin at 0, not with a deviation of 1e-6;
- activations are in bfloat16, the weights and the second moment in float32 as theirs;
- examples come in an order of its own for each epoch, theirs from a shuffle buffer;
- crops and rotations are opencv's, not TensorFlow's;
- the placement is Mix-LN: --config.model.norm_position=pre is theirs.
"""

from mixln_jax import config


def get_config():
    c = config.default()
    c.task.name, c.task.classification.mixup = 'classification', 0.2
    c.batch_size, c.num_steps, c.num_epochs, c.log_every = 1024, 0, 90.0, 50
    c.model.update(family='vit', hidden_size=384, intermediate_size=1536, num_heads=6, num_layers=12)
    c.model.update(representation=True, gelu='tanh', init='xavier')
    c.data.update(source='tfds', name='imagenet2012', split='train[:99%]', workers=32)
    c.data.images.policy = 'randaug(2,10)'
    c.optim.update(name='adamw', learning_rate=1e-3, weight_decay=0.1, mu_dtype='bfloat16', clip_norm=1.0)
    c.optim.update(warmup_steps=10_000, min_ratio=0.0)
    c.eval.update(every=2500, tokens=10**8)  # all 50,000 images have 9,800,000 patches
    c.analysis.every = c.checkpoint.every = 2500
    return c

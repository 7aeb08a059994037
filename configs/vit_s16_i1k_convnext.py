"""ViT-S/16 on ImageNet-1k for 120 epochs: the settings of ConvNeXt (Liu et al. 2022, arXiv 2201.03545) on a plain ViT.

python -m mixln_jax.main --config configs/vit_s16_i1k_convnext.py --config.data.data_dir=data

Settings are the defaults of ConvNeXt's main.py, but for the number of epochs: 300 there. What differs:

- its color jitter of 0.4 is left out, for timm leaves it out too where RandAugment is on;
- mixup and cutmix mix an image with the one before it, timm with the one as far from the batch's end;
- the head begins at 0;
- the running average of the weights, which is off there by default, is off here;
- stochastic depth does not exist here: its rate is 0 there by default, and 0.1 in ConvNeXt-T's own command;
- the placement is Mix-LN: --config.model.norm_position=pre is that of timm's ViT.
"""

from mixln_jax import config


def get_config():
    c = config.default()
    c.task.name = 'classification'
    c.task.classification.update(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    c.batch_size, c.num_steps, c.num_epochs, c.log_every = 4096, 0, 120.0, 50
    c.model.update(family='vit', hidden_size=384, intermediate_size=1536, num_heads=6, num_layers=12)
    c.model.update(positions='learned', pool='tok', pixels='imagenet', init='normal')
    c.data.update(source='tfds', name='imagenet2012', workers=32)
    c.data.images.update(interpolation='bicubic', min_area=0.08, policy='rand-m9-mstd0.5-inc1', erasing=0.25)
    c.optim.update(name='adamw', learning_rate=4e-3, weight_decay=0.05, warmup_ratio=20 / 120, min_ratio=2.5e-4)
    c.eval.update(every=2500, tokens=10**8)  # all 50,000 images have 9,850,000 positions
    c.analysis.every = c.checkpoint.every = 2500
    return c

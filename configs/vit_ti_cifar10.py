"""ViT-Tiny with patches of 4 x 4 pixels on CIFAR-10 (Krizhevsky 2009), 100 epochs: for one GPU.

python -m mixln_jax.main --config configs/vit_ti_cifar10.py \
    --config.data.path=cifar10-train.zip --config.data.validation_path=cifar10-test.zip

Both are zip files, or folders, with a folder of images for each class. The settings are ours, of no paper.
"""

from mixln_jax import config


def get_config():
    c = config.default()
    c.task.name = 'classification'
    c.task.classification.update(mixup=0.2, label_smoothing=0.1)
    c.batch_size, c.num_steps, c.num_epochs, c.log_every = 512, 0, 100.0, 50
    c.model.update(family='vit', image_size=32, patch_size=4, num_classes=10, init='xavier')
    c.model.update(hidden_size=192, intermediate_size=768, num_heads=3, num_layers=12)
    c.data.update(source='images', path='cifar10-train.zip', validation_path='cifar10-test.zip', workers=8)
    c.data.images.update(eval_crop=1.0, min_area=0.3, policy='randaug(2,10)')
    c.optim.update(name='adamw', learning_rate=1e-3, weight_decay=0.05, clip_norm=1.0, min_ratio=0.0)
    c.eval.update(every=500, tokens=10**8)  # all images
    c.analysis.every = c.checkpoint.every = 500
    return c

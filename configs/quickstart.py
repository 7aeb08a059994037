"""A small Mix-LN LLaMA on text that comes with Python, bytes as tokens: the first run on a fresh machine.

python -m mixln_jax.main --config configs/quickstart.py
"""

from mixln_jax import config


def get_config():
    c = config.default()
    c.batch_size, c.seq_length, c.num_steps, c.log_every = 8, 128, 400, 20
    c.compute_dtype = 'float32'  # a CPU gains nothing from bfloat16
    c.model.update(vocab_size=259, hidden_size=96, intermediate_size=256, num_layers=6, num_heads=3)
    c.model.update(init_std=0.05, embed_std=0.05)  # narrow layers want larger weights
    c.data.update(source='stdlib', tokenizer='bytes', mode='concat')
    c.optim.update(learning_rate=6e-3, b2=0.95, clip_norm=1.0)  # b2: 400 steps are few
    c.eval.update(every=200, tokens=50_000)
    c.checkpoint.every = 200
    c.analysis.update(every=0, tokens=1024)
    return c

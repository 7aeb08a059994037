"""A small BERT that learns to fill in hidden bytes of the text that comes with Python.

python -m mixln_jax.main --config configs/bert_quickstart.py
"""

from mixln_jax import config


def get_config():
    c = config.default()
    c.batch_size, c.seq_length, c.num_steps, c.log_every = 64, 32, 800, 20
    c.compute_dtype = 'float32'  # a CPU gains nothing from bfloat16
    c.model.update(family='bert', vocab_size=260, num_positions=32)  # 259: hides others
    c.model.update(hidden_size=96, intermediate_size=256, num_layers=4, num_heads=3, norm_position='mix')
    c.model.update(init_std=0.05, embed_std=0.05)  # narrow layers want larger weights
    c.task.name = 'masked_language'
    c.data.update(source='stdlib', tokenizer='bytes', mode='pack')
    c.optim.update(learning_rate=3e-3, b2=0.95, clip_norm=1.0)  # b2: 800 steps are few
    c.eval.update(every=200, tokens=50_000)
    c.checkpoint.every = 200
    c.analysis.update(every=0, tokens=1024)
    return c

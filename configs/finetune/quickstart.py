"""The network of configs/quickstart.py learns to say what a function of Python's library does, from its name.

python -m mixln_jax.main --config configs/quickstart.py
python -m mixln_jax.main --config configs/finetune/quickstart.py
"""

from mixln_jax import config


def get_config():
    c = config.default()
    c.init_from = 'runs/quickstart'
    c.batch_size, c.seq_length, c.num_steps, c.log_every = 16, 128, 400, 20
    c.compute_dtype = 'float32'  # a CPU gains nothing from bfloat16
    c.model.update(vocab_size=259, hidden_size=96, intermediate_size=256, num_layers=6, num_heads=3)
    c.task.name = 'instructions'
    c.data.update(source='stdlib', tokenizer='bytes', template='plain', mode='pack')
    c.optim.update(learning_rate=2e-3, b2=0.95, clip_norm=1.0)  # b2: 400 steps are few
    c.eval.every = c.checkpoint.every = 200
    c.analysis.update(every=0, tokens=1024)
    return c

"""The network of configs/finetune/quickstart.py learns to score answers, short ones higher.

python -m mixln_jax.main --config configs/quickstart.py
python -m mixln_jax.main --config configs/finetune/quickstart.py
python -m mixln_jax.main --config configs/preferences/reward_quickstart.py

The pairs are those of configs/preferences/dpo_quickstart.py: of the answer to a question about a function of Python's
library and the answer to another question, drawn by a hash of the name, the shorter one is chosen.
"""

from mixln_jax import config


def get_config():
    c = config.default()
    c.init_from = 'runs/finetune_quickstart'
    c.batch_size, c.seq_length, c.num_steps, c.log_every = 16, 320, 200, 10
    c.compute_dtype = 'float32'  # a CPU gains nothing from bfloat16
    c.model.update(vocab_size=259, hidden_size=96, intermediate_size=256, num_layers=6, num_heads=3)
    c.task.name = 'reward'
    c.data.update(source='stdlib', tokenizer='bytes', template='plain', mode='pack')
    c.optim.update(learning_rate=1e-3, b2=0.95, clip_norm=1.0)  # b2: 200 steps are few
    c.eval.update(every=20, tokens=20_000)
    c.checkpoint.every = 20
    c.analysis.update(every=0, tokens=0)
    return c

"""The network of configs/quickstart.py learns from rewards on which of four shelves the name of a function belongs.

python -m mixln_jax.main --config configs/quickstart.py
python -m mixln_jax.main --config configs/preferences/online_quickstart.py:format --workdir runs/format
python -m mixln_jax.main --config configs/preferences/online_quickstart.py --workdir runs/online

`format` teaches what an answer looks like: one of the four shelves at random, right in a quarter of all cases. Then the
network samples answers itself, and each has the reward 1 if it is right, else 0: names that end in a to e belong on
the shelf north, f to n east, o to s south, t to z west.
"""

from mixln_jax import config


def get_config(stage='online'):
    c = config.default()
    c.batch_size, c.seq_length, c.log_every = 128, 32, 20
    c.compute_dtype = 'float32'  # a CPU gains nothing from bfloat16
    c.model.update(vocab_size=259, hidden_size=96, intermediate_size=256, num_layers=6, num_heads=3)
    c.data.update(source='shelves', tokenizer='bytes', template='plain')
    c.eval.tokens = 2000
    c.analysis.update(every=0, tokens=0)
    if stage == 'format':
        c.init_from, c.task.name, c.num_steps = 'runs/quickstart', 'instructions', 100
        c.optim.update(learning_rate=1e-3, clip_norm=1.0)
        c.eval.every = c.checkpoint.every = 50
        return c
    c.init_from, c.task.name, c.num_steps = 'runs/format', 'online', 250
    c.task.online.update(reward='mixln_jax.evaluation.reward_functions:exact', completions=4, max_new_tokens=8)
    c.optim.update(learning_rate=3e-4, b2=0.95, clip_norm=1.0)
    c.eval.update(every=25, samples=100)
    c.checkpoint.every = 50
    return c

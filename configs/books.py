"""A small LLaMA of 12 layers on books, to see what each layer does: docs/results has the runs and what came out.

python -m mixln_jax.main --config configs/books.py --config.model.norm_position=pre --workdir runs/pre-0
"""

from mixln_jax import config


def get_config():
    c = config.default()
    c.batch_size, c.seq_length, c.num_steps = 8, 128, 2400
    c.compute_dtype = 'float32'  # a CPU gains nothing from bfloat16
    c.model.update(vocab_size=2048, hidden_size=64, intermediate_size=176, num_layers=12, num_heads=2)
    c.model.update(init_std=0.05, embed_std=0.05)  # narrow layers want larger weights
    c.data.update(source='tokens', path='data/books', mode='concat', tokenizer='huggingface')
    c.optim.update(learning_rate=3e-3, b2=0.95, clip_norm=1.0)  # b2: 2400 steps are few
    c.eval.update(every=600, tokens=200_000)
    c.checkpoint.update(every=600, keep=4)
    c.analysis.update(every=1200, tokens=2048)  # 1 % of the FLOPs
    return c

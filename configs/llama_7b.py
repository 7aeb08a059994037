"""LLaMA 7B on C4, Mix-LN: section 4.1, 2 of 32 layers Post-LN; the authors stop at 13,000 of these steps."""

from mixln_jax import config


def get_config():
    c = config.default()
    c.model.update(hidden_size=4096, intermediate_size=11008, num_heads=32, num_layers=32, post_ratio=0.0625)
    c.num_steps, c.optim.learning_rate = 150_000, 5e-4
    return c

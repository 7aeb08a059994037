"""LLaMA 1B on C4, Mix-LN: Mix-LN Table 1."""

from mixln_jax import config


def get_config():
    c = config.default()
    c.model.update(hidden_size=2048, intermediate_size=5461, num_heads=32, num_layers=24)
    c.num_steps, c.optim.learning_rate = 100_000, 5e-4
    return c

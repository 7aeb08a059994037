"""LLaMA 71M on C4, Mix-LN: Mix-LN Table 1."""

from mixln_jax import config


def get_config():
    c = config.default()
    c.model.update(hidden_size=512, intermediate_size=1368, num_heads=8, num_layers=12)
    c.num_steps, c.optim.learning_rate = 10_000, 1e-3
    return c

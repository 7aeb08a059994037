"""LLaMA 60M on C4, Mix-LN: Size of the authors' JSON file, steps and rate of 71m."""

from mixln_jax import config


def get_config():
    c = config.default()
    c.model.update(hidden_size=512, intermediate_size=1376, num_heads=8, num_layers=8)
    c.num_steps, c.optim.learning_rate = 10_000, 1e-3
    return c

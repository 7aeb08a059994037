"""LLaMA 20M on C4, Mix-LN: Size of the authors' JSON file, steps and rate of 71m."""

from mixln_jax import config


def get_config():
    c = config.default()
    c.model.update(hidden_size=256, intermediate_size=688, num_heads=4, num_layers=4)
    c.num_steps, c.optim.learning_rate = 10_000, 1e-3
    return c

"""LLaMA 3B on C4, Mix-LN: Size of the authors' JSON file, steps and rate of 1b."""

from mixln_jax import config


def get_config():
    c = config.default()
    c.model.update(hidden_size=2560, intermediate_size=6848, num_heads=32, num_layers=32)
    c.num_steps, c.optim.learning_rate = 100_000, 5e-4
    return c

"""LLaMA 100M on C4, Mix-LN: Size of the authors' JSON file, steps and rate of 71m."""

from mixln_jax import config


def get_config():
    c = config.default()
    c.model.update(hidden_size=640, intermediate_size=1708, num_heads=10, num_layers=12, vocab_size=32100)
    c.num_steps, c.optim.learning_rate = 10_000, 1e-3
    return c

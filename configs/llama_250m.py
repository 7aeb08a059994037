"""LLaMA 250M on C4, Mix-LN: Mix-LN Table 1. The paper's Table 7 says hidden size 1024; this is the authors' file."""

from mixln_jax import config


def get_config():
    c = config.default()
    c.model.update(hidden_size=768, intermediate_size=2560, num_heads=16, num_layers=24)
    c.num_steps, c.optim.learning_rate = 40_000, 1e-3
    return c

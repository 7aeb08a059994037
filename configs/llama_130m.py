"""LLaMA 130M on C4, Mix-LN: Mix-LN Table 1."""

from mixln_jax import config


def get_config():
    c = config.default()
    c.model.update(hidden_size=768, intermediate_size=2048, num_heads=12, num_layers=12)
    c.num_steps, c.optim.learning_rate = 20_000, 1e-3
    return c

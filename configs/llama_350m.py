"""LLaMA 350M on C4, Mix-LN: LayerNorm Scaling (arXiv 2502.05795) Table 1."""

from mixln_jax import config


def get_config():
    c = config.default()
    c.model.update(hidden_size=1024, intermediate_size=2736, num_heads=16, num_layers=24)
    c.num_steps, c.optim.learning_rate = 60_000, 5e-4
    return c

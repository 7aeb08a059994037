"""Pre-train LLaMA-family models with a normalisation placement chosen layer by layer."""

"""Networks as Flax modules; only this room imports Flax modules."""

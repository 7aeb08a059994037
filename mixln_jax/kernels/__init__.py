"""Computations on devices: attention, cross-entropy, matrix products."""

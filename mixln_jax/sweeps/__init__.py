"""Sweeps: many runs that differ in a few keys, shared by workers."""

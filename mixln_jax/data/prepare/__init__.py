"""Preparation of data sets: from text to TFDS data sets, or to rows of tokens."""

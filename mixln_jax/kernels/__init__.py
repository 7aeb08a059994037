"""What runs on a device: attention, cross-entropy, matrix products."""

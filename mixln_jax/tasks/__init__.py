"""What is learned: batches, losses and the numbers that people read."""

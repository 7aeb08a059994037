"""What is learnt: batches, losses and the numbers that people read."""

"""What each layer of a trained network does: jobs on checkpoints, and the same measures during training."""

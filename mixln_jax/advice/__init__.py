"""Which peak learning rates and how many Post-LN layers train: verdicts on losses, and runs that give them."""

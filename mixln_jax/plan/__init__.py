"""The plan of a run: memory, time and communication, without its hardware."""

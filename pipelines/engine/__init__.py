"""Training: the one loop, its random streams and its checkpoints."""

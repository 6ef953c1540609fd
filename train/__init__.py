"""Trains checkpoints from data: losses, matching, the training loop, and the entry points teacher, qat, official and sensitivity."""

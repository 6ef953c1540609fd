"""Reads datasets and turns them into the frames and batches that networks are trained and evaluated on."""

"""From data to checkpoints: losses, matching, loops, and the entry points float and qat."""

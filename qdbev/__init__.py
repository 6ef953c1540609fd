"""QD-BEV: from BEVFormer checkpoints to audited integer TensorRT engines; this package is the core all stages share."""

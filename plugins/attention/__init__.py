"""The CUDA kernels of the two attention operators, MultiScaleDeformableAttention and SpatialCrossAttention."""

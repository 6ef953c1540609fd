"""BEVFormer in plain PyTorch; every operation that can be quantized is a leaf module."""

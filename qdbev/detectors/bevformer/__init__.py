"""BEVFormer in plain PyTorch; whatever may be quantized is a leaf module."""

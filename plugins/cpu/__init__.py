"""CPU kernels of the operators, for PyTorch and OpenVINO."""

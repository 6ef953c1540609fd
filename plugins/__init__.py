"""CUDA kernels of the operators and their TensorRT registration; README.md is the operator contract."""

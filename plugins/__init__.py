"""CUDA kernels of the custom operators, compiled at run time, for PyTorch and as TensorRT plugins. README.md describes them."""

"""The operators that have CUDA kernels. An operator that is not listed is computed by PyTorch or by its ONNX function body."""

import plugins.attention.variant
from plugins.kernel import KernelFamily
from qdbev.ops.contract import Operator

KERNELS: dict[Operator, KernelFamily] = {
    **plugins.attention.variant.KERNELS,
}
"""The kernels of each operator; one line per folder of kernels."""

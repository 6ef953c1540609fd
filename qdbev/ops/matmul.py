"""Matrix product of two activations as a module, so that quantization can replace it like a layer."""

from torch import Tensor, nn


class Matmul(nn.Module):
    """The product `a @ b`, with the broadcasting of torch.matmul."""

    quantized_inputs = (0, 1)
    """Indices of the positional arguments that quantization puts quantizers on."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Product (..., m, n) of `a` (..., m, k) and `b` (..., k, n)."""
        return a @ b

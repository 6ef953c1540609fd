"""Product of two activations as a module, so that quantization can swap it like any other layer."""

from torch import Tensor, nn


class Matmul(nn.Module):
    """`a @ b` with the broadcasting of torch.matmul."""

    quantized_inputs = (0, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

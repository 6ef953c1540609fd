"""Modulated deformable convolution (DCNv2), split into a gather of columns and a 1x1 convolution that is quantized like any other.

The gather is a custom operator, with its ONNX body in export/bodies/im2col.py. export/deform_conv.py can replace both by ONNX's DeformConv.
Source: Deformable ConvNets v2 (arXiv:1811.11168), equation 1; layout of offsets and masks as in mmcv 1.4.0 ops/modulated_deform_conv.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from qdbev.ops.kernels import run_operator


class DeformConv2d(nn.Module):
    """3x3 modulated deformable convolution with padding 1, one deform group and no bias, and the layer that predicts its offsets.

    The layer `offset` has 27 output channels: (dy, dx) for each of the nine kernel positions, row-major, then nine mask logits.
    """

    TAPS = 9
    """Number of kernel positions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.offset = nn.Conv2d(in_channels, 3 * self.TAPS, 3, stride, 1)
        self.product = nn.Conv2d(in_channels * self.TAPS, out_channels, 1, bias=False)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `x` (B, C, H, W); returns (B, out_channels, H / stride, W / stride)."""
        offsets, mask = self.offset(x).split((2 * self.TAPS, self.TAPS), dim=1)
        return self.product(modulated_deformable_im2col(x, offsets, mask.sigmoid(), self.stride))


def modulated_deformable_im2col(x: Tensor, offsets: Tensor, mask: Tensor, stride: int) -> Tensor:
    """Read the nine kernel positions around each output position, each shifted by its offset and multiplied by its mask.

    Samples are interpolated bilinearly, and are zero outside the map. While a model is exported, this calls the custom operator.

    Args:
        x: (B, C, H, W) features.
        offsets: (B, 18, h, w) pixels, (dy, dx) for each kernel position, row-major.
        mask: (B, 9, h, w) factor of each kernel position.

    Returns:
        (B, C * 9, h, w) with the kernel position as the fast axis.
    """
    if run_operator(x, offsets, mask):
        return torch.ops.qdbev.modulated_deformable_im2col(x, offsets, mask, stride)
    return gathered_columns(x, offsets, mask, stride)


def gathered_columns(x: Tensor, offsets: Tensor, mask: Tensor, stride: int) -> Tensor:
    """The PyTorch implementation."""
    B, C, H, W = x.shape
    h, w = offsets.shape[-2:]
    row = torch.arange(h, dtype=torch.float32, device=x.device)[:, None] * stride
    column = torch.arange(w, dtype=torch.float32, device=x.device) * stride
    shift = offsets.float().view(B, 9, 2, h, w)
    tap = torch.arange(9, device=x.device).view(1, 9, 1, 1)
    y = shift[:, :, 0] + row + (tap // 3 - 1)  # (B, 9, h, w)
    x_ = shift[:, :, 1] + column + (tap % 3 - 1)
    grid = torch.stack(((2 * x_ + 1) / W - 1, (2 * y + 1) / H - 1), -1)  # (B, 9, h, w, 2)
    read = F.grid_sample(x, grid.view(B, 9 * h, w, 2).to(x.dtype), align_corners=False).view(B, C, 9, h, w)
    return (read * mask[:, None]).view(B, C * 9, h, w)


@library.custom_op("qdbev::modulated_deformable_im2col", mutates_args=())
def _node(x: Tensor, offsets: Tensor, mask: Tensor, stride: int) -> Tensor:
    return gathered_columns(x, offsets, mask, stride)


@_node.register_fake
def _(x: Tensor, offsets: Tensor, mask: Tensor, stride: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * DeformConv2d.TAPS, *offsets.shape[-2:])

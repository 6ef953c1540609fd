"""Encodes camera images to feature levels: a bottleneck ResNet and a feature pyramid.

Source: ResNet (arXiv:1512.03385) in the "pytorch" and "caffe" arrangements of mmdet 2.14.0; FPN (arXiv:1612.03144).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from qdbev.nn.config import BackboneConfig
from qdbev.ops.deform_conv import DeformConv2d

EXPANSION = 4
"""Output channels of a bottleneck for each of its planes."""


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3, 1x1 with a residual; `BackboneConfig.style` says which of them has the stride."""

    def __init__(self, in_channels: int, planes: int, stride: int, style: str, deformable: bool) -> None:
        super().__init__()
        self.norm_pairs = (("conv1", "bn1"), ("conv2.product" if deformable else "conv2", "bn2"), ("conv3", "bn3"))
        out_channels = planes * EXPANSION
        first, second = (1, stride) if style == "pytorch" else (stride, 1)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = DeformConv2d(planes, planes, second) if deformable else nn.Conv2d(planes, planes, 3, second, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, planes * 4, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.bn3(self.conv3(out)) + self.downsample(x))


class ResNet(nn.Module):
    """A bottleneck ResNet without classifier, built up to the last stage whose output is read."""

    norm_pairs = (("conv1", "bn1"),)

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(3, config.width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = config.width
        self.stages: list[str] = []
        for stage in range(max(config.out_stages) + 1):
            planes = config.width * 2**stage
            blocks = []
            for block in range(config.depths[stage]):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(Bottleneck(channels, planes, stride, config.style, stage in config.deformable_stages))
                channels = planes * EXPANSION
            self.stages.append(f"layer{stage + 1}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        frozen = self._evaluated_norms()
        if config.frozen_stages >= 0:
            frozen += [self.conv1, self.bn1, *(self.get_submodule(name) for name in self.stages[: config.frozen_stages])]
        for module in frozen:
            module.requires_grad_(False)

    @property
    def out_channels(self) -> list[int]:
        """Number of channels of each output."""
        return [self.config.width * 2**stage * EXPANSION for stage in self.config.out_stages]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Encode images (B, 3, H, W); returns (B, C, H / 2**(k+2), W / 2**(k+2)) for each output stage k."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        outputs = []
        for index, name in enumerate(self.stages):
            x = self.get_submodule(name)(x)
            if index in self.config.out_stages:
                outputs.append(x)
        return outputs

    def train(self, mode: bool = True) -> "ResNet":
        """Set the training mode; with `norm_eval` batch norm stays in evaluation mode and uses its stored statistics."""
        super().train(mode)
        for norm in self._evaluated_norms():
            norm.eval()
        return self

    def _evaluated_norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if self.config.norm_eval and isinstance(module, nn.BatchNorm2d)]


class FeaturePyramid(nn.Module):
    """1x1 laterals, top-down nearest upsampling and 3x3 outputs; stride-2 convolutions make the levels beyond those of the backbone."""

    def __init__(self, in_channels: list[int], embed_dim: int, num_levels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, embed_dim, 1) for channels in in_channels)
        strides = [1 if level < len(in_channels) else 2 for level in range(num_levels)]
        self.output = nn.ModuleList(nn.Conv2d(embed_dim, embed_dim, 3, stride, 1) for stride in strides)
        for layer in (*self.lateral, *self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """Merge the backbone's outputs, finest first; returns (B, embed_dim, h, w) for each level, finest first."""
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, features, strict=True)]
        for fine in range(len(merged) - 2, -1, -1):
            merged[fine] = merged[fine] + F.interpolate(merged[fine + 1], size=merged[fine].shape[-2:], mode="nearest")
        levels = [output(feature) for output, feature in zip(self.output, merged, strict=False)]
        for extra in self.output[len(merged) :]:
            levels.append(extra(levels[-1]))
        return levels

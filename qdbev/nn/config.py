"""Settings of network parts that several detectors share."""

from dataclasses import dataclass
from typing import Literal

from qdbev.settings import require, require_positive


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Settings of a bottleneck ResNet. ResNet-50 has depths (3, 4, 6, 3), ResNet-101 (3, 4, 23, 3), both width 64."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    """Number of blocks of each stage."""
    width: int = 64
    """Planes of the first stage; stage k has width * 2**k planes and four times as many output channels."""
    style: Literal["pytorch", "caffe"] = "pytorch"
    """Convolution of a bottleneck that has the stride: the 3x3 (pytorch) or the first 1x1 (caffe)."""
    deformable_stages: tuple[int, ...] = ()
    """Stages (from 0) whose 3x3 convolutions are modulated deformable ones (DCNv2)."""
    out_stages: tuple[int, ...] = (3,)
    """Stages (from 0) whose outputs the neck reads."""
    frozen_stages: int = 1
    """Number of stages that are not trained, in addition to the stem; -1 trains everything."""
    norm_eval: bool = True
    """Batch norm uses its stored statistics during training, and its scale and shift are not trained."""

    def __post_init__(self) -> None:
        require_positive(self, "model.backbone", "depths", "width")
        require_positive(self, "model.backbone", "deformable_stages", "out_stages", least=0)
        require(bool(self.out_stages), "model.backbone.out_stages is empty")
        require(max(self.out_stages) < len(self.depths), f"model.backbone.out_stages {self.out_stages} exceed depths {self.depths}")
        require(self.frozen_stages >= -1, f"model.backbone.frozen_stages is {self.frozen_stages}, must be -1 or more")

"""Settings of network parts that several detectors share."""

from dataclasses import dataclass
from typing import Literal

from qdbev.settings import require


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A bottleneck ResNet; the standard ones are depths (3, 4, 6, 3) and (3, 4, 23, 3) at width 64."""

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    """Planes of the first stage; stage k has width * 2**k planes and four times as many outputs."""
    style: Literal["pytorch", "caffe"] = "pytorch"
    """Where the stride of a bottleneck sits: on the 3x3 convolution (pytorch) or on the first 1x1 (caffe)."""
    deformable_stages: tuple[int, ...] = ()
    """Stages (from 0) whose 3x3 convolutions are modulated deformable ones (DCNv2)."""
    out_stages: tuple[int, ...] = (3,)
    frozen_stages: int = 1
    """Number of stages kept fixed together with the stem; -1 trains everything."""
    norm_eval: bool = True
    """Batch norm uses its stored statistics during training, and its affine is fixed."""

    def __post_init__(self) -> None:
        require(bool(self.out_stages), "model.backbone.out_stages is empty")
        require(max(self.out_stages) < len(self.depths), f"model.backbone.out_stages {self.out_stages} exceed depths {self.depths}")
        require(self.frozen_stages >= -1, f"model.backbone.frozen_stages is {self.frozen_stages}, must be -1 or more")

"""A second, tiny, stateless detector that proves the contract of qdbev/detector.py: a small ResNet and a set head, without a BEV.

It averages the cameras' features, pools them to a grid, and uses every cell of the grid as an object query. `installed` adds it to the
union of detectors during a test.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdbev import config as config_module
from qdbev import detectors
from qdbev.config import Config, TrainConfig
from qdbev.data.config import DataConfig
from qdbev.detector import Arrays, Detector, Output
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.nn.box_code import decode
from qdbev.nn.config import BackboneConfig
from qdbev.nn.image_encoder import ResNet
from qdbev.nn.set_head import Decoded, SetHead
from qdbev.quant.config import DistillConfig, QuantConfig, Stage
from qdbev.recipes import RECIPES
from qdbev.schema import CODE_SIZE, Batch, Detections, Frame, Interface


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Settings of the toy detector."""

    groups: ClassVar[tuple[str, ...]] = ("backbone", "mixer", "head")
    kind: Literal["toy"] = "toy"
    backbone: BackboneConfig = field(
        default_factory=lambda: BackboneConfig(depths=(1, 1), width=4, out_stages=(1,), frozen_stages=-1, norm_eval=False)
    )
    num_cameras: int = 6
    embed_dim: int = 16
    grid_hw: tuple[int, int] = (3, 5)
    num_classes: int = 10
    decoder_layers: int = 2
    pc_range: tuple[float, ...] = (-32.0, -32.0, -5.0, 32.0, 32.0, 3.0)
    post_center_range: tuple[float, ...] = (-38.4, -38.4, -10.0, 38.4, 38.4, 10.0)
    max_boxes: int = 10

    def interface(self, image_hw: tuple[int, int]) -> Interface:
        """Return one input and two outputs, none of them recurrent."""
        num_query = self.grid_hw[0] * self.grid_hw[1]
        return Interface(
            inputs={"images": (1, self.num_cameras, 3, *image_hw)},
            outputs={"cls_logits": (1, num_query, self.num_classes), "box_code": (1, num_query, CODE_SIZE)},
            coordinates=("box_code",),
        )


class Toy(Detector):
    """The toy's network; its state is None."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.backbone = ResNet(config.backbone)
        (channels,) = self.backbone.out_channels
        self.mixer = nn.Sequential(
            nn.Conv2d(channels, config.embed_dim, 3, padding=1), nn.ReLU(), nn.Conv2d(config.embed_dim, config.embed_dim, 1)
        )
        self.head = SetHead(config.embed_dim, config.num_classes, config.decoder_layers, config.pc_range)
        self.config = config

    def forward(self, batch: Batch, state: None = None) -> tuple[Output, None]:
        """Compute the output for images (B, N, 3, H, W)."""
        features, cls_logits, box_code = self._detect(batch.images)
        return Output((features,), None, cls_logits, box_code), None

    def deployed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute logits and box code of the last layer."""
        _, cls_logits, box_code = self._detect(images)
        return cls_logits[-1], box_code[-1]

    def _detect(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, N = images.shape[:2]
        (level,) = self.backbone(images.flatten(0, 1))
        features = self.mixer(level).unflatten(0, (B, N))  # (B, N, C, h, w)
        mean = F.interpolate(features.mean(1), size=self.config.grid_hw, mode="nearest")  # (B, C, *grid_hw)
        state = mean.flatten(2).transpose(1, 2)  # (B, Q, C)
        reference = state.new_zeros(*state.shape[:2], 3)
        decoded = [Decoded(state, branch(state), reference) for branch in self.head.reg_branches]
        return features, *self.head(decoded)


class ToyStream:
    """The toy's work on the host, without a memory."""

    def __init__(self, config: ToyConfig) -> None:
        self._config = config

    def inputs(self, frame: Frame, memory: None) -> Arrays:
        """Return the images."""
        return {"images": frame.images[None]}

    def remember(self, frame: Frame, outputs: Mapping[str, np.ndarray]) -> None:
        """Return no memory."""

    def decode(self, outputs: Mapping[str, np.ndarray]) -> Detections:
        """Decode the best boxes."""
        logits, code = torch.from_numpy(outputs["cls_logits"]), torch.from_numpy(outputs["box_code"])
        return decode(logits, code, self._config.max_boxes, self._config.post_center_range)[0]


def toy() -> Config:
    """A recipe that trains in seconds, quantized in one stage that distills the image features."""
    return Config(
        name="toy",
        data=DataConfig(root="data/micro", stored_hw=(180, 320), image_scale=0.2, queue_length=2, photometric=False, workers=0),
        model=ToyConfig(),  # type: ignore[arg-type]
        train=TrainConfig(epochs=1, batch_size=2, learning_rate=1e-3, warmup_steps=0, grid_mask=0.0, anneal="step"),
        quant=QuantConfig(
            edge_layers=("backbone.conv1", "head.cls_branches.*.6", "head.reg_branches.*.4"),
            calibration_samples=2,
            distill=DistillConfig(form="image", head=1.0),
            stages=(Stage(groups=("backbone", "mixer"), epochs=0.5), Stage(epochs=0.5, distill=True)),
        ),
    )


@contextmanager
def installed() -> Iterator[None]:
    """Add the toy to the union of detectors, to `build` and `stream`, and to the recipes."""
    build, stream = detectors.build, detectors.stream
    with (
        patch.object(config_module, "DetectorConfig", BEVFormerConfig | ToyConfig),
        patch.object(detectors, "build", lambda config: Toy(config) if isinstance(config, ToyConfig) else build(config)),
        patch.object(detectors, "stream", lambda config: ToyStream(config) if isinstance(config, ToyConfig) else stream(config)),
        patch.dict(RECIPES, {"toy": toy}),
    ):
        yield

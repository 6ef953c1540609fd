"""Images to boxes: the one forward. Training, evaluation, quantization and export all run this.

Source: BEVFormer (arXiv:2203.17270); fundamentalvision/BEVFormer at 66b65f3.
"""

from torch import Tensor, nn

from qdbev.config import ModelConfig
from qdbev.detectors.bevformer.decoder import Decoder
from qdbev.detectors.bevformer.encoder import Encoder
from qdbev.nn.image_encoder import FeaturePyramid, ResNet
from qdbev.nn.set_head import Head
from qdbev.schema import BevOutput


class BEVFormer(nn.Module):
    """Five children, which are also the groups of the quantization policy: backbone, neck, encoder, decoder, head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.backbone)
        self.neck = FeaturePyramid(self.backbone.out_channels, config.embed_dim, config.num_levels)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.head = Head(config)

    def forward(
        self, images: Tensor, lidar2img: Tensor, can_bus: Tensor, prev_bev: Tensor | None = None, has_prev: Tensor | None = None
    ) -> BevOutput:
        """One frame of each sample.

        Args:
            images: (B, N, 3, H, W) float32, normalised and padded.
            lidar2img: (B, N, 4, 4) from lidar metres to pixels of the padded image.
            can_bus: (B, 18) after the temporal delta (temporal.py).
            prev_bev: (B, BEV cells, C) of the previous frame, or None for first frames.
            has_prev: (B,) one where `prev_bev` counts; all ones where it is not given.

        Returns:
            All that losses, distillation and decoding read; shapes in schema.py.

        Raises:
            ValueError: Shapes do not fit each other or the config.
        """
        features, bev = self.encode(images, lidar2img, can_bus, prev_bev, has_prev)
        cls_logits, box_code = self.head(self.decoder(bev, self.head.reg_branches))
        return BevOutput(features, bev, cls_logits, box_code)

    def encode(
        self, images: Tensor, lidar2img: Tensor, can_bus: Tensor, prev_bev: Tensor | None = None, has_prev: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """`image_features` and `bev` of `forward`: all that a frame leaves for the next one."""
        self._check(images, lidar2img, can_bus, prev_bev)
        B, N = images.shape[:2]
        if prev_bev is None:
            prev_bev = images.new_zeros(B, self.encoder.bev_embedding.num_embeddings, self.config.embed_dim)
            has_prev = images.new_zeros(B)
        elif has_prev is None:
            has_prev = images.new_ones(B)
        levels = self.neck(self.backbone(images.flatten(0, 1)))
        features = tuple(level.unflatten(0, (B, N)) for level in levels)
        image_hw = (images.shape[-2], images.shape[-1])
        return features, self.encoder(features, lidar2img, can_bus, image_hw, prev_bev, has_prev)

    def _check(self, images: Tensor, lidar2img: Tensor, can_bus: Tensor, prev_bev: Tensor | None) -> None:
        B, N = images.shape[:2]
        cells = self.config.bev_hw[0] * self.config.bev_hw[1]
        expected = {
            "images": (images.shape, (B, self.config.num_cameras, 3, *images.shape[3:])),
            "lidar2img": (lidar2img.shape, (B, N, 4, 4)),
            "can_bus": (can_bus.shape, (B, 18)),
        }
        if prev_bev is not None:
            expected["prev_bev"] = (prev_bev.shape, (B, cells, self.config.embed_dim))
        for name, (shape, wanted) in expected.items():
            if tuple(shape) != wanted:
                raise ValueError(f"{name} has shape {tuple(shape)}, this model takes {wanted}")


class Deployed(nn.Module):
    """The model with the deployed graph's inputs and outputs (schema.INPUTS, schema.OUTPUTS)."""

    def __init__(self, model: BEVFormer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, images: Tensor, lidar2img: Tensor, can_bus: Tensor, prev_bev: Tensor, has_prev: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Last decoder layer's logits and box code, and the BEV."""
        output = self.model(images, lidar2img, can_bus, prev_bev, has_prev)
        return output.cls_logits[-1], output.box_code[-1], output.bev

"""The network of BEVFormer, from images to boxes. Training, evaluation, quantization and export all run this one forward.

Source: BEVFormer (arXiv:2203.17270); fundamentalvision/BEVFormer at 66b65f3.

B batch, N cameras, H W padded image size, C embedding width, K BEV cells, Q queries.
"""

from torch import Tensor

from qdbev.detector import Detector, Output
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.decoder import Decoder
from qdbev.detectors.bevformer.encoder import Encoder
from qdbev.geometry import project
from qdbev.nn.image_encoder import FeaturePyramid, ResNet
from qdbev.nn.set_head import SetHead
from qdbev.schema import Batch


class BEVFormer(Detector):
    """The network of BEVFormer. Its state is the BEV (B, K, C), which the next frame's temporal attention reads."""

    groups = BEVFormerConfig.groups

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.backbone)
        self.neck = FeaturePyramid(self.backbone.out_channels, config.embed_dim, config.num_levels)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.head = SetHead(config.embed_dim, config.num_classes, config.decoder_layers, config.pc_range)

    def forward(self, batch: Batch, state: Tensor | None = None) -> tuple[Output, Tensor]:
        """Compute one frame of each sample; returns the output, and the BEV (B, K, C) as the state for the next frame.

        Args:
            batch: `images` (B, N, 3, H, W) normalised and padded, `lidar2img` (B, N, 4, 4) from lidar metres to pixels of the padded
                image, `can_bus` (B, 18) relative to the previous frame, `has_prev` (B,) one where the state is read, else zero.
            state: (B, K, C) BEV of the previous frame, or None if all samples are first frames.

        Raises:
            ValueError: Shapes do not fit each other or the config.
        """
        features, bev = self._encode(batch.images, batch.lidar2img, batch.can_bus, state, batch.has_prev)
        cls_logits, box_code = self.head(self.decoder(bev, self.head.reg_branches))
        return Output(features, bev, cls_logits, box_code), bev

    def advance(self, batch: Batch, state: Tensor | None = None) -> Tensor:
        """Compute only the BEV (B, K, C) for the next frame, without running the decoder."""
        return self._encode(batch.images, batch.lidar2img, batch.can_bus, state, batch.has_prev)[1]

    def deployed(
        self, images: Tensor, lidar2img: Tensor, can_bus: Tensor, prev_bev: Tensor, has_prev: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute logits (1, Q, classes) and box code (1, Q, 10) of the last decoder layer, and the BEV (1, K, C)."""
        _, bev = self._encode(images, lidar2img, can_bus, prev_bev, has_prev)
        cls_logits, box_code = self.head(self.decoder(bev, self.head.reg_branches))
        return cls_logits[-1], box_code[-1], bev

    def visibility(self, batch: Batch) -> Tensor:
        """Return (B, N, K) bool, true where the camera sees some point of the BEV cell's pillar, as spatial cross-attention does."""
        image_hw = (batch.images.shape[-2], batch.images.shape[-1])
        return project(self.encoder.pillars, batch.lidar2img, image_hw)[1].any(-1)

    def _encode(
        self, images: Tensor, lidar2img: Tensor, can_bus: Tensor, prev_bev: Tensor | None, has_prev: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Compute image features (B, N, C, h, w) of each level, and the BEV (B, K, C)."""
        self._check(images, lidar2img, can_bus, prev_bev)
        B, N = images.shape[:2]
        if prev_bev is None:
            prev_bev = images.new_zeros(B, self.encoder.bev_embedding.num_embeddings, self.config.embed_dim)
            has_prev = images.new_zeros(B)
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

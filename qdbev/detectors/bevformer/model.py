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

    def __init__(self, config: BEVFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = ResNet(config.backbone)
        self.neck = FeaturePyramid(self.backbone.out_channels, config.embed_dim, config.num_levels)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.head = SetHead(config.embed_dim, config.num_classes, config.decoder_layers, config.pc_range)

    def forward(self, batch: Batch, state: Tensor | None = None) -> tuple[Output, Tensor]:
        """Compute one frame of each sample and the state for the next one. Raises ValueError if shapes do not fit."""
        features, bev = self._encode(batch, state)
        cls_logits, box_code = self.head(self.decoder(bev, self.head.reg_branches))
        return Output(features, bev, cls_logits, box_code), bev

    def advance(self, batch: Batch, state: Tensor | None = None) -> Tensor:
        """Compute only the BEV (B, K, C) for the next frame, without running the decoder."""
        return self._encode(batch, state)[1]

    def deployed(
        self, images: Tensor, lidar2img: Tensor, can_bus: Tensor, prev_bev: Tensor, has_prev: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute logits (1, Q, classes) and box code (1, Q, 10) of the last decoder layer, and the BEV (1, K, C)."""
        output, bev = self.forward(Batch(images, lidar2img, can_bus, has_prev, boxes=[], labels=[], tokens=[]), prev_bev)
        return output.cls_logits[-1], output.box_code[-1], bev

    def visibility(self, batch: Batch) -> Tensor:
        """Return (B, N, K) bool, true where the camera sees some point of the BEV cell's pillar, as spatial cross-attention does."""
        return project(self.encoder.pillars, batch.lidar2img, _image_hw(batch))[1].any(-1)

    def _encode(self, batch: Batch, state: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
        """Compute image features (B, N, C, h, w) of each level, and the BEV (B, K, C)."""
        self._check(batch, state)
        B, N = batch.images.shape[:2]
        prev_bev, has_prev = state, batch.has_prev
        if prev_bev is None:
            prev_bev = batch.images.new_zeros(B, self.encoder.bev_embedding.num_embeddings, self.config.embed_dim)
            has_prev = batch.images.new_zeros(B)
        levels = self.neck(self.backbone(batch.images.flatten(0, 1)))
        features = tuple(level.unflatten(0, (B, N)) for level in levels)
        return features, self.encoder(features, batch.lidar2img, batch.can_bus, _image_hw(batch), prev_bev, has_prev)

    def _check(self, batch: Batch, state: Tensor | None) -> None:
        deployed = self.config.interface(_image_hw(batch)).inputs
        given = {"images": batch.images, "lidar2img": batch.lidar2img, "can_bus": batch.can_bus, "prev_bev": state}
        for name, tensor in given.items():
            wanted = (len(batch.images), *deployed[name][1:])
            if tensor is not None and tensor.shape != wanted:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, this model takes {wanted}")


def _image_hw(batch: Batch) -> tuple[int, int]:
    return batch.images.shape[-2], batch.images.shape[-1]

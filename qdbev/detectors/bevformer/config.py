"""Settings of BEVFormer, and the interface of its deployed graph."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from qdbev.nn.config import BackboneConfig
from qdbev.schema import CLASSES, CODE_SIZE, Interface
from qdbev.settings import require, require_positive


@dataclass(frozen=True, kw_only=True)
class BEVFormerConfig:
    """Settings of BEVFormer; the defaults are those of the published tiny model."""

    groups: ClassVar[tuple[str, ...]] = ("backbone", "neck", "encoder", "decoder", "head")
    """Top-level children of the network, each with its own bit widths, in the order of the progressive stages."""

    kind: Literal["bevformer"] = "bevformer"
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    num_levels: int = 1
    """Number of feature levels of the neck; levels beyond `out_stages` are made by stride-2 convolutions on the last one."""
    embed_dim: int = 256
    """Width of image features, BEV features and object queries."""
    num_heads: int = 8
    ffn_dim: int = 512
    """Hidden width of the feed-forward layers."""
    num_cameras: int = 6
    bev_hw: tuple[int, int] = (50, 50)
    """Rows (y, forward) and columns (x, right) of the BEV grid."""
    pc_range: tuple[float, ...] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
    """Range of the BEV and of object centres: x, y, z minimum then maximum, metres, lidar frame."""
    post_center_range: tuple[float, ...] = (-61.2, -61.2, -10.0, 61.2, 61.2, 10.0)
    """Range as `pc_range`; decoded boxes with a centre outside are dropped."""
    num_pillar_points: int = 4
    """Number of heights at which a BEV cell is projected into the cameras."""
    num_spatial_points: int = 8
    """Sampling points of each head and level in spatial cross-attention, divided equally among the pillar points."""
    num_points: int = 4
    """Sampling points of each head in temporal self-attention and in the decoder."""
    encoder_layers: int = 3
    decoder_layers: int = 6
    num_query: int = 900
    num_classes: int = 10
    max_boxes: int = 300
    """Largest number of decoded boxes of a frame."""
    dropout: float = 0.1
    rotate_center: tuple[float, float] = (100.0, 100.0)
    """Centre (x, y) in BEV cells about which the previous BEV is rotated. The published models of every size were trained with the
    constant (100, 100), which is the grid centre only for base."""
    shifted_reference: bool = True
    """Shift the temporal reference points of the current frame too. This is a bug of the code that trained the published v1.0 checkpoints
    (fixed upstream in 2f37d0d, 2023-07-27); False is the corrected form."""
    absolute_yaw: bool = True
    """The network reads the vehicle's heading on the map (can_bus[16]) and a turn that jumps by 360 degrees where the heading wraps ([17]),
    as the published models were trained. With False it reads only the wrapped turn, in radians and degrees."""

    def __post_init__(self) -> None:
        sizes = ("embed_dim", "num_heads", "ffn_dim", "num_cameras", "bev_hw", "num_pillar_points", "num_spatial_points", "num_points")
        require_positive(self, "model", *sizes, "encoder_layers", "decoder_layers", "num_query", "num_classes", "max_boxes")
        require(self.num_classes == len(CLASSES), f"model.num_classes is {self.num_classes}; schema.CLASSES has {len(CLASSES)} classes")
        require(self.embed_dim % self.num_heads == 0, f"model.embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        require(
            self.num_spatial_points % self.num_pillar_points == 0,
            f"model.num_spatial_points {self.num_spatial_points} is not a multiple of num_pillar_points {self.num_pillar_points}",
        )
        require(self.num_levels >= len(self.backbone.out_stages), "model.num_levels is smaller than the number of backbone outputs")
        require(len(self.pc_range) == 6 and len(self.post_center_range) == 6, "model.pc_range and post_center_range need six values")
        require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}, must be in [0, 1)")

    def level_hw(self, image_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Return height and width of each output of the neck for padded images of `image_hw` pixels."""
        strides = [4 * 2 ** (self.backbone.out_stages[0] + level) for level in range(self.num_levels)]
        return [(-(-image_hw[0] // stride), -(-image_hw[1] // stride)) for stride in strides]

    def interface(self, image_hw: tuple[int, int]) -> Interface:
        """Return inputs and outputs of the deployed graph for padded images of `image_hw` pixels (height, width).

        `images`: normalised pixels. `lidar2img`: from lidar metres to pixels of the padded image. `can_bus`: relative to the previous
        frame (qdbev/can_bus.py). `prev_bev`: the previous frame's `bev`. `has_prev`: one if `prev_bev` is valid, else zero.
        `cls_logits` and `box_code` are those of the last decoder layer.
        """
        num_cells = self.bev_hw[0] * self.bev_hw[1]
        return Interface(
            inputs={
                "images": (1, self.num_cameras, 3, *image_hw),
                "lidar2img": (1, self.num_cameras, 4, 4),
                "can_bus": (1, 18),
                "prev_bev": (1, num_cells, self.embed_dim),
                "has_prev": (1,),
            },
            outputs={
                "cls_logits": (1, self.num_query, self.num_classes),
                "box_code": (1, self.num_query, CODE_SIZE),
                "bev": (1, num_cells, self.embed_dim),
            },
            recurrent=(("bev", "prev_bev"),),
            geometry=("lidar2img", "can_bus", "has_prev"),
            coordinates=("box_code",),
        )

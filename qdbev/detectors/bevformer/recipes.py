"""Recipes of BEVFormer: functions that return a `Config`; their docstrings give the expected results."""

import dataclasses
from collections.abc import Sequence

from qdbev.config import Config, TrainConfig
from qdbev.data.config import DataConfig
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.nn.config import BackboneConfig
from qdbev.quant.config import QuantConfig, Stage

_RESNET101 = BackboneConfig(depths=(3, 4, 23, 3), style="caffe", deformable_stages=(2, 3))
_CAFFE_IMAGES = DataConfig(root="data/nuscenes", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), to_rgb=False)
"""Images in the order BGR, with the mean with which the caffe backbones were trained."""


def progressive(epochs: Sequence[float], learning_rate: float) -> tuple[Stage, ...]:
    """Return the four stages of QD-BEV's first phase, which quantize backbone, neck, encoder, and decoder with head in turn."""
    parts = (("backbone",), ("backbone", "neck"), ("backbone", "neck", "encoder"), None)
    return tuple(Stage(groups=groups, epochs=count, learning_rate=learning_rate) for groups, count in zip(parts, epochs, strict=True))


def _method(progressive_epochs: Sequence[float], distill_epochs: float, learning_rate: float) -> tuple[Stage, ...]:
    """Return all stages of QD-BEV (arXiv:2308.10515, Algorithm 1): the progressive ones, then distillation."""
    return *progressive(progressive_epochs, learning_rate), Stage(epochs=distill_epochs, learning_rate=learning_rate, distill=True)


POLICY = QuantConfig(
    edge_layers=("backbone.conv1", "head.cls_branches.*.6", "head.reg_branches.*.4"),
    float_layers=("encoder.can_bus_mlp.*", "decoder.reference_points"),
)
"""Quantization policy of all recipes. `float_layers` are the layers that read `can_bus`, eighteen numbers of mixed units, and the one that
computes the reference points, which are constant."""
_PAPER = dataclasses.replace(POLICY, stages=_method((24, 11, 16, 9), 25, learning_rate=5e-5))
"""The paper's stages. Their lengths are read off its Figure 3 (tiny); it gives no learning rate."""
_PAPER_DEFORMABLE = dataclasses.replace(_PAPER, edge_layers=(*_PAPER.edge_layers, "backbone.*.conv2.offset"))
"""The paper's stages for backbones with DCNv2, whose offset convolutions stay at 8 bits. At W4A6 their sampling offsets were wrong by 0.23
pixels before training, at W8A8 by 0.02 pixels."""


def micro() -> Config:
    """A detector that trains in minutes on two cores, on the synthetic `micro` world.

    Command: make demo; about 9 minutes on two cores. Results of several runs: NDS 0.444 to 0.474, mAP 0.397 to 0.442
    (results/demo_micro_cpu.json has one of them).
    """
    return Config(
        name="micro",
        data=DataConfig(root="data/micro", stored_hw=(180, 320), queue_length=2, photometric=False, workers=0),
        model=BEVFormerConfig(
            backbone=BackboneConfig(depths=(1, 1, 1), width=16, out_stages=(1, 2), frozen_stages=-1, norm_eval=False),
            num_levels=2,
            embed_dim=64,
            ffn_dim=128,
            bev_hw=(25, 25),
            pc_range=(-32.0, -32.0, -5.0, 32.0, 32.0, 3.0),
            post_center_range=(-38.4, -38.4, -10.0, 38.4, 38.4, 10.0),
            encoder_layers=2,
            decoder_layers=3,
            num_query=100,
            max_boxes=100,
            dropout=0.0,
            rotate_center=(12.5, 12.5),
            shifted_reference=False,
        ),
        train=TrainConfig(
            epochs=4,
            batch_size=4,
            learning_rate=1.5e-3,
            backbone_lr_factor=1.0,
            warmup_steps=100,
            anneal="step",
            code_weights=(2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 0.5, 0.5),
            grid_mask=0.0,
        ),
        quant=dataclasses.replace(POLICY, stages=_method((0.2, 0.1, 0.2, 0.1), 0.4, learning_rate=1e-4)),
    )


def tiny() -> Config:
    """BEVFormer-Tiny: ResNet-50, 480x800, BEV 50x50; 25.2 mAP / 35.4 NDS on nuScenes val with the published checkpoint."""
    return Config(name="tiny", data=DataConfig(root="data/nuscenes"), model=BEVFormerConfig(), quant=_PAPER)


def small() -> Config:
    """BEVFormer-Small: ResNet-101 with DCNv2, 736x1280, BEV 150x150; 37.0 mAP / 47.9 NDS with the published checkpoint."""
    return Config(
        name="small",
        data=dataclasses.replace(_CAFFE_IMAGES, image_scale=0.8),
        model=BEVFormerConfig(backbone=_RESNET101, bev_hw=(150, 150)),
        quant=_PAPER_DEFORMABLE,
    )


def base() -> Config:
    """BEVFormer-Base: ResNet-101 with DCNv2, four levels, 928x1600, BEV 200x200; 41.6 mAP / 51.7 NDS with the published checkpoint."""
    return Config(
        name="base",
        data=dataclasses.replace(_CAFFE_IMAGES, image_scale=1.0, queue_length=4),
        model=BEVFormerConfig(
            backbone=dataclasses.replace(_RESNET101, out_stages=(1, 2, 3)), num_levels=4, bev_hw=(200, 200), encoder_layers=6
        ),
        quant=_PAPER_DEFORMABLE,
    )


RECIPES = {"micro": micro, "tiny": tiny, "small": small, "base": base}
"""BEVFormer's recipes by name."""

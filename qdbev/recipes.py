"""Named runs: functions that return a `Config`; the docstring is the lab note."""

import dataclasses
import re
from collections.abc import Callable, Sequence

from qdbev.config import GROUPS, BackboneConfig, Bits, Config, ConfigError, DataConfig, ModelConfig, QuantConfig, Stage, TrainConfig

_EMBEDDING_BITS = 8
"""At 4 bits the tables alone took 0.047 of the micro detector's NDS after calibration, and saved a thirteenth of the packed file."""
_CAFFE_MEAN = (103.53, 116.28, 123.675)


def progressive(epochs: Sequence[float], learning_rate: float) -> tuple[Stage, ...]:
    """QD-BEV's first phase: backbone, neck, encoder, then decoder with head, each quantized on top of those before, with so many epochs."""
    parts = (GROUPS[:1], GROUPS[:2], GROUPS[:3], GROUPS)
    return tuple(Stage(groups=groups, epochs=count, learning_rate=learning_rate) for groups, count in zip(parts, epochs, strict=True))


def _method(progressive_epochs: Sequence[float], distill_epochs: float, learning_rate: float) -> tuple[Stage, ...]:
    """QD-BEV whole (arXiv:2308.10515, Algorithm 1): the progressive stages, then view-guided distillation with everything quantized."""
    return *progressive(progressive_epochs, learning_rate), Stage(epochs=distill_epochs, learning_rate=learning_rate, distill=True)


_PAPER = QuantConfig(stages=_method((24, 11, 16, 9), 25, learning_rate=5e-5))
"""Lengths read off the paper's Figure 3 (tiny); it gives no learning rate."""
_PAPER_DEFORMABLE = dataclasses.replace(_PAPER, edge_layers=(*_PAPER.edge_layers, "backbone.*.conv2.offset"))
"""Convolutions that say where others read keep 8 bits: untrained ones err by 0.23 pixels at W4A6, by 0.02 at W8A8."""


def micro() -> Config:
    """A detector that trains in minutes on two cores, on the synthetic `micro` world.

    Command: make demo; about 9 minutes on two cores. Seen: NDS 0.444 to 0.474, mAP 0.397 to 0.442 (results/demo_micro_cpu.json: one run).
    """
    return Config(
        name="micro",
        data=DataConfig(root="data/micro", queue_length=2, photometric=False, workers=0),
        model=ModelConfig(
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
        quant=QuantConfig(stages=_method((0.2, 0.1, 0.2, 0.1), 0.4, learning_rate=1e-4)),
    )


def tiny() -> Config:
    """BEVFormer-Tiny: ResNet-50, 480x800, BEV 50x50; 25.2 mAP / 35.4 NDS on nuScenes val with the published checkpoint."""
    return Config(name="tiny", data=DataConfig(root="data/nuscenes"), quant=_PAPER)


def small() -> Config:
    """BEVFormer-Small: ResNet-101 with DCNv2, 736x1280, BEV 150x150; 37.0 mAP / 47.9 NDS with the published checkpoint."""
    return Config(
        name="small",
        data=DataConfig(root="data/nuscenes", image_scale=0.8, mean=_CAFFE_MEAN, std=(1.0, 1.0, 1.0), to_rgb=False),
        model=ModelConfig(
            backbone=BackboneConfig(depths=(3, 4, 23, 3), style="caffe", deformable_stages=(2, 3)),
            bev_hw=(150, 150),
        ),
        quant=_PAPER_DEFORMABLE,
    )


def base() -> Config:
    """BEVFormer-Base: ResNet-101 with DCNv2, four levels, 928x1600, BEV 200x200; 41.6 mAP / 51.7 NDS with the published checkpoint."""
    return Config(
        name="base",
        data=DataConfig(root="data/nuscenes", image_scale=1.0, mean=_CAFFE_MEAN, std=(1.0, 1.0, 1.0), to_rgb=False, queue_length=4),
        model=ModelConfig(
            backbone=BackboneConfig(depths=(3, 4, 23, 3), style="caffe", deformable_stages=(2, 3), out_stages=(1, 2, 3)),
            num_levels=4,
            bev_hw=(200, 200),
            encoder_layers=6,
        ),
        quant=_PAPER_DEFORMABLE,
    )


def at_bits(config: Config, bits: str) -> Config:
    """The same run at widths like `w4a6`: so many bits for weights and for activations of all groups.

    Weights of 4 bits or fewer bring 8-bit embeddings; at 8 and 8 bits calibration is enough, and the stages of training are dropped.
    First convolution and last linears keep the bits of `quant.edge`.

    Raises:
        ConfigError: Not of this form, or not 2 to 8 bits.
    """
    found = re.fullmatch(r"w([2-8])a([2-8])", bits)
    if found is None:
        raise ConfigError(f"--bits {bits!r}: expected w<bits>a<bits> with 2 to 8 bits each, as w4a6")
    width = Bits(weight=int(found[1]), activation=int(found[2]))
    quant = dataclasses.replace(config.quant, **dict.fromkeys(GROUPS, width))
    if width.weight <= 4:
        quant = dataclasses.replace(quant, embedding_bits=_EMBEDDING_BITS)
    if width == Bits(weight=8, activation=8):
        quant = dataclasses.replace(quant, stages=())
    return dataclasses.replace(config, quant=quant)


RECIPES: dict[str, Callable[[], Config]] = {"micro": micro, "tiny": tiny, "small": small, "base": base}

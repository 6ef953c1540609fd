"""Inputs of spatial cross-attention for measurements, with the cameras of the synthetic rig, which are close to those of nuScenes."""

import torch
from torch import Tensor

from bench.kernel_build import variants
from plugins.attention.cases import Case
from qdbev.config import Config
from qdbev.data.rig import network_rig
from qdbev.geometry import pillar_points, project
from qdbev.schema import CAMERAS


def rig(config: Config) -> tuple[Tensor, tuple[int, int]]:
    """Return lidar2img (1, N, 4, 4) of the synthetic cameras, and height and width in pixels of the padded images."""
    lidar2img, padded_hw = network_rig(config.data)
    return torch.from_numpy(lidar2img).float()[None], padded_hw


def camera_attention(config: Config, device: str) -> Case:
    """Return spatial cross-attention at the size of a recipe in float32: random numbers with the geometry of the rig."""
    model, variant = config.model, next(variants(config))
    reference_points, hit = project(pillar_points(model.bev_hw, model.num_pillar_points, model.pc_range), *rig(config))
    samples = (1, hit.shape[2], variant.num_heads, len(variant.level_hw), variant.num_points)
    return Case(
        name=config.name,
        variant=variant,
        value=torch.randn(1, len(CAMERAS), variant.num_keys, variant.num_heads, variant.channels, device=device),
        reference_points=reference_points.to(device),
        visible=hit.any(-1).float().to(device),
        sampling_offsets=2 * torch.randn(*samples, 2, device=device),
        attention_logits=torch.randn(samples, device=device),
    )

"""The shrunken tiny model of the golden numbers, with its official weights and inputs."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from golden_inputs import fill_state_dict, make_can_bus, make_images, make_lidar2img
from torch import Tensor

from qdbev.can_bus import relative_can_bus
from qdbev.detector import Output
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.detectors.bevformer.official import KEYS
from qdbev.nn.state_dict import load_official
from qdbev.recipes import RECIPES

ATOL = 1e-4
BOX_ATOL = 5e-4


def micro_config(shifted_reference: bool) -> BEVFormerConfig:
    """Tiny, shrunken."""
    return dataclasses.replace(
        RECIPES["tiny"]().model,
        embed_dim=64,
        ffn_dim=128,
        encoder_layers=2,
        decoder_layers=2,
        num_query=50,
        max_boxes=100,
        bev_hw=(20, 20),
        rotate_center=(10.0, 10.0),
        shifted_reference=shifted_reference,
        dropout=0.0,
    )


def official_micro(shifted_reference: bool) -> BEVFormer:
    """The model under the weights that belong to the official key names."""
    shapes = json.loads(Path(__file__).with_name("golden_kept.json").read_text())["shapes"]
    model = BEVFormer(micro_config(shifted_reference))
    load_official(model, {key: torch.from_numpy(value) for key, value in fill_state_dict(shapes).items()}, KEYS)
    return model.eval()


def inputs(frame: int, previous: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Images, lidar2img and relative can_bus of a frame, batch of one."""
    can_bus = relative_can_bus(make_can_bus(frame, "micro"), None if previous is None else make_can_bus(previous, "micro"))
    arrays = make_images("micro", frame), make_lidar2img("micro").astype(np.float32), can_bus
    return tuple(torch.from_numpy(array)[None] for array in arrays)


def two_frames(model: BEVFormer) -> tuple[Output, Output]:
    """A first frame without gradient, and the one after it."""
    with torch.no_grad():
        first = model(*inputs(0, None))
    return first, model(*inputs(1, 0), first.bev)


def close(ours: Tensor, golden: np.ndarray, atol: float = ATOL) -> None:
    """Equal within the golden tolerance."""
    torch.testing.assert_close(ours.detach().float(), torch.from_numpy(np.array(golden, dtype=np.float32)), atol=atol, rtol=0)

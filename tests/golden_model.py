"""Builds the shrunken network of the golden numbers with its official weights, and runs it as the official code was run."""

import dataclasses

import numpy as np
import torch
from golden_files import key_shapes
from golden_inputs import fill_state_dict, make_can_bus, make_images, make_lidar2img
from torch import Tensor

from qdbev.can_bus import relative_can_bus
from qdbev.detector import Output
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.detectors.bevformer.official import KEYS
from qdbev.nn.state_dict import load_official
from qdbev.recipes import RECIPES
from qdbev.schema import Batch
from train.stage_loss import history_state

ATOL = 1e-4
"""Largest difference from the official values. A float64 run of the official code differs from its float32 run by up to 1e-5."""
BOX_ATOL = 5e-4
"""The same for box codes, in metres where they are positions. The official float64 and float32 runs differ by up to 4e-5 there."""


def micro_config(shifted_reference: bool) -> BEVFormerConfig:
    """Return the configuration of the shrunken tiny network, without dropout."""
    return dataclasses.replace(
        RECIPES["tiny"]().model,
        embed_dim=64,
        ffn_dim=128,
        bev_hw=(20, 20),
        rotate_center=(10.0, 10.0),
        encoder_layers=2,
        decoder_layers=2,
        num_query=50,
        max_boxes=100,
        shifted_reference=shifted_reference,
        dropout=0.0,
    )


def official_micro(shifted_reference: bool) -> BEVFormer:
    """Build the shrunken network in evaluation mode, with the generated weights loaded by their official key names."""
    model = BEVFormer(micro_config(shifted_reference))
    load_official(model, {key: torch.from_numpy(value) for key, value in fill_state_dict(key_shapes("micro")).items()}, KEYS)
    return model.eval()


def inputs(frame: int, previous: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, lidar2img and can_bus of a frame as a batch of one; can_bus is relative to the previous frame, if there is one."""
    can_bus = relative_can_bus(make_can_bus(frame, "micro"), None if previous is None else make_can_bus(previous, "micro"))
    arrays = make_images("micro", frame), make_lidar2img("micro").astype(np.float32), can_bus
    return tuple(torch.from_numpy(array)[None] for array in arrays)


def forward(model: BEVFormer, given: tuple[Tensor, Tensor, Tensor], prev_bev: Tensor | None = None) -> Output:
    """Run the network on images, lidar2img and can_bus; `prev_bev` (1, BEV cells, C) is the BEV of the previous frame."""
    images, lidar2img, can_bus = given
    has_prev = torch.full((len(images),), float(prev_bev is not None))
    return model(Batch(images, lidar2img, can_bus, has_prev, boxes=[], labels=[], tokens=[]), prev_bev)[0]


def two_frames(model: BEVFormer) -> tuple[Output, Output]:
    """Run the first frame without gradient and the second frame, which gets the first one's BEV."""
    with torch.no_grad():
        first = forward(model, inputs(0, None))
    return first, forward(model, inputs(1, 0), first.bev)


def training_forward(model: BEVFormer, history: list[Batch], current: Batch) -> tuple[Tensor, Output]:
    """Run a training queue; returns the BEV of the history, computed without gradient, and the output for the last frame."""
    prev_bev = history_state(model, history)
    return prev_bev, model(current, prev_bev)[0]


def close(ours: Tensor, golden: np.ndarray, atol: float = ATOL) -> None:
    """Assert that a tensor equals the official values within the tolerance."""
    torch.testing.assert_close(ours.detach().float(), torch.from_numpy(np.array(golden, dtype=np.float32)), atol=atol, rtol=0)

"""Networks small enough to train or export inside a test, as changes of the micro recipe."""

import dataclasses

import numpy as np

from qdbev import detectors
from qdbev.config import Config
from qdbev.data.noise_frames import noise_frames
from qdbev.detector import Arrays, Deployed
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.nn.config import BackboneConfig
from qdbev.quant.calibrate import calibrate
from qdbev.recipes import RECIPES

DATA = RECIPES["micro"]().data
"""Data settings of the networks here."""
IMAGE_HW = (64, 96)
"""Padded height and width in pixels of the images of exported networks."""

INPUTS, OUTPUTS = (tuple(names) for names in (BEVFormerConfig().interface((64, 64)).inputs, BEVFormerConfig().interface((64, 64)).outputs))
"""Names of the inputs and outputs of BEVFormer's deployed graph, in order."""
TRAINED = {
    "data.image_scale": "0.2",
    "model.embed_dim": "16",
    "model.num_heads": "2",
    "model.ffn_dim": "16",
    "model.bev_hw": "(8,8)",
    "model.rotate_center": "(4.0,4.0)",
    "model.encoder_layers": "1",
    "model.decoder_layers": "2",
    "model.num_query": "20",
    "model.backbone.width": "4",
    "train.batch_size": "2",
    "train.epochs": "1",
    "quant.calibration_samples": "2",
}
"""Settings of a network that trains on the tiny world in seconds."""


def settings(**changes: str) -> list[str]:
    """Return `TRAINED` with changes, as --set takes them; a dot in a setting's name is written __ in `changes`."""
    return [f"{name}={value}" for name, value in {**TRAINED, **{key.replace("__", "."): value for key, value in changes.items()}}.items()]


def exported_network(**changes: object) -> Config:
    """Return the micro recipe with a network that exports in seconds; `changes` change fields of its BEVFormerConfig."""
    config = RECIPES["micro"]()
    small: dict[str, object] = {
        "backbone": BackboneConfig(depths=(1, 1), width=8, out_stages=(0, 1)),
        "embed_dim": 32,
        "num_heads": 4,
        "ffn_dim": 32,
        "bev_hw": (8, 8),
        "encoder_layers": 1,
        "decoder_layers": 1,
        "num_query": 12,
        "rotate_center": (4.0, 4.0),
    }
    model: BEVFormerConfig = dataclasses.replace(config.model, **{**small, **changes})
    return dataclasses.replace(config, model=model)


def first_inputs(model: BEVFormer) -> Arrays:
    """Return the deployed graph's inputs, by name, for a first frame of noise in images of `IMAGE_HW`."""
    frame, _ = noise_frames(DATA, model.config.num_cameras, IMAGE_HW)
    return detectors.stream(model.config).inputs(frame, None)


def calibrate_on_noise(model: BEVFormer, **changes: np.ndarray) -> None:
    """Calibrate a prepared network with `max` on its `first_inputs`; `changes` replace inputs by name."""
    deployed = Deployed(model).eval()
    calibrate(model, lambda: deployed.run({**first_inputs(model), **changes}), "max")

"""The detectors of this project: the union of their configs, and the one place that selects a detector by the type of its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from qdbev.detectors.bevformer.config import BEVFormerConfig

if TYPE_CHECKING:
    from qdbev.detector import Detector, FrameStream
    from qdbev.nn.state_dict import OfficialKeys

DetectorConfig = BEVFormerConfig
"""Union of all detectors' configs. In saved configs the entry `kind` names the member."""


def build(config: DetectorConfig) -> Detector:
    """Build the network of a config, with freshly initialised weights."""
    match config:
        case BEVFormerConfig():
            from qdbev.detectors.bevformer.model import BEVFormer

            return BEVFormer(config)
        case _:
            assert_never(config)


def stream(config: DetectorConfig) -> FrameStream:
    """Build the host side of a config's detector."""
    match config:
        case BEVFormerConfig():
            from qdbev.detectors.bevformer.temporal import BEVFormerStream

            return BEVFormerStream(config)
        case _:
            assert_never(config)


def official_keys(config: DetectorConfig) -> OfficialKeys:
    """Return the names of the tensors in published checkpoints of a config's detector."""
    match config:
        case BEVFormerConfig():
            from qdbev.detectors.bevformer.official import KEYS

            return KEYS
        case _:
            assert_never(config)

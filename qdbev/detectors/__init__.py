"""The detectors of this project: their configs as one union, and the one place that chooses a detector by the type of its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from qdbev.detectors.bevformer.config import BEVFormerConfig

if TYPE_CHECKING:
    from qdbev.detector import Detector, FrameStream

DetectorConfig = BEVFormerConfig
"""Union of all detectors' configs; in saved configs the entry `kind` says which one it is."""


def build(config: DetectorConfig) -> Detector:
    """The network of a config, with freshly initialised weights."""
    match config:
        case BEVFormerConfig():
            from qdbev.detectors.bevformer.model import BEVFormer

            return BEVFormer(config)
        case _:
            assert_never(config)


def stream(config: DetectorConfig) -> FrameStream:
    """The host side of a config's detector."""
    match config:
        case BEVFormerConfig():
            from qdbev.detectors.bevformer.temporal import BEVFormerStream

            return BEVFormerStream(config)
        case _:
            assert_never(config)

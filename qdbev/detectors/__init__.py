"""The detectors of this project: the union of their configs, and the one place that selects a detector by the type of its config."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

from qdbev.detectors.bevformer.config import BEVFormerConfig

if TYPE_CHECKING:
    from qdbev.detector import Detector, FrameStream
    from qdbev.nn.state_dict import OfficialKeys

DetectorConfig = BEVFormerConfig
"""Union of all detectors' configs. In saved configs the entry `kind` names the member."""


class _Parts(NamedTuple):
    """Parts of a detector that need torch, and so are imported only when they are used."""

    network: Callable[[Any], Detector]
    stream: Callable[[Any], FrameStream]
    official_keys: OfficialKeys


def _parts(config: DetectorConfig) -> _Parts:
    match config:
        case BEVFormerConfig():
            from qdbev.detectors.bevformer import model, official, temporal

            return _Parts(model.BEVFormer, temporal.BEVFormerStream, official.KEYS)
        case _:
            assert_never(config)


def build(config: DetectorConfig) -> Detector:
    """Build the network of a config, with freshly initialised weights."""
    return _parts(config).network(config)


def stream(config: DetectorConfig) -> FrameStream:
    """Build the host side of a config's detector."""
    return _parts(config).stream(config)


def official_keys(config: DetectorConfig) -> OfficialKeys:
    """Return the names of the tensors in published checkpoints of a config's detector."""
    return _parts(config).official_keys

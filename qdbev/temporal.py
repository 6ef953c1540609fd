"""What one frame hands to the next: previous BEV, ego-motion delta, scene change.

Time is a value: nothing here is remembered between calls except what the caller passes back in. How much time passes between two
frames of a scene does not matter: the delta comes from their poses, so a dropped frame or a gap leaves it exact, and the history is
kept, as upstream does.
"""

from typing import NamedTuple

import numpy as np

from qdbev.config import ModelConfig
from qdbev.schema import Frame

POSITION = slice(0, 3)
ROTATION = slice(3, 7)
YAW_RAD = 16
YAW_DEG = 17


class FrameOrderError(ValueError):
    """A frame that is not later than the one whose memory it was given."""


class Memory(NamedTuple):
    """What a frame leaves for the next of its scene: its absolute can_bus (18,) and its BEV features (1, BEV cells, C)."""

    scene_token: str
    timestamp_us: int
    can_bus: np.ndarray
    bev: np.ndarray


def delta(can_bus: np.ndarray, previous: np.ndarray | None) -> np.ndarray:
    """(18,) float32 can_bus as the network wants it: position and yaw in degrees relative to `previous`, zero without one.

    The yaw in radians stays absolute, and the degrees may jump by 360, as in the code that trained the published checkpoints
    (bevformer detectors/bevformer.py at 66b65f3).
    """
    relative = np.array(can_bus, dtype=np.float64)
    if previous is None:
        relative[POSITION] = 0
        relative[YAW_DEG] = 0
    else:
        relative[POSITION] -= previous[POSITION]
        relative[YAW_DEG] -= previous[YAW_DEG]
    return relative.astype(np.float32)


def observe(frame: Frame, memory: Memory | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Relative can_bus (18,) and the previous BEV of the same scene, or None at the start of a scene.

    Raises:
        FrameOrderError: The memory is of the same scene but not of an earlier frame.
    """
    if memory is None or memory.scene_token != frame.scene_token:
        return delta(frame.can_bus, None), None
    if frame.timestamp_us <= memory.timestamp_us:
        raise FrameOrderError(
            f"frame {frame.token!r} at {frame.timestamp_us} us is not later than the one before it at {memory.timestamp_us} us of the same "
            f"scene {frame.scene_token!r}; give frames in order of time, or start anew with memory=None"
        )
    return delta(frame.can_bus, memory.can_bus), memory.bev


def deployed_inputs(frame: Frame, memory: Memory | None, model: ModelConfig) -> dict[str, np.ndarray]:
    """The deployed graph's inputs (schema.INPUTS) for `frame`; at the start of a scene `has_prev` is 0 and `prev_bev` zeros.

    Raises:
        FrameOrderError: As `observe`.
    """
    can_bus, prev_bev = observe(frame, memory)
    rows, columns = model.bev_hw
    return {
        "images": frame.images[None],
        "lidar2img": frame.lidar2img[None],
        "can_bus": can_bus[None],
        "prev_bev": np.zeros((1, rows * columns, model.embed_dim), np.float32) if prev_bev is None else prev_bev,
        "has_prev": np.array([prev_bev is not None], np.float32),
    }


def remember(frame: Frame, bev: np.ndarray) -> Memory:
    """What `frame` leaves for the next one."""
    return Memory(frame.scene_token, frame.timestamp_us, frame.can_bus, bev)

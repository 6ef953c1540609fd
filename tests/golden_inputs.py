"""Generates the weights and inputs with which the official BEVFormer produced the golden numbers (see golden/README.md).

Every array is drawn by numpy from a generator whose seed is the CRC32 of a name, so that the repository needs to keep the official
results only. `test_golden_inputs.py` compares every array with the checksum recorded when the official code ran: a change of one bit
is found. Angles and positions are those of a rig with six cameras as in nuScenes; its frame is the lidar's (x right, y forward, z up).
"""

import zlib
from math import prod

import numpy as np

NETWORKS = {
    "tiny": {"scale": 0.5, "hw": (480, 800)},
    "micro": {"scale": 0.2, "hw": (192, 320)},
}
"""Image scale relative to 1600x900, and padded height and width in pixels, of each golden network."""

_EGO_POSES = {
    "tiny": ((601.25, 1640.5, 0.3, 37.3), (604.9, 1643.6, 0.35, 41.25)),
    "micro": ((601.25, 1640.5, 0.3, 37.3), (604.9, 1643.6, 0.35, 49.98)),
}
"""Position x, y, z in metres and yaw in degrees of the vehicle in frames 0 and 1."""

_EGO_POSITION_2 = (607.1, 1646.9, 0.32)
"""Position of the vehicle in frame 2, in metres; it turns as far after frame 1 as before it."""

_CAMERAS = (
    (0.2, 0.4, 0.1, (-0.012, 0.767, -0.326), 1266.4, 816.3, 491.5),
    (-55.9, -0.3, 0.3, (0.491, 0.548, -0.344), 1260.8, 807.9, 495.3),
    (55.1, 0.2, -0.2, (-0.502, 0.561, -0.338), 1272.6, 826.6, 479.8),
    (179.7, 0.6, -0.1, (-0.003, -0.948, -0.288), 809.2, 829.2, 481.8),
    (109.3, -0.5, 0.4, (-0.482, -0.079, -0.273), 1256.7, 792.1, 492.8),
    (-109.8, 0.3, -0.3, (0.473, -0.092, -0.265), 1259.5, 807.6, 501.4),
)
"""Yaw, pitch, roll in degrees; position in metres; focal length and principal point x, y in pixels of the 1600x900 image."""

_GAINS = (("reference_points.weight", 2.0), ("can_bus_mlp.0.weight", 0.2))
"""Weights that are scaled otherwise than by 1 / sqrt(number of inputs): end of the key, and factor."""

_SIGNAL_SCALES = (0.4, 0.3, 9.8, 0.02, 0.02, 0.1, 6.0, 0.1, 0.1)
"""Standard deviations of acceleration (m/s^2), rotation rate (rad/s) and velocity (m/s) in can_bus."""

DCN_SHAPES = {"dcn.weight": (24, 16, 3, 3), "dcn.conv_offset.weight": (27, 16, 3, 3), "dcn.conv_offset.bias": (27,)}
"""Shapes of the weights of the deformable convolution that was run alone."""


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def fill_value(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Generate one entry of an official state dict, float32 (counters int64), from its full official key and its shape.

    Normal numbers are scaled so that activations stay near one; variances and scales of normalization layers are near one.
    """
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "code_weights":
        return np.array([1.0] * 8 + [0.2] * 2, np.float32)
    normal = _rng(key).standard_normal(tuple(shape))
    is_vector = len(shape) == 1 and "embed" not in key
    return (_vector(key, leaf, normal) if is_vector else _matrix(key, leaf, normal)).astype(np.float32)


def _vector(key: str, leaf: str, normal: np.ndarray) -> np.ndarray:
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(normal)
    if leaf == "running_mean":
        return 0.1 * normal
    if key.endswith("sampling_offsets.bias"):
        return 1.5 * normal
    if key.endswith("conv_offset.bias"):
        return 0.5 * normal
    return 1 + 0.1 * normal if leaf == "weight" else 0.1 * normal


def _matrix(key: str, leaf: str, normal: np.ndarray) -> np.ndarray:
    if "embed" in key:
        is_small = "row_embed" in key or "col_embed" in key or key.endswith("_embeds")
        return 0.5 * normal if is_small else normal
    backbone_gain = 1.05 if "img_backbone" in key and leaf == "weight" else 1.0
    gain = next((gain for end, gain in _GAINS if key.endswith(end)), backbone_gain)
    return normal * (gain / np.sqrt(prod(normal.shape[1:])))


def fill_state_dict(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Generate every entry of an official state dict from its keys and shapes."""
    return {key: fill_value(key, shape) for key, shape in shapes.items()}


def make_images(network: str, frame: int) -> np.ndarray:
    """Generate normalised images (6, 3, H, W) float32: random 16-pixel blocks plus noise, zero in the padded rows below."""
    height, width = NETWORKS[network]["hw"]
    rng = _rng(f"img/{network}/{frame}")
    blocks = rng.standard_normal((6, 3, -(-height // 16), -(-width // 16)))
    images = blocks.repeat(16, axis=2).repeat(16, axis=3)[:, :, :height, :width]
    images = images + 0.3 * rng.standard_normal(images.shape)
    images[:, :, int(900 * NETWORKS[network]["scale"]) :] = 0
    return images.astype(np.float32)


def _lidar_from_cam(yaw: float, pitch: float, roll: float, position: tuple[float, ...]) -> np.ndarray:
    y, p, r = np.deg2rad([yaw, pitch, roll])
    right, forward = np.array([np.cos(y), np.sin(y), 0.0]), np.array([-np.sin(y), np.cos(y), 0.0])
    level = np.stack([right, np.array([0.0, 0.0, -1.0]), forward], axis=1)
    tilt = np.array([[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]])
    bank = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    matrix = np.eye(4)
    matrix[:3, :3] = level @ tilt @ bank
    matrix[:3, 3] = position
    return matrix


def make_lidar_from_cam() -> np.ndarray:
    """Compute the poses of the six cameras in the lidar frame, (6, 4, 4) float64, metres."""
    return np.stack([_lidar_from_cam(*camera[:4]) for camera in _CAMERAS])


def make_intrinsics() -> np.ndarray:
    """Compute the camera matrices for images of 1600x900 pixels, (6, 4, 4) float64."""
    matrices = np.tile(np.eye(4), (6, 1, 1))
    for matrix, (*_, focal, cx, cy) in zip(matrices, _CAMERAS, strict=True):
        matrix[0, 0] = matrix[1, 1] = focal
        matrix[:2, 2] = cx, cy
    return matrices


def make_lidar2img(network: str) -> np.ndarray:
    """Compute the projections from the lidar frame to pixels of the scaled image, (6, 4, 4) float64."""
    scale = NETWORKS[network]["scale"]
    pairs = zip(make_intrinsics(), make_lidar_from_cam(), strict=True)
    return np.stack([np.diag([scale, scale, 1.0, 1.0]) @ intrinsics @ np.linalg.inv(pose) for intrinsics, pose in pairs])


def make_can_bus(frame: int, network: str) -> np.ndarray:
    """Generate the absolute can_bus of frame 0, 1 or 2, (18,) float64.

    The entries are position (m), quaternion (w, x, y, z), nine signals, yaw in radians and yaw in degrees.
    """
    first, second = _EGO_POSES[network]
    if frame == 2:
        position, yaw = _EGO_POSITION_2, 2 * second[3] - first[3]
    else:
        *position, yaw = (first, second)[frame]
    half = np.deg2rad(yaw) / 2
    signals = _rng(f"can_bus/{frame}").standard_normal(9) * np.array(_SIGNAL_SCALES)
    return np.array([*position, np.cos(half), 0.0, 0.0, np.sin(half), *signals, np.deg2rad(yaw), yaw])


def make_gt(network: str) -> tuple[np.ndarray, np.ndarray]:
    """Generate ground truth: boxes (G, 9) float32 (gravity centre, w, l, h, yaw, velocity) and class indices (G,)."""
    rng = _rng(f"gt/{network}")
    number = 17 if network == "tiny" else 7
    columns = [
        rng.uniform(-45, 45, (number, 2)),
        rng.uniform(-2.0, 0.5, (number, 1)),
        np.exp(rng.uniform(-0.7, 1.8, (number, 3))),
        rng.uniform(-np.pi, np.pi, (number, 1)),
        rng.uniform(-6, 6, (number, 2)),
    ]
    return np.concatenate(columns, 1).astype(np.float32), rng.integers(0, 10, number)


def make_msda_inputs() -> dict[str, np.ndarray]:
    """Generate inputs of deformable attention: 2 samples, 3 levels, 4 heads of 8 channels, 37 queries, 4 points.

    About half of the sampling locations are outside the map, so that the zero padding is tested as well.
    """
    rng = _rng("msda")
    level_hw = np.array([[7, 11], [4, 6], [2, 3]])
    value = rng.standard_normal((2, int(level_hw.prod(1).sum()), 4, 8)).astype(np.float32)
    locations = rng.uniform(-0.2, 1.2, (2, 37, 4, 3, 4, 2)).astype(np.float32)
    weights = rng.uniform(0.0, 1.0, (2, 37, 4, 3, 4))
    weights = (weights / weights.sum((-1, -2), keepdims=True)).astype(np.float32)
    return {"value": value, "level_hw": level_hw, "locations": locations, "weights": weights}


def make_rotate_input() -> np.ndarray:
    """Generate a map to rotate, (3, 20, 20) float32: channels, rows, columns."""
    return _rng("rotate").standard_normal((3, 20, 20)).astype(np.float32)


def make_dcn_inputs() -> np.ndarray:
    """Generate the input of the deformable convolution, (2, 16, 9, 13) float32."""
    return _rng("dcn_x").standard_normal((2, 16, 9, 13)).astype(np.float32)


def make_coder_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Generate class logits and box codes, each (2 layers, 2 samples, 900, 10) float32; some centres are out of range."""
    rng = _rng("coder")
    logits = (rng.standard_normal((2, 2, 900, 10)) * 2.0 - 2.0).astype(np.float32)
    code = rng.standard_normal((2, 2, 900, 10))
    code[..., :2] *= 35.0
    code[..., 4] *= 5.0
    return logits, code.astype(np.float32)


def make_raw_images() -> np.ndarray:
    """Generate photographs before preprocessing, (6, 90, 160, 3) uint8, BGR."""
    return _rng("raw_images").integers(0, 256, (6, 90, 160, 3)).astype(np.uint8)

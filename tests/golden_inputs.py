"""Regenerates the weights and inputs behind the golden numbers of the official BEVFormer; numpy only, seeded by name.

The numbers were produced by fundamentalvision/BEVFormer at 66b65f3. Every array is drawn from a generator seeded with the CRC32 of a
name, so that nothing but the results needs to be kept.
"""

import zlib
from math import prod

import numpy as np

SHAPES = {
    "tiny": {"scale": 0.5, "hw": (480, 800)},
    "micro": {"scale": 0.2, "hw": (192, 320)},
    "micro_base": {"scale": 0.2, "hw": (192, 320)},
}
_EGO = {  # x, y, z in metres, yaw in degrees, of frames 0 and 1
    "tiny": ((601.25, 1640.5, 0.3, 37.3), (604.9, 1643.6, 0.35, 41.25)),
    "micro": ((601.25, 1640.5, 0.3, 37.3), (604.9, 1643.6, 0.35, 49.98)),
    "micro_base": ((601.25, 1640.5, 0.3, 37.3), (604.9, 1643.6, 0.35, 38.62)),
}
_EGO_FRAME_2 = (607.1, 1646.9, 0.32)
_CAMERAS = (  # yaw, pitch, roll in degrees; x, y, z in metres (lidar frame); focal length, cx, cy in pixels
    (0.2, 0.4, 0.1, (-0.012, 0.767, -0.326), 1266.4, 816.3, 491.5),
    (-55.9, -0.3, 0.3, (0.491, 0.548, -0.344), 1260.8, 807.9, 495.3),
    (55.1, 0.2, -0.2, (-0.502, 0.561, -0.338), 1272.6, 826.6, 479.8),
    (179.7, 0.6, -0.1, (-0.003, -0.948, -0.288), 809.2, 829.2, 481.8),
    (109.3, -0.5, 0.4, (-0.482, -0.079, -0.273), 1256.7, 792.1, 492.8),
    (-109.8, 0.3, -0.3, (0.473, -0.092, -0.265), 1259.5, 807.6, 501.4),
)
_GAINS = (("reference_points.weight", 2.0), ("can_bus_mlp.0.weight", 0.2))
DCN_SHAPES = {"dcn.weight": (24, 16, 3, 3), "dcn.conv_offset.weight": (27, 16, 3, 3), "dcn.conv_offset.bias": (27,)}


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def fill_value(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Value of one state dict entry, from its full official key."""
    leaf = key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "code_weights":
        return np.array([1.0] * 8 + [0.2] * 2, np.float32)
    x = _rng(key).standard_normal(tuple(shape))
    return (_scaled(key, leaf, x) if len(shape) > 1 or "embed" in key else _vector(key, leaf, x)).astype(np.float32)


def _vector(key: str, leaf: str, x: np.ndarray) -> np.ndarray:
    if leaf == "running_var":
        return 1 + 0.1 * np.abs(x)
    if leaf == "running_mean":
        return 0.1 * x
    if key.endswith("sampling_offsets.bias"):
        return 1.5 * x
    if key.endswith("conv_offset.bias"):
        return 0.5 * x
    return 1 + 0.1 * x if leaf == "weight" else 0.1 * x


def _scaled(key: str, leaf: str, x: np.ndarray) -> np.ndarray:
    if "embed" in key:
        return 0.5 * x if "row_embed" in key or "col_embed" in key or key.endswith("_embeds") else x
    gain = next((g for end, g in _GAINS if key.endswith(end)), 1.05 if "img_backbone" in key and leaf == "weight" else 1.0)
    return x * (gain / np.sqrt(prod(x.shape[1:])))


def fill_state_dict(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Every entry of a key -> shape table."""
    return {key: fill_value(key, shape) for key, shape in shapes.items()}


def make_images(variant: str, frame: int) -> np.ndarray:
    """(6, 3, H, W) network input: 16-pixel blocks and noise, zero in the padding."""
    height, width = SHAPES[variant]["hw"]
    rng = _rng(f"img/{variant}/{frame}")
    blocks = rng.standard_normal((6, 3, -(-height // 16), -(-width // 16)))
    images = blocks.repeat(16, axis=2).repeat(16, axis=3)[:, :, :height, :width]
    images = images + 0.3 * rng.standard_normal(images.shape)
    images[:, :, int(900 * SHAPES[variant]["scale"]) :] = 0
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
    """(6, 4, 4)."""
    return np.stack([_lidar_from_cam(*camera[:4]) for camera in _CAMERAS])


def make_intrinsics() -> np.ndarray:
    """(6, 4, 4) at 1600x900."""
    matrices = np.tile(np.eye(4), (6, 1, 1))
    for matrix, (*_, focal, cx, cy) in zip(matrices, _CAMERAS, strict=True):
        matrix[0, 0] = matrix[1, 1] = focal
        matrix[:2, 2] = cx, cy
    return matrices


def make_lidar2img(variant: str) -> np.ndarray:
    """(6, 4, 4) float64 with the image scale applied."""
    scale = SHAPES[variant]["scale"]
    pairs = zip(make_intrinsics(), make_lidar_from_cam(), strict=True)
    return np.stack([np.diag([scale, scale, 1.0, 1.0]) @ intrinsics @ np.linalg.inv(pose) for intrinsics, pose in pairs])


def make_can_bus(frame: int, variant: str) -> np.ndarray:
    """(18,) absolute values: position, quaternion, nine signals, yaw in radians and degrees."""
    first, second = _EGO[variant]
    position, yaw = (_EGO_FRAME_2, 2 * second[3] - first[3]) if frame == 2 else ((first, second)[frame][:3], (first, second)[frame][3])
    half = np.deg2rad(yaw) / 2
    signals = _rng(f"can_bus/{frame}").standard_normal(9) * np.array([0.4, 0.3, 9.8, 0.02, 0.02, 0.1, 6.0, 0.1, 0.1])
    return np.array([*position, np.cos(half), 0.0, 0.0, np.sin(half), *signals, np.deg2rad(yaw), yaw])


def make_gt(variant: str) -> tuple[np.ndarray, np.ndarray]:
    """Gravity-centre boxes (G, 9) and labels (G,)."""
    rng = _rng(f"gt/{variant}")
    number = 17 if variant == "tiny" else 7
    columns = [
        rng.uniform(-45, 45, (number, 2)),
        rng.uniform(-2.0, 0.5, (number, 1)),
        np.exp(rng.uniform(-0.7, 1.8, (number, 3))),
        rng.uniform(-np.pi, np.pi, (number, 1)),
        rng.uniform(-6, 6, (number, 2)),
    ]
    return np.concatenate(columns, 1).astype(np.float32), rng.integers(0, 10, number)


def make_msda_inputs() -> dict[str, np.ndarray]:
    """Two samples, three levels, 4 heads of 8 channels, 37 queries, 4 points; a third of the samples outside."""
    rng = _rng("msda")
    level_hw = np.array([[7, 11], [4, 6], [2, 3]])
    value = rng.standard_normal((2, int(level_hw.prod(1).sum()), 4, 8)).astype(np.float32)
    locations = rng.uniform(-0.2, 1.2, (2, 37, 4, 3, 4, 2)).astype(np.float32)
    weights = rng.uniform(0.0, 1.0, (2, 37, 4, 3, 4))
    weights = (weights / weights.sum((-1, -2), keepdims=True)).astype(np.float32)
    return {"value": value, "level_hw": level_hw, "locations": locations, "weights": weights}


def make_rotate_input() -> np.ndarray:
    """(3, 20, 20) channels, rows, columns."""
    return _rng("rotate").standard_normal((3, 20, 20)).astype(np.float32)


def make_dcn_inputs() -> np.ndarray:
    """(2, 16, 9, 13)."""
    return _rng("dcn_x").standard_normal((2, 16, 9, 13)).astype(np.float32)


def make_coder_inputs() -> tuple[np.ndarray, np.ndarray]:
    """Head outputs of two layers and two samples; some centres lie out of range."""
    rng = _rng("coder")
    logits = (rng.standard_normal((2, 2, 900, 10)) * 2.0 - 2.0).astype(np.float32)
    code = rng.standard_normal((2, 2, 900, 10))
    code[..., :2] *= 35.0
    code[..., 4] *= 5.0
    return logits, code.astype(np.float32)


def make_raw_images() -> np.ndarray:
    """(6, 90, 160, 3) uint8 BGR."""
    return _rng("raw_images").integers(0, 256, (6, 90, 160, 3)).astype(np.uint8)

"""Rigid transforms, the BEV grid, and projection into the cameras.

Transforms are named `<to>_from_<from>`. The BEV grid is row-major with rows along y (forward) and columns along x (right) of the lidar
frame; normalised coordinates run from 0 to 1 over `pc_range`.
"""

import numpy as np
import torch
from torch import Tensor

MIN_DEPTH = 1e-5
"""Metres in front of a camera from which a point counts as visible."""


def rigid(rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    """Return the (4, 4) float64 transform with rotation (3, 3) and translation (3,)."""
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = translation
    return matrix


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Return the inverse of a (4, 4) rigid transform."""
    rotation = matrix[:3, :3].T
    return rigid(rotation, -rotation @ matrix[:3, 3])


def rotation_z(yaw: np.ndarray | float) -> np.ndarray:
    """Return the (..., 3, 3) rotations by `yaw` (...) radians, counter-clockwise about the z axis."""
    yaw = np.asarray(yaw, dtype=np.float64)
    cos, sin, zero, one = np.cos(yaw), np.sin(yaw), np.zeros_like(yaw), np.ones_like(yaw)
    rows = [np.stack(row, -1) for row in ((cos, -sin, zero), (sin, cos, zero), (zero, zero, one))]
    return np.stack(rows, -2)


def cell_centers(bev_hw: tuple[int, int]) -> Tensor:
    """Return (H * W, 2) normalised (x, y) centres of the BEV cells, row-major."""
    rows, columns = bev_hw
    y = (torch.arange(rows, dtype=torch.float32) + 0.5) / rows
    x = (torch.arange(columns, dtype=torch.float32) + 0.5) / columns
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack((grid_x, grid_y), -1).flatten(0, 1)


def pillar_points(bev_hw: tuple[int, int], num_heights: int, pc_range: tuple[float, ...]) -> Tensor:
    """Return (num_heights, H * W, 3) points in metres: each cell centre at heights that are evenly spread over the z range.

    The lowest and the highest point are half a metre inside the range.

    Source: BEVFormer (ECCV 2022), section 3.3; bevformer/modules/encoder.py at 66b65f3.
    """
    x_min, y_min, z_min, x_max, y_max, z_max = pc_range
    depth = z_max - z_min
    heights = torch.linspace(0.5, depth - 0.5, num_heights) / depth
    plane = cell_centers(bev_hw)
    unit = torch.cat((plane.expand(num_heights, -1, -1), heights.view(-1, 1, 1).expand(-1, plane.shape[0], 1)), -1)
    low = torch.tensor((x_min, y_min, z_min))
    high = torch.tensor((x_max, y_max, z_max))
    return unit * (high - low) + low


def project(points: Tensor, lidar2img: Tensor, image_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Project lidar points into each camera.

    Args:
        points: (D, K, 3) metres, lidar frame.
        lidar2img: (B, N, 4, 4) from lidar to pixels of the padded image.
        image_hw: Padded height and width; both ends of the visible range are open.

    Returns:
        (B, N, K, D, 2) float32 normalised (u, v), and (B, N, K, D) bool, true where the point lies in front of the camera and inside
        the image. Coordinates of points behind a camera are finite but meaningless.
    """
    height, width = image_hw
    homogeneous = torch.cat((points, torch.ones_like(points[..., :1])), -1)  # (D, K, 4)
    cam = torch.einsum("bnij,dkj->bnkdi", lidar2img.float()[..., :3, :], homogeneous)  # (B, N, K, D, 3)
    depth = cam[..., 2:3]
    scale = torch.tensor((width, height), dtype=cam.dtype, device=cam.device)
    uv = cam[..., :2] / depth.clamp(min=MIN_DEPTH) / scale
    inside = ((uv > 0) & (uv < 1)).all(-1)
    return uv, inside & (depth[..., 0] > MIN_DEPTH)

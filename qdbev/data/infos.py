"""The key frames of a dataset without their images: calibration, poses, CAN bus signals, annotated boxes and image file names.

A dataset's reader returns `Infos` (for nuScenes: qdbev/data/nuscenes/tables.py); `FrameDataset` needs nothing else besides the image
files. docs/adding_a_dataset.md says what a reader must provide. `lidar2img` and `can_bus` have the names and the known errors of the
code that trained the published checkpoints (BEVFormer 66b65f3, tools/data_converter/nuscenes_converter.py and nuscenes_dataset.py).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class DatasetError(ValueError):
    """A dataset, or a part of it, is missing or damaged, or its parts contradict each other."""


class Info(NamedTuple):
    """One key frame, with N cameras and G annotated boxes. Lengths are in metres, angles in radians."""

    token: str
    scene_token: str
    timestamp_us: int
    image_files: tuple[str, ...]
    """N paths relative to the dataset's root, in the order of `schema.CAMERAS`."""
    lidar2img: np.ndarray
    """(N, 4, 4) float64 from the lidar frame to pixels of the stored images. Each camera is where it was when its image was taken, the
    lidar where it was at the key frame's time."""
    ego_from_lidar: np.ndarray
    """(4, 4) float64, from the lidar's calibration."""
    global_from_ego: np.ndarray
    """(4, 4) float64, at the time of the lidar sweep."""
    quaternion: np.ndarray
    """(4,) float64 (w, x, y, z): the rotation of `global_from_ego` with the sign that the dataset has."""
    can_bus: np.ndarray
    """(18,) float64 in the global frame; see `qdbev.can_bus`."""
    boxes: np.ndarray
    """(G, 9) float32 in the lidar frame: gravity centre x, y, z, width, length, height, SECOND yaw, velocity x, y. All annotated boxes are
    included, and the yaw is not wrapped."""
    labels: np.ndarray
    """(G,) int64, indices into `schema.CLASSES`."""
    num_points: np.ndarray
    """(G,) int64, lidar and radar points inside each box. Zero means that no sensor measured the object."""


@dataclass(frozen=True, kw_only=True)
class Infos:
    """All key frames of one version of a dataset in order of time, as arrays that worker processes can share.

    S samples (key frames), G boxes of all samples together, K splits. Text is UTF-8 bytes. Fields that `Info` has too mean the same here:
    boxes, labels and num_points of all samples follow each other, and the others have one more axis (S) in front.
    """

    token: np.ndarray
    scene_token: np.ndarray
    """The history of a frame ends where the scene changes."""
    timestamp_us: np.ndarray
    """Ascending, int64."""
    image_files: np.ndarray
    image_hw: np.ndarray
    """(2,) int64 height and width in pixels of every stored image."""
    lidar2img: np.ndarray
    ego_from_lidar: np.ndarray
    global_from_ego: np.ndarray
    quaternion: np.ndarray
    can_bus: np.ndarray
    box_start: np.ndarray
    """(S + 1,) int64. Sample s has the boxes from box_start[s] up to, but not including, box_start[s + 1]."""
    boxes: np.ndarray
    labels: np.ndarray
    num_points: np.ndarray
    split_names: np.ndarray
    """(K,) bytes."""
    in_split: np.ndarray
    """(K, S) bool, true where a sample belongs to a split."""

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.token)

    def __getitem__(self, index: int) -> Info:
        """One sample; its arrays are views into the arrays here."""
        own = slice(self.box_start[index], self.box_start[index + 1])
        return Info(
            token=self.token[index].decode(),
            scene_token=self.scene_token[index].decode(),
            timestamp_us=int(self.timestamp_us[index]),
            image_files=tuple(name.decode() for name in self.image_files[index]),
            lidar2img=self.lidar2img[index],
            ego_from_lidar=self.ego_from_lidar[index],
            global_from_ego=self.global_from_ego[index],
            quaternion=self.quaternion[index],
            can_bus=self.can_bus[index],
            boxes=self.boxes[own],
            labels=self.labels[own],
            num_points=self.num_points[own],
        )

    def split(self, name: str) -> np.ndarray:
        """(n,) indices of a split's samples in order of time. Raises DatasetError if this version has no such split."""
        known = [text.decode() for text in self.split_names]
        if name not in known:
            raise DatasetError(f"there is no split {name!r} in this version; it has {', '.join(known) or 'none'}")
        return np.flatnonzero(self.in_split[known.index(name)])

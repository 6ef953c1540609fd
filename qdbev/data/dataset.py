"""The dataset of one split: single key frames for evaluation, and short queues of successive key frames for training.

Source of the queues: BEVFormer 66b65f3, nuscenes_dataset.py prepare_train_data.
"""

from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import Dataset

from qdbev.can_bus import ROTATION
from qdbev.data.build_infos import load_or_build
from qdbev.data.config import DataConfig
from qdbev.data.image_transform import image_transform, scale_lidar2img
from qdbev.data.infos import DatasetError, Info, Infos
from qdbev.data.transforms import load_images
from qdbev.schema import Frame

_MAX_DRAWS = 1000
"""Queues drawn before a split is given up as having too few frames with objects."""


class FrameDataset(Dataset):
    """Key frames of one split in order of time.

    As a torch `Dataset` it is indexed by pairs (epoch, index) and returns queues, which depend on these and the seed only.
    """

    def __init__(self, config: DataConfig, pc_range: tuple[float, ...], split: str, training: bool, seed: int) -> None:
        """Open a split. The dataset's tables are read first if that has not been done yet.

        Args:
            pc_range: x, y, z minimum, then maximum, in metres, lidar frame. Objects outside it in x or y are left out.
            split: Name of an official split of the version, or of one in its `splits.json`.
            training: Distort the images of queues, if `config.photometric` is set as well.

        Raises:
            DatasetError: The dataset or the split is missing or incomplete.
        """
        cv2.setNumThreads(0)  # in the whole process, as a child forked after OpenCV 4.11 has started its threads hangs when it uses them
        self._config = config
        self._infos = load_or_build(config)
        self._indices = self._infos.split(split)
        self._split = split
        self._distorts = training and config.photometric
        self._seed = seed
        self._kept = _in_range(self._infos, pc_range)
        per_frame = np.diff(np.concatenate(([0], np.cumsum(self._kept)))[self._infos.box_start])
        self._has_objects = (per_frame > 0)[self._indices]
        height, width = self._infos.image_hw.tolist()
        self.transform = image_transform(config, (height, width))

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, key: tuple[int, int]) -> list[Frame]:
        epoch, index = key
        return self.queue(index, epoch)

    def info(self, index: int) -> Info:
        """Calibration, poses and all annotated boxes of a frame."""
        return self._infos[self._indices[index]]

    def frame(self, index: int, rng: np.random.Generator | None = None) -> Frame:
        """One frame; `rng` distorts its images at random."""
        position = self._indices[index]
        info = self._infos[position]
        kept = self._kept[self._infos.box_start[position] : self._infos.box_start[position + 1]]
        boxes = info.boxes[kept]
        boxes[:, 6] -= np.floor(boxes[:, 6] / (2 * np.pi) + 0.5) * np.float32(2 * np.pi)
        can_bus = info.can_bus.copy()
        if self._config.full_quaternion:
            can_bus[ROTATION] = info.quaternion
        root = Path(self._config.root)
        return Frame(
            token=info.token,
            scene_token=info.scene_token,
            timestamp_us=info.timestamp_us,
            images=load_images([root / name for name in info.image_files], self.transform, rng),
            lidar2img=scale_lidar2img(info.lidar2img, self.transform.scale).astype(np.float32),
            can_bus=can_bus,
            boxes=boxes,
            labels=info.labels[kept],
        )

    def queue(self, index: int, epoch: int) -> list[Frame]:
        """`config.queue_length` frames, oldest first; the last one is frame `index`.

        The others are the `queue_length` frames before it without a random one of them. They may belong to another scene, and the first
        frame of the split is repeated where there is no earlier one. If one of the frames has no objects, another random index is used.

        Raises:
            DatasetError: An image cannot be read, or hardly any queue of the split has objects in every frame.
        """
        rng = np.random.default_rng((self._seed, epoch, index))
        length = self._config.queue_length
        for _ in range(_MAX_DRAWS):
            left_out = index - 1 - int(rng.integers(length))
            frames = [max(0, i) for i in range(index - length, index + 1) if i != left_out]
            if self._has_objects[frames].all():
                return [self.frame(i, rng if self._distorts else None) for i in frames]
            index = int(rng.integers(len(self)))
        raise DatasetError(
            f"split {self._split!r}: {_MAX_DRAWS} draws gave no queue of {length} frames with objects in each; "
            f"{int(self._has_objects.sum())} of {len(self)} frames have any in model.pc_range; enlarge it, or train on another split"
        )


def start_worker(worker: int) -> None:
    """`worker_init_fn` for a DataLoader; it fails if OpenCV's threads have been turned on again."""
    assert cv2.getNumThreads() <= 1, f"OpenCV has {cv2.getNumThreads()} threads in loader process {worker}; call cv2.setNumThreads(0)"


def _in_range(infos: Infos, pc_range: tuple[float, ...]) -> np.ndarray:
    """(G,) bool, true for boxes with lidar or radar points whose centre is strictly inside `pc_range` in x and y."""
    x_min, y_min, _, x_max, y_max, _ = pc_range
    x, y = infos.boxes[:, 0], infos.boxes[:, 1]
    return (infos.num_points > 0) & (x > x_min) & (x < x_max) & (y > y_min) & (y < y_max)

"""Key frames of one split as the network wants them, and the short queues of them that training uses.

Source of the queue: BEVFormer 66b65f3, nuscenes_dataset.py prepare_train_data.
"""

from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import Dataset

from qdbev import can_bus
from qdbev.data.config import DataConfig
from qdbev.data.image_transform import image_transform, scale_lidar2img
from qdbev.data.infos import DatasetError, Info, Infos, load_or_build
from qdbev.data.transforms import load_images
from qdbev.schema import Frame

_MAX_DRAWS = 1000


class FrameDataset(Dataset):
    """A split's key frames in order of time.

    `frame` gives one as it is. `queue` gives what training sees, a function of (seed, epoch, index) alone; as a torch `Dataset` it is
    indexed by such (epoch, index) pairs, which is what a sampler must give.
    """

    def __init__(self, config: DataConfig, pc_range: tuple[float, ...], split: str, training: bool, seed: int) -> None:
        """Open a split; reads the dataset's tables where that has not been done yet.

        From here on OpenCV works in the calling thread only, in this whole process: loader processes share the cores as it is, and
        they would hang in a thread pool that OpenCV had started before they were forked (seen with 4.11, pthreads build).

        Args:
            config: Dataset and image settings.
            pc_range: x, y, z minimum then maximum in metres, lidar frame; objects outside it in x or y are left out.
            split: Name of an official split of the version, or of one in its `splits.json`.
            training: Distort the images of queues, if `config.photometric` is set as well.
            seed: Of queues and distortions.

        Raises:
            DatasetError: The dataset or the split is missing or incomplete.
        """
        cv2.setNumThreads(0)
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

    @property
    def padded_hw(self) -> tuple[int, int]:
        """Height and width of the network's input images."""
        return self.transform.padded_hw

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, key: tuple[int, int]) -> list[Frame]:
        """The queue of `key` = (epoch, index)."""
        epoch, index = key
        return self.queue(index, epoch)

    def info(self, index: int) -> Info:
        """Calibration, poses and unfiltered boxes of a frame."""
        return self._infos[self._indices[index]]

    def frame(self, index: int) -> Frame:
        """A frame without distortion."""
        return self._frame(index, None)

    def queue(self, index: int, epoch: int) -> list[Frame]:
        """`config.queue_length` frames, oldest first, the last of them frame `index`.

        The earlier ones are drawn from as many frames before it, one of which is left out; they may belong to another scene, and the
        first frame of the split repeats where there is nothing before it. An index whose queue has a frame without objects is
        replaced by a random other one.

        Raises:
            DatasetError: An image cannot be read, or the split has next to no queue with objects in every frame.
        """
        rng = np.random.default_rng((self._seed, epoch, index))
        frames = self._draw(index, rng)
        return [self._frame(i, rng if self._distorts else None) for i in frames]

    def _draw(self, index: int, rng: np.random.Generator) -> list[int]:
        length = self._config.queue_length
        for _ in range(_MAX_DRAWS):
            left_out = index - 1 - int(rng.integers(length))
            frames = [max(0, i) for i in range(index - length, index + 1) if i != left_out]
            if self._has_objects[frames].all():
                return frames
            index = int(rng.integers(len(self)))
        raise DatasetError(
            f"split {self._split!r}: {_MAX_DRAWS} draws gave no queue of {length} frames with objects in each; "
            f"{int(self._has_objects.sum())} of {len(self)} frames have any in model.pc_range"
        )

    def _frame(self, index: int, rng: np.random.Generator | None) -> Frame:
        position = self._indices[index]
        info = self._infos[position]
        kept = self._kept[self._infos.box_start[position] : self._infos.box_start[position + 1]]
        boxes = info.boxes[kept]
        boxes[:, 6] -= np.floor(boxes[:, 6] / (2 * np.pi) + 0.5) * np.float32(2 * np.pi)
        root = Path(self._config.root)
        return Frame(
            token=info.token,
            scene_token=info.scene_token,
            timestamp_us=info.timestamp_us,
            images=load_images([root / name for name in info.image_files], self.transform, rng),
            lidar2img=scale_lidar2img(info.lidar2img, self.transform.scale).astype(np.float32),
            can_bus=self._can_bus(info),
            boxes=boxes,
            labels=info.labels[kept],
        )

    def _can_bus(self, info: Info) -> np.ndarray:
        """(18,) absolute can_bus of its own; see `DataConfig.full_quaternion`."""
        absolute = info.can_bus.copy()
        if self._config.full_quaternion:
            absolute[can_bus.ROTATION] = info.quaternion
        return absolute


def start_worker(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: stops it where OpenCV's threads came back after the dataset was opened, instead of hanging."""
    assert cv2.getNumThreads() <= 1, f"OpenCV has {cv2.getNumThreads()} threads in loader process {worker}; call cv2.setNumThreads(0)"


def _in_range(infos: Infos, pc_range: tuple[float, ...]) -> np.ndarray:
    """(G,) bool, true for boxes that a sensor measured and whose centre lies strictly inside `pc_range` in x and y."""
    x_min, y_min, _, x_max, y_max, _ = pc_range
    x, y = infos.boxes[:, 0], infos.boxes[:, 1]
    return (infos.num_points > 0) & (x > x_min) & (x < x_max) & (y > y_min) & (y < y_max)

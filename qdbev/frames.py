"""Opens the frames of a run: one split of the dataset that the config names, with the objects that its detector can find."""

from qdbev.config import Config
from qdbev.data.dataset import FrameDataset


def open_frames(config: Config, split: str, training: bool = False) -> FrameDataset:
    """Open the key frames of `split`; objects outside the detector's `pc_range` are left out. Raises DatasetError if they are missing."""
    return FrameDataset(config.data, config.model.pc_range, split, training=training, seed=config.seed)

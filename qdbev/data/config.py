"""Settings of the dataset and of image preprocessing."""

from dataclasses import dataclass

from qdbev.settings import require, require_positive


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of the dataset and of image preprocessing."""

    root: str
    """Folder in nuScenes format (tables in `root/version`)."""
    version: str = "v1.0-trainval"
    train_split: str = "train"
    val_split: str = "val"
    stored_hw: tuple[int, int] = (900, 1600)
    """Height and width of the stored camera images in pixels, where the dataset is not open; else its tables decide."""
    image_scale: float = 0.5
    """Scale of the camera images; the result is padded at the bottom and right to `pad_multiple`."""
    pad_multiple: int = 32
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    """Per channel, in the channel order the network sees (see `to_rgb`), on the 0-255 scale."""
    std: tuple[float, ...] = (58.395, 57.12, 57.375)
    to_rgb: bool = True
    queue_length: int = 3
    """Frames of a training queue, the current one included."""
    full_quaternion: bool = False
    """can_bus[3:7] is the ego's rotation (w, x, y, z). With False it is w four times, as in the code that trained the published checkpoints
    (upstream pull request 285)."""
    photometric: bool = True
    """Random brightness, contrast, saturation, hue and channel order during training."""
    workers: int = 4
    """Loader processes; 0 loads in the training process."""

    def __post_init__(self) -> None:
        require(0 < self.image_scale <= 1, f"data.image_scale is {self.image_scale}, must be in (0, 1]")
        require_positive(self, "data", "stored_hw", "pad_multiple", "queue_length")
        require_positive(self, "data", "workers", least=0)
        require(len(self.mean) == 3 and len(self.std) == 3, "data.mean and data.std need three values each")
        require(all(s > 0 for s in self.std), f"data.std is {self.std}, must be positive")

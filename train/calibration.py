"""A float teacher to a student whose quantizers have ranges, found on frames that run as in deployment.

Pairs of successive frames are spread over the whole split, and the second of each reads the BEV of the first: ranges of the temporal
attention depend on it, and the first frames of a set are all of one place and hour.
"""

import numpy as np
import torch

from qdbev import temporal
from qdbev.config import Config
from qdbev.data.collate import frame_batch
from qdbev.data.dataset import FrameDataset
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.quant.calibrate import calibrate
from qdbev.restore import quantized


def calibrated_student(teacher: BEVFormer, config: Config, frames: FrameDataset, device: torch.device) -> BEVFormer:
    """The teacher (altered in place) with calibrated quantizers."""
    student = quantized(config, teacher).to(device)
    calibrate(student, lambda: stream(student, frames, config.quant.calibration_samples, device), config.quant.calibration)
    return student


@torch.no_grad()
def stream(model: BEVFormer, frames: FrameDataset, num_frames: int, device: torch.device) -> None:
    """Run pairs of successive frames, spread evenly over the dataset, the second of each with the first one's BEV."""
    for index in np.linspace(1, len(frames) - 1, max(num_frames // 2, 1)).astype(int):
        memory = None
        for frame in (frames.frame(index - 1), frames.frame(index)):
            can_bus, bev = temporal.observe(frame, memory)
            batch = frame_batch([frame], [can_bus], [bev is not None])
            prev_bev = None if bev is None else torch.from_numpy(bev).to(device)
            output = model(batch.images.to(device), batch.lidar2img.to(device), batch.can_bus.to(device), prev_bev)
            memory = temporal.remember(frame, output.bev.cpu().numpy())

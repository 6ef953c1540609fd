"""Turns a float teacher into a student with calibrated quantizers, on frames that run as in deployment.

Pairs of successive frames are taken from the whole split, because consecutive frames come from the same scene. The second frame of each
pair reads the state of the first, because the ranges of temporal attention depend on it.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from qdbev import detectors
from qdbev.config import Config
from qdbev.data.dataset import FrameDataset
from qdbev.detector import Deployed, Detector, run_stream
from qdbev.quant.calibrate import calibrate
from qdbev.restore import quantized
from qdbev.schema import Frame


def calibrated_student(teacher: Detector, config: Config, frames: FrameDataset, device: torch.device) -> Detector:
    """Insert quantizers into `teacher`, in place, and calibrate them on frames of `frames`; returns the student on `device`."""
    student = quantized(config, teacher).to(device)
    pairs = frame_pairs(frames, config.quant.calibration_samples)
    calibrate(student, lambda: run_sequences(student, config, pairs), config.quant.calibration)
    return student


def run_sequences(student: Detector, config: Config, sequences: Iterable[Iterable[Frame]]) -> None:
    """Run `student` over sequences of successive frames, as in deployment; each sequence starts without a history."""
    stream, deployed = detectors.stream(config.model), Deployed(student)
    for sequence in sequences:
        for _ in run_stream(stream, deployed.run, sequence):
            pass


def frame_pairs(frames: FrameDataset, num_frames: int) -> Iterator[tuple[Frame, Frame]]:
    """Yield pairs of successive frames, spread evenly over the dataset, with `num_frames` frames in all."""
    for index in np.linspace(1, len(frames) - 1, max(num_frames // 2, 1)).astype(int):
        yield frames.frame(index - 1), frames.frame(index)

"""Draws the inner state of BEVFormer for one frame: reference points of the BEV in the cameras, image features, and BEV features.

    python -m bench.views --model runs/demo/teacher.pt --out runs/demo/views

The frame has no history: the previous BEV is empty.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench import draw_views
from bench.draw_views import Views
from eval.options import add_data, chosen_data
from qdbev import command, geometry
from qdbev.artifact import atomic
from qdbev.can_bus import relative_can_bus
from qdbev.command import entry_point
from qdbev.config import from_dict
from qdbev.data.collate import frame_batch
from qdbev.data.dataset import FrameDataset
from qdbev.data.image_transform import ImageTransform
from qdbev.data.infos import DatasetError
from qdbev.detector import Output
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.frames import open_frames
from qdbev.restore import restore
from qdbev.schema import Frame
from train.loop import to_device

_log = logging.getLogger(__name__)


def views_of(model: BEVFormer, dataset: FrameDataset, index: int, device: torch.device) -> Views:
    """Run one frame through the network and collect the content of the pictures.

    Raises:
        DatasetError: The split has no such frame, or an image cannot be read.
    """
    if not 0 <= index < len(dataset):
        raise DatasetError(f"--frame is {index}, the split has {len(dataset)} frames; choose one from 0 to {len(dataset) - 1}")
    frame, info = dataset.frame(index), dataset.info(index)
    output, points, visible = _run(model.to(device), frame, device)
    cells = output.bev[0] - output.bev[0].mean(0)  # the norm itself hardly varies, because the last layer is a LayerNorm
    return Views(
        title=f"frame {index} · {frame.token[:8]}",
        images=[colors(planes, dataset.transform) for planes in frame.images],
        scaled_hw=dataset.transform.scaled_hw,
        lidar2img=frame.lidar2img,
        lidar_from_ego=geometry.inverse(info.ego_from_lidar),
        truth_boxes=frame.boxes.astype(np.float64),
        pc_range=model.config.pc_range,
        pillars=model.encoder.pillars.cpu().numpy(),
        points=points[0].cpu().numpy(),
        visible=visible[0].cpu().numpy(),
        features=[level[0].norm(dim=1).cpu().numpy() for level in output.image_features],
        bev=cells.norm(dim=1).view(model.config.bev_hw).cpu().numpy(),
    )


def colors(planes: np.ndarray, transform: ImageTransform) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a camera's (3, H, W) network input."""
    pixels = planes.transpose(1, 2, 0) * transform.std + transform.mean
    pixels = pixels.round().clip(0, 255).astype(np.uint8)
    return pixels if transform.to_rgb else pixels[:, :, ::-1]


@torch.inference_mode()
def _run(model: BEVFormer, frame: Frame, device: torch.device) -> tuple[Output, Tensor, Tensor]:
    """The network's output, and the projection of the encoder's pillar points: (1, N, K, D, 2) and visibility (1, N, K, D)."""
    batch = to_device(frame_batch([frame], [relative_can_bus(frame.can_bus, None)], [False]), device)
    image_hw = (batch.images.shape[-2], batch.images.shape[-1])
    return model(batch)[0], *geometry.project(model.encoder.pillars, batch.lidar2img, image_hw)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.views", description="Draw a frame's reference points, features and BEV.")
    parser.add_argument("--model", type=Path, required=True, help=".pt file with its seal")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--frame", type=int, default=0, metavar="INDEX", help="which frame of the split (default: 0)")
    add_data(parser)
    return parser.parse_args(argv)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Draw reference points and features of one frame."""
    args = parse_args(argv)
    device = command.parse_device(args.device or "cpu")
    seal, model = restore(args.model)
    config, split = chosen_data(from_dict(seal.config), args)
    dataset = open_frames(config, split)
    views = views_of(model, dataset, args.frame, device)
    for name, save in (("points", draw_views.save_points), ("features", draw_views.save_features)):
        path = args.out / f"frame_{args.frame:05d}_{name}.png"
        with atomic(path) as temporary:
            save(temporary, views)
        _log.info("%s", path)


if __name__ == "__main__":
    main()

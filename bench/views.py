"""Draws the inner state of BEVFormer for one frame without history: `python -m bench.views --model F --out FOLDER`."""

import logging

import numpy as np
import torch

from bench import draw_views
from bench.draw_views import Views
from eval.options import chosen_data, model_parser
from qdbev import artifact, command, geometry
from qdbev.artifact import atomic
from qdbev.can_bus import relative_can_bus
from qdbev.command import entry_point
from qdbev.config import from_dict
from qdbev.data.collate import frame_batch
from qdbev.data.dataset import FrameDataset
from qdbev.data.image_transform import ImageTransform
from qdbev.data.infos import DatasetError
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.frames import open_frames
from qdbev.restore import restore
from train.loop import to_device

_log = logging.getLogger(__name__)


@torch.inference_mode()
def views_of(model: BEVFormer, dataset: FrameDataset, index: int, device: torch.device) -> Views:
    """Run one frame through the network and collect the content of the pictures.

    Raises:
        DatasetError: The split has no such frame, or an image cannot be read.
    """
    if not 0 <= index < len(dataset):
        raise DatasetError(f"--frame is {index}, the split has {len(dataset)} frames; choose one from 0 to {len(dataset) - 1}")
    frame, info = dataset.frame(index), dataset.info(index)
    batch = to_device(frame_batch([frame], [relative_can_bus(frame.can_bus, None)], [False]), device)
    output, _ = model.to(device)(batch)
    points, visible = geometry.project(model.encoder.pillars, batch.lidar2img, batch.images.shape[-2:])
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


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Draw a frame's reference points, features and BEV."""
    parser = model_parser("bench.views", main.__doc__, ".pt file with its seal", "folder for the pictures", out_required=True)
    parser.add_argument("--frame", type=int, default=0, metavar="INDEX", help="which frame of the split (default: 0)")
    args = parser.parse_args(argv)
    artifact.require_folder(args.out)
    device = command.parse_device(args.device or "cpu")
    seal, model = restore(args.model)
    views = views_of(model, open_frames(*chosen_data(from_dict(seal.config), args)), args.frame, device)
    for name, save in (("points", draw_views.save_points), ("features", draw_views.save_features)):
        path = args.out / f"frame_{args.frame:05d}_{name}.png"
        with atomic(path) as temporary:
            save(temporary, views)
        _log.info("%s", path)


if __name__ == "__main__":
    main()

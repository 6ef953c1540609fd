"""Draws a model's detections and the ground truth: six camera images with projected boxes, and the same frame from above.

python -m eval.pictures --model runs/demo/teacher.pt --out runs/demo/pictures --frames 4
"""

import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eval import draw
from eval.draw import Scene
from eval.loop import EvaluatedFrame, evaluate_frames
from eval.open_model import open_model
from eval.options import chosen_data, model_parser
from qdbev import artifact, geometry
from qdbev.artifact import atomic
from qdbev.command import entry_point
from qdbev.data.config import DataConfig
from qdbev.data.dataset import FrameDataset
from qdbev.data.transforms import read_image
from qdbev.frames import open_frames

_log = logging.getLogger(__name__)


def choose(num_frames: int, total: int) -> list[int]:
    """Indices of `num_frames` evenly spaced frames; the first frames of the split, which have no history, are not chosen."""
    return sorted({int(index) for index in np.linspace(total / (num_frames + 1), total * num_frames / (num_frames + 1), num_frames)})


def scene_of(step: EvaluatedFrame, dataset: FrameDataset, data: DataConfig, threshold: float) -> Scene:
    """The content of a picture: the stored images of an evaluated frame, its ground truth, and detections scored `threshold` or more."""
    info = dataset.info(step.index)
    image_hw = dataset.transform.image_hw
    shown = step.detections.scores >= threshold
    return Scene(
        title=f"frame {step.index} · {step.frame.token[:8]}",
        images=[read_image(Path(data.root) / name, image_hw)[:, :, ::-1] for name in info.image_files],
        lidar2img=info.lidar2img,
        lidar_from_ego=geometry.inverse(info.ego_from_lidar),
        truth_boxes=step.frame.boxes.astype(np.float64),
        boxes=step.detections.boxes[shown].astype(np.float64),
        labels=step.detections.labels[shown],
        threshold=threshold,
    )


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Draw some frames of a split."""
    what, out = "Draw a model's detections and the ground truth.", "folder for the pictures"
    parser = model_parser("eval.pictures", what, ".pt, .onnx or .engine file with its seal", out, out_required=True)
    parser.add_argument("--frames", type=int, default=4, help="how many frames to draw (default: 4)")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score that is drawn (default: 0.3)")
    args = parser.parse_args(argv)
    artifact.require_folder(args.out)
    if args.frames < 1:
        parser.error(f"--frames is {args.frames}, must be at least 1")
    with open_model(args.model, args.device) as model:
        config, split = chosen_data(model.config, args)
        dataset = open_frames(config, split)
        chosen = choose(args.frames, len(dataset))
        for step in tqdm(evaluate_frames(model, dataset), desc="drawing", total=chosen[-1] + 1, unit="frame", disable=None):
            if step.index in chosen:
                path = args.out / f"frame_{step.index:05d}.png"
                with atomic(path) as temporary:
                    draw.save(temporary, scene_of(step, dataset, config.data, args.threshold), config.model.pc_range)
                _log.info("%s", path)
            if step.index == chosen[-1]:
                break


if __name__ == "__main__":
    main()

"""Turns detections in the lidar frame into the records that nuScenes scores: global frame, class ranges, attributes.

Source: bevformer datasets/nuscenes_dataset.py at 66b65f3 (output_to_nusc_box, lidar_nusc_box_to_global, _format_bbox).
"""

import json
from pathlib import Path

import numpy as np
from nuscenes.eval.common.config import config_factory
from scipy.spatial.transform import Rotation

from eval.nds import CONFIG
from qdbev.artifact import atomic
from qdbev.schema import CLASSES, Detections

Record = dict[str, object]
"""One box of a submission as JSON values."""
CLASS_RANGE: dict[str, float] = config_factory(CONFIG).class_range
"""Distance in metres from the ego vehicle, in its ground plane, up to which each class is scored (detection_cvpr_2019)."""
META = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}
"""The sensors and data that the detector uses, an entry that the official format requires."""
MOVING_SPEED = 0.2
"""Speed in metres per second above which an object counts as moving."""
_ATTRIBUTES = {
    **dict.fromkeys(("car", "truck", "construction_vehicle", "trailer"), ("vehicle.moving", "vehicle.parked")),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    **dict.fromkeys(("motorcycle", "bicycle"), ("cycle.with_rider", "cycle.without_rider")),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
}
"""Attribute of a moving and of a standing object of each class; barriers and cones have none."""
_FAR = 10_000.0
"""Distance in metres from the ego vehicle that is beyond every class range, so that the official filter removes a box there."""


class SubmissionError(ValueError):
    """Detections that cannot be submitted."""


def records(token: str, detections: Detections, ego_from_lidar: np.ndarray, global_from_ego: np.ndarray) -> list[Record]:
    """The records of one sample; boxes beyond their class range are left out.

    Args:
        detections: Boxes (K, 9) in the lidar frame of the key frame: gravity centre, SECOND yaw.
        ego_from_lidar: (4, 4) pose of the key frame's lidar in the ego frame.
        global_from_ego: (4, 4) pose of the ego vehicle in the global frame at the time of the key frame's lidar.

    Raises:
        SubmissionError: A detection is NaN or infinite.
    """
    boxes = np.asarray(detections.boxes, np.float64).reshape(-1, 9)
    finite = np.isfinite(boxes).all(1) & np.isfinite(detections.scores)
    if not finite.all():
        worst = int(np.argmin(finite))
        values = f"box {boxes[worst]}, score {detections.scores[worst]}"
        raise SubmissionError(f"sample {token}: detection {worst} is not finite ({values}); check the model's weights and number formats")
    global_from_lidar = global_from_ego @ ego_from_lidar
    centers = _transform(global_from_lidar, boxes[:, :3])
    distances = np.linalg.norm(_transform(ego_from_lidar, boxes[:, :3])[:, :2], axis=1)
    turns = Rotation.from_euler("z", (-boxes[:, 6] - np.pi / 2)[:, None])  # counter-clockwise from x
    rotations = (Rotation.from_matrix(global_from_lidar[:3, :3]) * turns).as_quat(scalar_first=True)
    velocities = boxes[:, 7:9] @ global_from_lidar[:2, :2].T  # the box's velocity has no z
    names = [CLASSES[label] for label in detections.labels]
    return [
        {
            "sample_token": token,
            "translation": centers[k].tolist(),
            "size": boxes[k, 3:6].tolist(),
            "rotation": rotations[k].tolist(),
            "velocity": velocities[k].tolist(),
            "detection_name": name,
            "detection_score": float(detections.scores[k]),
            "attribute_name": attribute(name, float(np.hypot(*velocities[k]))),
        }
        for k, name in enumerate(names)
        if distances[k] <= CLASS_RANGE[name]
    ]


def attribute(name: str, speed: float) -> str:
    """The attribute of a class at a speed in m/s, by BEVFormer's rule; empty for barriers and cones, which have none."""
    moving, standing = _ATTRIBUTES.get(name, ("", ""))
    return moving if speed > MOVING_SPEED else standing


def placeholder(token: str, global_from_ego: np.ndarray) -> Record:
    """A box of score zero beyond every class range, because the devkit (1.2.0) refuses a submission without boxes. It ignores this one."""
    x, y, z = global_from_ego[:3, 3].tolist()
    return {
        "sample_token": token,
        "translation": [x + _FAR, y, z],
        "size": [1.0, 1.0, 1.0],
        "rotation": [1.0, 0.0, 0.0, 0.0],
        "velocity": [0.0, 0.0],
        "detection_name": CLASSES[0],
        "detection_score": 0.0,
        "attribute_name": "",
    }


def write(path: Path, results: dict[str, list[Record]]) -> None:
    """Write the official results file from the records of every sample of the split, by its token."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({"meta": META, "results": results}, allow_nan=False))


def _transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]

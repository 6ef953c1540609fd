"""Detections of the lidar frame as the records that nuScenes scores: global frame, class ranges, attributes.

Source: bevformer datasets/nuscenes_dataset.py at 66b65f3 (output_to_nusc_box, lidar_nusc_box_to_global, _format_bbox).
"""

import json
from pathlib import Path

import numpy as np
from scipy.spatial.transform import Rotation

from qdbev.artifact import atomic
from qdbev.schema import CLASSES, Detections

Record = dict[str, object]
"""One box of a submission, as json writes it."""

CLASS_RANGE = {
    "car": 50.0,
    "truck": 50.0,
    "construction_vehicle": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "barrier": 30.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "pedestrian": 40.0,
    "traffic_cone": 30.0,
}
"""Metres from the ego vehicle, in its ground plane, up to which a class is scored (detection_cvpr_2019)."""

META = {"use_camera": True, "use_lidar": False, "use_radar": False, "use_map": False, "use_external": False}
MOVING_SPEED = 0.2
"""Metres a second from which an object counts as moving."""
_MOVING = {
    **dict.fromkeys(("car", "truck", "construction_vehicle", "bus", "trailer"), "vehicle.moving"),
    **dict.fromkeys(("motorcycle", "bicycle"), "cycle.with_rider"),
    "pedestrian": "pedestrian.moving",
}
_STILL = {
    **dict.fromkeys(("car", "truck", "construction_vehicle", "trailer"), "vehicle.parked"),
    "bus": "vehicle.stopped",
    **dict.fromkeys(("motorcycle", "bicycle"), "cycle.without_rider"),
    "pedestrian": "pedestrian.standing",
}
_FAR = 10_000.0
"""Metres east of the ego vehicle: beyond every class range, so the official filter removes what stands there."""


class SubmissionError(ValueError):
    """Detections that cannot be submitted."""


def records(token: str, detections: Detections, ego_from_lidar: np.ndarray, global_from_ego: np.ndarray) -> list[Record]:
    """Scored records of one sample; boxes beyond their class range are left out.

    Args:
        token: Of the sample.
        detections: Boxes (K, 9) in the lidar frame of the key frame: gravity centre, SECOND yaw.
        ego_from_lidar: (4, 4) of the key frame's lidar.
        global_from_ego: (4, 4) of the ego vehicle at the key frame's lidar time.

    Raises:
        SubmissionError: A detection is not finite.
    """
    boxes = np.asarray(detections.boxes, np.float64).reshape(-1, 9)
    finite = np.isfinite(boxes).all(1) & np.isfinite(detections.scores)
    if not finite.all():
        worst = int(np.argmin(finite))
        values = f"box {boxes[worst]}, score {detections.scores[worst]}"
        raise SubmissionError(f"sample {token}: detection {worst} is not finite ({values}); the model overflows")
    global_from_lidar = global_from_ego @ ego_from_lidar
    centers = _transform(global_from_lidar, boxes[:, :3])
    distances = np.linalg.norm(_transform(ego_from_lidar, boxes[:, :3])[:, :2], axis=1)
    rotations = _quaternions(global_from_lidar[:3, :3], -boxes[:, 6] - np.pi / 2)
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
    """The attribute that BEVFormer guesses from class and speed (m/s); barriers and cones have none."""
    return (_MOVING if speed > MOVING_SPEED else _STILL).get(name, "")


def placeholder(token: str, global_from_ego: np.ndarray) -> Record:
    """A box of score zero out of everything's range.

    The devkit (1.2.0) cannot tell the task from a submission without boxes and raises "Invalid box type: None". It removes this box by
    its range filter, after which every metric is that of an empty submission.
    """
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
    """Write the official results file: one key for every sample of the split, in `results` order."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps({"meta": META, "results": results}, allow_nan=False))


def _transform(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(K, 3) points through a (4, 4) transform."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


def _quaternions(rotation: np.ndarray, yaws: np.ndarray) -> np.ndarray:
    """(K, 4) unit quaternions (w, x, y, z) of a turn about z by each of `yaws` (K,), followed by `rotation` (3, 3)."""
    turned = Rotation.from_matrix(rotation) * Rotation.from_euler("z", yaws[:, None])
    return turned.as_quat(scalar_first=True)

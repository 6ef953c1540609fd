"""Frames agree with the tables, and queues depend on seed, epoch and index only."""

import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from golden_inputs import make_can_bus
from torch.utils.data import DataLoader

from qdbev.can_bus import ROTATION, YAW_DEG, YAW_RAD
from qdbev.data.collate import queue_batch
from qdbev.data.config import DataConfig
from qdbev.data.dataset import FrameDataset, start_worker
from qdbev.data.infos import DatasetError
from qdbev.schema import Frame

VERSION = "v1.0-trainval"
WIDE = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)


def open_split(
    root: Path, split: str = "train", training: bool = True, seed: int = 0, pc_range: tuple[float, ...] = WIDE, **changes: object
) -> FrameDataset:
    config = dataclasses.replace(DataConfig(root=str(root), workers=0), **changes)
    return FrameDataset(config, pc_range, split, training, seed)


def without_points(tiny_world: Path, root: Path, silent: set[int]) -> Path:
    """A copy of the tiny world without lidar points on the objects in the frames `silent` of the train split."""
    dataset = open_split(tiny_world)
    tokens = {dataset.info(index).token for index in silent}
    shutil.copytree(tiny_world / VERSION, root / VERSION)
    for folder in ("samples", "maps", "can_bus"):
        (root / folder).symlink_to(tiny_world / folder)
    path = root / VERSION / "sample_annotation.json"
    records = json.loads(path.read_text())
    for record in records:
        if record["sample_token"] in tokens:
            record.update(num_lidar_pts=0, num_radar_pts=0)
    path.write_text(json.dumps(records))
    return root


def with_poses(tiny_world: Path, root: Path, rotations: np.ndarray, translations: np.ndarray) -> Path:
    """A copy of the tiny world in which the ego of the first frames has the given rotations (quaternions) and translations."""
    info = [open_split(tiny_world).info(index) for index in range(len(rotations))]
    shutil.copytree(tiny_world / VERSION, root / VERSION)
    for folder in ("samples", "maps", "can_bus"):
        (root / folder).symlink_to(tiny_world / folder)
    data = json.loads((root / VERSION / "sample_data.json").read_text())
    lidar = {row["sample_token"]: row["ego_pose_token"] for row in data if "LIDAR_TOP" in row["filename"]}
    poses = {
        lidar[frame.token]: pose for frame, pose in zip(info, zip(rotations.tolist(), translations.tolist(), strict=True), strict=True)
    }
    records = json.loads((root / VERSION / "ego_pose.json").read_text())
    for record in records:
        if record["token"] in poses:
            record["rotation"], record["translation"] = poses[record["token"]]
    (root / VERSION / "ego_pose.json").write_text(json.dumps(records))
    return root


def blank_frame(scene_token: str, can_bus: np.ndarray) -> Frame:
    return Frame(
        token="",
        scene_token=scene_token,
        timestamp_us=0,
        images=np.zeros((6, 3, 2, 2), np.float32),
        lidar2img=np.zeros((6, 4, 4), np.float32),
        can_bus=can_bus,
        boxes=np.zeros((0, 9), np.float32),
        labels=np.zeros(0, np.int64),
    )


def positions(dataset: FrameDataset, queue: list[Frame]) -> list[int]:
    tokens = [dataset.info(index).token for index in range(len(dataset))]
    return [tokens.index(frame.token) for frame in queue]


def test_frames_have_the_documented_shapes_and_are_in_order_of_time(tiny_world: Path) -> None:
    dataset = open_split(tiny_world, "val", training=False)
    frames = [dataset.frame(index) for index in range(len(dataset))]
    assert len(frames) == 4
    assert dataset.transform.padded_hw == (96, 160)
    assert np.diff([frame.timestamp_us for frame in frames]).min() > 0
    for frame in frames:
        expected = {
            "images": ((6, 3, 96, 160), np.float32),
            "lidar2img": ((6, 4, 4), np.float32),
            "can_bus": ((18,), np.float64),
            "boxes": ((len(frame.labels), 9), np.float32),
            "labels": ((len(frame.boxes),), np.int64),
        }
        assert {name: (getattr(frame, name).shape, getattr(frame, name).dtype) for name in expected} == expected
        assert len(frame.boxes) > 0


def test_lidar2img_is_scaled_with_the_images(tiny_world: Path) -> None:
    half, whole = (open_split(tiny_world, image_scale=scale).frame(1).lidar2img for scale in (0.5, 1.0))
    point = np.array([3.0, 20.0, -1.0, 1.0])
    for small, large in zip(half @ point, whole @ point, strict=True):
        np.testing.assert_allclose(small[:2] / small[2] * 2, large[:2] / large[2], rtol=1e-5)  # float32


def test_frames_have_the_boxes_with_points_in_range_with_their_yaw_wrapped(tiny_world: Path, tmp_path: Path) -> None:
    pc_range = (-12.0, -51.2, -5.0, 51.2, 9.0, 3.0)
    dataset = open_split(without_points(tiny_world, tmp_path, {2}), pc_range=pc_range)
    wrapped = 0
    for index in range(len(dataset)):
        info, frame = dataset.info(index), dataset.frame(index)
        kept = [
            (box, label)
            for box, label, points in zip(info.boxes, info.labels, info.num_points, strict=True)
            if points > 0 and -12 < box[0] < 51.2 and -51.2 < box[1] < 9
        ]
        assert len(frame.boxes) == len(kept) < len(info.boxes)
        assert frame.labels.tolist() == [label for _, label in kept]
        for box, (raw, _) in zip(frame.boxes, kept, strict=True):
            np.testing.assert_array_equal(np.delete(box, 6), np.delete(raw, 6))
            np.testing.assert_allclose(np.exp(1j * box[6]), np.exp(1j * raw[6]), atol=1e-6)
            assert -np.pi <= box[6] <= np.float32(np.pi)
            wrapped += box[6] != raw[6]
    assert wrapped > 0
    assert len(dataset.frame(2).boxes) == 0


def test_changing_a_frame_does_not_change_the_infos(tiny_world: Path) -> None:
    dataset = open_split(tiny_world)
    before = dataset.info(1).boxes.copy(), dataset.info(1).can_bus.copy()
    frame = dataset.frame(1)
    frame.boxes[:] = 0
    frame.can_bus[:] = 0
    np.testing.assert_array_equal(dataset.info(1).boxes, before[0])
    np.testing.assert_array_equal(dataset.info(1).can_bus, before[1])


@pytest.mark.parametrize("full", [False, True])
def test_can_bus_has_the_whole_quaternion_only_if_the_config_says_so(
    tiny_world: Path, tmp_path: Path, golden_modules: dict[str, np.ndarray], full: bool
) -> None:
    official, rotations = (
        golden_modules["info_can_bus"],
        golden_modules["info_quats"] * np.array([[1], [-1], [1]]),
    )  # q and -q are one rotation
    root = with_poses(tiny_world, tmp_path, rotations, official[:, :3])
    found = np.stack([open_split(root, full_quaternion=full).frame(index).can_bus for index in range(3)])
    np.testing.assert_array_equal(found[:, ROTATION], rotations if full else rotations[:, :1].repeat(4, 1))
    moves = [0, 1, 2, YAW_RAD, YAW_DEG]
    np.testing.assert_allclose(found[:, moves], official[:, moves], atol=1e-11)  # degrees of float64
    assert open_split(root).frame(0).can_bus[3:7].tolist() == [rotations[0, 0]] * 4  # the default repeats w, as BEVFormer does


def test_the_whole_quaternion_reaches_the_network_unchanged(tiny_world: Path) -> None:
    dataset = open_split(tiny_world, queue_length=2, photometric=False, full_quaternion=True)
    history, current = queue_batch([dataset[(0, 6)]])
    for batch in (*history, current):
        index = [dataset.info(i).token for i in range(len(dataset))].index(batch.tokens[0])
        w, x, y, z = batch.can_bus[0, ROTATION].double().tolist()
        expected = dataset.info(index).global_from_ego[:2, :2]
        np.testing.assert_allclose([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z)]], expected[:1], atol=1e-6)  # float32
        assert z != w


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_queue_ends_with_its_frame_and_leaves_one_candidate_out(tiny_world: Path, length: int) -> None:
    dataset = open_split(tiny_world, queue_length=length, photometric=False)
    seen = set()
    for epoch in range(12):
        found = positions(dataset, dataset.queue(5, epoch))
        assert len(found) == length
        assert found[-1] == 5
        assert found == sorted(set(found))
        assert set(found[:-1]) < set(range(5 - length, 5))
        seen.add(tuple(found))
    assert len(seen) == (length if length > 1 else 1)


def test_the_first_frame_is_repeated_where_there_is_no_earlier_one(tiny_world: Path) -> None:
    dataset = open_split(tiny_world, photometric=False)
    assert positions(dataset, dataset.queue(0, 0)) == [0, 0, 0]


@pytest.mark.parametrize(("length", "index"), [(3, 1), (3, 2), (4, 2), (4, 5)])
def test_a_queue_has_all_candidates_but_one_and_the_first_frame_instead_of_those_before_the_split(
    tiny_world: Path, length: int, index: int
) -> None:
    dataset = open_split(tiny_world, queue_length=length, photometric=False)
    candidates = [max(0, index - back) for back in range(length, 0, -1)]
    allowed = {(*candidates[:out], *candidates[out + 1 :], index) for out in range(length)}
    assert {tuple(positions(dataset, dataset.queue(index, epoch))) for epoch in range(25)} == allowed


def test_queues_depend_on_seed_epoch_and_index_only(tiny_world: Path) -> None:
    def pixels(seed: int, epoch: int) -> np.ndarray:
        return np.stack([frame.images for frame in open_split(tiny_world, seed=seed)[epoch, 6]])

    same, again = pixels(1, 2), pixels(1, 2)
    np.testing.assert_array_equal(same, again)
    assert not np.array_equal(same, pixels(1, 3))
    assert not np.array_equal(same, pixels(2, 2))


def test_only_training_queues_are_distorted(tiny_world: Path) -> None:
    plain = open_split(tiny_world, training=False)
    trained = open_split(tiny_world, training=True)
    np.testing.assert_array_equal(plain.queue(3, 0)[-1].images, plain.frame(3).images)
    np.testing.assert_array_equal(trained.frame(3).images, plain.frame(3).images)
    assert not np.array_equal(trained.queue(3, 0)[-1].images, plain.frame(3).images)


def test_queues_with_a_frame_without_objects_are_redrawn(tiny_world: Path, tmp_path: Path) -> None:
    dataset = open_split(without_points(tiny_world, tmp_path, {2, 3}), photometric=False)
    ends = set()
    for epoch in range(20):
        found = positions(dataset, dataset.queue(3, epoch))
        assert not {2, 3} & set(found)
        ends.add(found[-1])
        assert found == positions(dataset, dataset.queue(3, epoch))
    assert len(ends) > 1


def test_a_split_without_objects_cannot_be_trained_on(tiny_world: Path) -> None:
    dataset = open_split(tiny_world, pc_range=(90.0, 90.0, -5.0, 91.0, 91.0, 3.0))
    with pytest.raises(DatasetError, match="'train': 1000 draws .* 0 of 8 frames have any in model.pc_range"):
        dataset.queue(3, 0)


def test_motion_along_a_queue_matches_the_official_code(golden_modules: dict[str, np.ndarray]) -> None:
    history, current = queue_batch([[blank_frame("a", can_bus) for can_bus in golden_modules["info_can_bus"]]])
    found = torch.cat([batch.can_bus for batch in (*history, current)])
    np.testing.assert_allclose(found, golden_modules["queue_can_bus"], atol=2e-5)  # float32 of degrees
    assert [bool(batch.has_prev) for batch in (*history, current)] == golden_modules["queue_prev_exists"].tolist()


def test_the_history_in_a_queue_ends_where_the_scene_changes() -> None:
    queue = [blank_frame(scene, make_can_bus(frame, "tiny")) for frame, scene in enumerate("aab")]
    other = [blank_frame(scene, make_can_bus(frame, "tiny")) for frame, scene in enumerate("abb")]
    history, current = queue_batch([queue, other])
    assert [batch.has_prev.tolist() for batch in (*history, current)] == [[0, 0], [1, 0], [0, 1]]
    assert current.has_prev.dtype == torch.float32
    assert (current.can_bus[0, [0, 1, 2, YAW_DEG]] == 0).all()
    assert (current.can_bus[1, [0, 1, YAW_DEG]] != 0).all()
    assert current.can_bus[0, YAW_RAD] == np.float32(queue[2].can_bus[YAW_RAD])


def test_batches_from_a_loader_equal_those_made_directly_from_the_dataset(tiny_world: Path) -> None:
    cv2.setNumThreads(2)
    for _ in range(20):
        cv2.resize(np.zeros((900, 1600, 3), np.float32), (1280, 720))  # starts OpenCV's threads, which do not survive a fork
    dataset = open_split(tiny_world, queue_length=2)
    keys = [(1, 5), (1, 2), (1, 7), (1, 0)]
    loader = DataLoader(
        dataset, batch_size=2, sampler=keys, num_workers=1, collate_fn=queue_batch, worker_init_fn=start_worker, timeout=100
    )
    for number, (history, current) in enumerate(loader):
        expected_history, expected = queue_batch([dataset[key] for key in keys[2 * number : 2 * number + 2]])
        assert len(history) == len(expected_history) == 1
        for found, wanted in ((history[0], expected_history[0]), (current, expected)):
            assert found.tokens == wanted.tokens
            for name in ("images", "lidar2img", "can_bus", "has_prev"):
                torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=0)
            for name in ("boxes", "labels"):
                torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=0, atol=0)

"""Time passes between frames as it did in the official code: streams, training queues, dropped frames, gaps, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from golden_inputs import make_can_bus, make_images, make_lidar2img, make_rotate_input
from golden_model import micro_config
from torch import Tensor

from eval.loop import evaluate_frames
from eval.open_model import OpenModel
from qdbev import can_bus as layout
from qdbev.can_bus import relative_can_bus
from qdbev.config import Config
from qdbev.data.collate import queue_batch
from qdbev.data.config import DataConfig
from qdbev.detector import Arrays, FrameOrderError
from qdbev.detectors.bevformer.config import BEVFormerConfig
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.detectors.bevformer.temporal import BEVFormerStream, Memory
from qdbev.ops.rotate import rotate_bev
from qdbev.schema import Frame
from train.stage_loss import history_state

BEV = np.ones((1, 4, 2), np.float32)
STREAM = BEVFormerStream(BEVFormerConfig())
MOVING = [*range(3), layout.YAW_DEG]


def seen(can_bus: np.ndarray, time_s: float, scene: str = "a", images: np.ndarray | None = None) -> Frame:
    """A frame without objects."""
    return Frame(
        token=f"{scene}{time_s}",
        scene_token=scene,
        timestamp_us=round(time_s * 1e6),
        images=np.zeros((6, 3, 2, 2), np.float32) if images is None else images,
        lidar2img=make_lidar2img("micro").astype(np.float32),
        can_bus=can_bus,
        boxes=np.zeros((0, 9), np.float32),
        labels=np.zeros(0, np.int64),
    )


def remember(frame: Frame, bev: np.ndarray) -> Memory:
    """The memory for the frame after `frame`."""
    return STREAM.remember(frame, {"bev": bev})


def heading(degrees: float) -> np.ndarray:
    """(18,) can_bus of a standing vehicle with this heading."""
    can_bus = np.zeros(18)
    can_bus[layout.YAW_DEG], can_bus[layout.YAW_RAD] = degrees, np.deg2rad(degrees)
    return can_bus


def streamed(frames: list[Frame]) -> tuple[np.ndarray, list[bool]]:
    """Relative can_bus of each frame (F, 18), and whether it had a history."""
    memory, vectors, known = None, [], []
    for frame in frames:
        inputs = STREAM.inputs(frame, memory)
        memory = remember(frame, BEV)
        vectors.append(inputs["can_bus"][0])
        known.append(inputs["has_prev"].tolist() == [1.0])
    return np.stack(vectors), known


def turned(degrees: float, center: tuple[float, float] = (10.0, 10.0)) -> Tensor:
    """(400, 3) golden map rotated by `degrees`."""
    given = torch.from_numpy(make_rotate_input()).flatten(1).T[None]
    return rotate_bev(given, torch.tensor([degrees]), (20, 20), center)[0]


def test_a_stream_moves_as_in_the_official_code(golden_modules, golden_micro):
    found, known = streamed([seen(can_bus, 0.5 * index) for index, can_bus in enumerate(golden_modules["info_can_bus"])])
    np.testing.assert_allclose(found, golden_modules["queue_can_bus"], atol=2e-5)  # float32 of degrees
    assert known == golden_modules["queue_prev_exists"].tolist()
    found, known = streamed([seen(make_can_bus(index, "micro"), 0.5 * index) for index in range(3)])
    np.testing.assert_allclose(found, golden_micro["train_can_bus"], atol=2e-6)
    np.testing.assert_allclose(found[:2], [golden_micro["f0_can_bus_used"], golden_micro["f1_can_bus_used"]], atol=2e-6)
    assert known == golden_micro["train_prev_exists"].tolist()


def test_a_queue_and_a_stream_of_the_same_frames_move_alike():
    frames = [seen(make_can_bus(index, "micro"), 0.5 * index, scene) for index, scene in enumerate("aab")]
    found, known = streamed(frames)
    history, current = queue_batch([frames])
    np.testing.assert_array_equal(torch.cat([batch.can_bus for batch in (*history, current)]), found)
    assert [bool(batch.has_prev) for batch in (*history, current)] == known == [False, True, False]


def test_after_a_dropped_frame_the_motion_is_the_sum_of_the_two(golden_micro):
    frames = [seen(make_can_bus(index, "micro"), 0.5 * index) for index in range(3)]
    found, known = streamed([frames[0], frames[2]])
    assert known == [False, True]
    whole = golden_micro["train_can_bus"]
    np.testing.assert_allclose(found[1, MOVING], whole[1, MOVING] + whole[2, MOVING], atol=2e-6)
    np.testing.assert_array_equal(found[1, 3:17], streamed(frames)[0][2, 3:17])  # nothing else is relative
    assert found[1, layout.YAW_DEG] == pytest.approx(25.36)


@pytest.mark.parametrize("degrees", [25.36, -178.48, 12.68])
def test_the_history_is_turned_by_the_whole_motion(degrees):
    given, found = make_rotate_input().transpose(1, 2, 0), turned(degrees).view(20, 20, 3).numpy()
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    inside = 0
    for row, column in np.ndindex(20, 20):
        x, y = column - 9.5, row - 9.5
        source = np.array([sin * x + cos * y, cos * x - sin * y]) + 9.5  # row, column
        if np.abs(source % 1 - 0.5).min() < 1e-4:
            continue  # either neighbour will do
        cell = np.rint(source).astype(int)
        known = (cell >= 0).all() and (cell < 20).all()
        np.testing.assert_array_equal(found[row, column], given[tuple(cell)] if known else 0)
        inside += known
    assert inside > 250


def test_a_heading_that_wraps_turns_the_history_the_short_way_and_stays_absolute_in_radians():
    east, again = heading(350.0), heading(10.0)
    delta = relative_can_bus(again, east)
    assert delta[layout.YAW_DEG] == -340  # as upstream; the network reads it so
    assert delta[layout.YAW_RAD] == np.float32(np.deg2rad(10))
    assert relative_can_bus(east, again)[layout.YAW_DEG] == 340
    torch.testing.assert_close(turned(-340.0), turned(20.0), atol=0, rtol=0)
    assert not torch.equal(turned(20.0), turned(-20.0))


@pytest.mark.parametrize("wrap", [-360, 360])
def test_a_jump_of_360_degrees_leaves_the_turned_history_as_the_official_code_has_it(golden_modules, wrap):
    for (degrees, x, y), golden in zip(golden_modules["rotate_cases"], golden_modules["rotate_out"], strict=True):
        found = turned(float(degrees) + wrap, (float(x), float(y))).T.reshape(3, 20, 20)
        torch.testing.assert_close(found, torch.from_numpy(golden), atol=0, rtol=0)


def test_a_gap_within_a_scene_keeps_the_history_and_the_exact_motion():
    near, far = (streamed([seen(make_can_bus(0, "micro"), 0.0), seen(make_can_bus(1, "micro"), time)]) for time in (0.5, 3600.0))
    np.testing.assert_array_equal(near[0], far[0])
    assert near[1] == far[1] == [False, True]


@pytest.mark.parametrize("time_s", [7.5, 7.0, -1.0])
def test_a_frame_that_is_not_later_is_refused_with_both_times(time_s):
    memory = remember(seen(heading(0), 7.5), BEV)
    late = seen(heading(1), time_s)
    message = rf"{late.timestamp_us} us is not later than the one before it at 7500000 us .*'a'; .*memory=None\Z"
    with pytest.raises(FrameOrderError, match=message):
        STREAM.inputs(late, memory)
    assert STREAM.inputs(late, None)["has_prev"].tolist() == [0.0]


def test_another_scene_may_have_been_recorded_earlier():
    found, known = streamed([seen(heading(5), 100.0, "a"), seen(heading(50), 1.0, "b"), seen(heading(60), 1.5, "b")])
    assert known == [False, False, True]
    assert found[:, layout.YAW_DEG].tolist() == [0, 0, 10]


class Stream:
    """The part of a dataset that the evaluation loop uses."""

    def __init__(self, frames: list[Frame]) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, index: int) -> Frame:
        return self.frames[index]


def evaluated(frames: list[Frame]) -> list[Arrays]:
    """The inputs of a model whose BEV is the number of the call."""
    config, given = Config(name="small", data=DataConfig(root=""), model=small_config()), []

    def run(inputs: Arrays) -> Arrays:
        given.append(inputs)
        model = config.model
        outputs = {"cls_logits": np.zeros((1, model.num_query, 10), np.float32), "box_code": np.zeros((1, model.num_query, 10), np.float32)}
        return {**outputs, "bev": np.full((1, 64, model.embed_dim), len(given), np.float32)}

    assert len(list(evaluate_frames(OpenModel(config, run), Stream(frames)))) == len(frames)
    return given


def test_the_evaluation_loop_carries_on_after_a_dropped_frame_and_starts_anew_with_a_scene(golden_micro):
    frames = [seen(make_can_bus(index, "micro"), 0.5 * index) for index in range(3)]
    first, third, other = evaluated([frames[0], frames[2], seen(heading(30), 9.0, "b")])
    assert [inputs["has_prev"].item() for inputs in (first, third, other)] == [0, 1, 0]
    assert [inputs["prev_bev"].max() for inputs in (first, third, other)] == [0, 1, 0]
    whole = golden_micro["train_can_bus"]
    np.testing.assert_allclose(third["can_bus"][0, MOVING], whole[1, MOVING] + whole[2, MOVING], atol=2e-6)
    assert (other["can_bus"][0, MOVING] == 0).all()


def test_the_evaluation_loop_refuses_a_stream_that_is_replayed():
    frames = [seen(heading(index), 0.5 * index) for index in range(3)]
    with pytest.raises(FrameOrderError, match="0 us is not later than the one before it at 1000000 us"):
        evaluated([*frames, *frames])


def small_config() -> BEVFormerConfig:
    config = micro_config(shifted_reference=True)
    backbone = dataclasses.replace(config.backbone, width=4)
    sizes = {"embed_dim": 16, "num_heads": 2, "ffn_dim": 16, "num_query": 20, "bev_hw": (8, 8), "rotate_center": (4.0, 4.0)}
    return dataclasses.replace(config, backbone=backbone, **sizes)


@pytest.fixture(scope="module")
def model() -> BEVFormer:
    """A small network with random weights."""
    torch.manual_seed(0)
    return BEVFormer(small_config()).eval()


@pytest.fixture(scope="module")
def frames() -> dict[str, Frame]:
    """Three frames of scene a, then three of b somewhere else."""
    found = {}
    for number, name in enumerate(("a0", "a1", "a2", "b0", "b1", "b2")):
        can_bus = make_can_bus(number % 3, "micro") + (name[0] == "b") * np.array([500.0, -80, 1, *[0] * 13, 1, np.rad2deg(1)])
        images = make_images("micro", number)[:, :, :64, :96]
        found[name] = seen(can_bus, 0.5 * number, name[0], np.ascontiguousarray(images))
    return found


@torch.no_grad()
def last_bev(model: BEVFormer, *queues: list[Frame]) -> Tensor:
    """(B, BEV cells, C) BEV of the last frames, computed as in training."""
    history, current = queue_batch(list(queues))
    return model.advance(current, history_state(model, history))


@pytest.mark.parametrize(
    ("crossing", "afresh"),
    [("a1 a2 b0", "b0"), ("a2 b0 b1", "b0 b1"), ("a2 b0 b1", "a0 b0 b1"), ("a1 a2 b0 b2", "b0 b2")],
)
def test_a_queue_that_crosses_into_a_scene_is_as_if_it_began_there(model, frames, crossing, afresh):
    found, expected = (last_bev(model, [frames[name] for name in names.split()]) for names in (crossing, afresh))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    same_scene = [dataclasses.replace(frames[name], scene_token="b") for name in crossing.split()]
    assert not torch.allclose(found, last_bev(model, same_scene), atol=1e-3)


def test_queues_of_a_batch_do_not_share_their_histories(model, frames):
    queues = [[frames[name] for name in names.split()] for names in ("a0 a1 a2", "a2 b0 b1", "a1 a2 b0", "a0 a0 a0")]
    together = last_bev(model, *queues)
    for bev, queue in zip(together, queues, strict=True):
        torch.testing.assert_close(bev, last_bev(model, queue)[0], atol=2e-5, rtol=1e-4)  # convolutions of other batch sizes


def test_a_dropped_frame_turns_and_shifts_the_history_of_the_network_by_the_whole_motion(model, frames):
    found = last_bev(model, [frames["a0"], frames["a2"]])
    stream = STREAM.inputs(frames["a2"], remember(frames["a0"], BEV))["can_bus"]
    history, current = queue_batch([[frames["a0"], frames["a2"]]])
    assert not torch.allclose(found, last_bev(model, [frames["a1"], frames["a2"]]), atol=1e-3)
    with torch.no_grad():
        alone = model.advance(current._replace(can_bus=torch.from_numpy(stream)), history_state(model, history))
    torch.testing.assert_close(found, alone, atol=0, rtol=0)

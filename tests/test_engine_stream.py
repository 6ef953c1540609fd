"""The streaming detector, with a real network in onnxruntime: the same boxes as in evaluation, and one clear error for a bad frame."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from engine.preprocess import FrameError, Preprocessor
from engine.stream import StreamingDetector
from eval.loop import evaluate_frames
from eval.open_model import OpenModel
from export.runner import OnnxRunner
from qdbev import artifact
from qdbev.config import Config, from_dict
from qdbev.data.dataset import FrameDataset
from qdbev.data.transforms import read_image
from qdbev.detector import Arrays, FrameOrderError
from qdbev.schema import Detections, Frame

NETWORK = Path(__file__).with_name("format1") / "w4a6.onnx"
"""A small network for the images of the tiny world, as sealed ONNX."""
CONFIG = from_dict(artifact.unseal(NETWORK, "onnx").config)


@pytest.fixture(scope="module")
def dataset(tiny_world: Path) -> FrameDataset:
    """Two scenes of four frames, from files."""
    return FrameDataset(dataclasses.replace(CONFIG.data, root=str(tiny_world)), CONFIG.model.pc_range, "train", training=False, seed=0)


@pytest.fixture(scope="module")
def runner() -> OnnxRunner:
    return OnnxRunner(NETWORK)


@pytest.fixture
def detector(runner: OnnxRunner) -> StreamingDetector:
    return StreamingDetector(runner, CONFIG, runner.interface)


def evaluated(runner: OnnxRunner, dataset: FrameDataset) -> list[Detections]:
    """Detections of the evaluation loop for each frame."""
    return [step.detections for step in evaluate_frames(OpenModel(CONFIG, runner), dataset)]


def agree(found: Detections, wanted: Detections) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_stream_finds_what_evaluation_finds_and_starts_anew_with_a_scene(
    detector: StreamingDetector, runner: OnnxRunner, dataset: FrameDataset
) -> None:
    wanted = evaluated(runner, dataset)
    assert len({dataset.frame(index).scene_token for index in range(len(dataset))}) == 2
    for index in range(len(dataset)):
        agree(detector(dataset.frame(index)), wanted[index])
    assert len(wanted[-1].boxes) > 0


def test_a_reset_is_the_beginning_of_a_scene(detector: StreamingDetector, dataset: FrameDataset) -> None:
    first, second = dataset.frame(0), dataset.frame(1)
    alone = detector(second)
    detector.reset()
    detector(first)
    followed = detector(second)
    assert not np.array_equal(alone.scores, followed.scores)
    detector.reset()
    agree(detector(second), alone)


def without_nan(value: np.ndarray) -> np.ndarray:
    """A copy of an array with one NaN in the middle."""
    changed = value.copy()
    changed.flat[changed.size // 2] = np.nan
    return changed


def changed(frame: Frame, name: str) -> Frame:
    """A copy of a frame in which the field `name` is wrong."""
    later = dataclasses.replace(frame, timestamp_us=frame.timestamp_us + 500_000)
    return {
        "nan in images": lambda: dataclasses.replace(later, images=without_nan(frame.images)),
        "infinity in images": lambda: dataclasses.replace(later, images=np.where(frame.images == frame.images.max(), np.inf, frame.images)),
        "nan in lidar2img": lambda: dataclasses.replace(later, lidar2img=without_nan(frame.lidar2img)),
        "nan in can_bus": lambda: dataclasses.replace(later, can_bus=without_nan(frame.can_bus)),
        "five cameras": lambda: dataclasses.replace(later, images=frame.images[:5], lidar2img=frame.lidar2img[:5]),
        "small images": lambda: dataclasses.replace(later, images=frame.images[..., :-32]),
        "double images": lambda: dataclasses.replace(later, images=frame.images.astype(np.float64)),
        "same time": lambda: frame,
        "earlier": lambda: dataclasses.replace(frame, timestamp_us=frame.timestamp_us - 1),
    }[name]()


@pytest.mark.parametrize(
    ("mistake", "kind", "message"),
    [
        ("nan in images", FrameError, r"1 of \d+ values of images are NaN or infinite"),
        ("infinity in images", FrameError, r"values of images are NaN or infinite"),
        ("nan in lidar2img", FrameError, "1 of 96 values of lidar2img are NaN"),
        ("nan in can_bus", FrameError, "1 of 18 values of can_bus are NaN"),
        ("five cameras", FrameError, r"images is of shape \(5, 3, \d+, \d+\), the network takes \(6, 3,"),
        ("small images", FrameError, r"images is of shape \(6, 3, \d+, \d+\), the network takes"),
        ("double images", FrameError, "images is float64, the network takes float32"),
        ("same time", FrameOrderError, r"is not later than the one before it at \d+ us .*Detector\.reset\(\)"),
        ("earlier", FrameOrderError, "is not later than the one before it"),
    ],
)
def test_a_bad_frame_is_one_clear_error_and_the_next_goes_on_as_after_a_dropped_frame(
    detector: StreamingDetector, dataset: FrameDataset, mistake: str, kind: type[ValueError], message: str
) -> None:
    frames = [dataset.frame(index) for index in range(3)]
    detector(frames[0])
    detector(frames[1])
    wanted = detector(frames[2])
    detector.reset()
    detector(frames[0])
    detector(frames[1])
    with pytest.raises(kind, match=message):
        detector(changed(frames[1], mistake))
    agree(detector(frames[2]), wanted)


def test_a_network_that_fails_leaves_the_history_as_it_was(runner: OnnxRunner, dataset: FrameDataset) -> None:
    wanted, lost = evaluated(runner, dataset), []

    def run(inputs: Arrays) -> Arrays:
        if lost:
            raise ValueError(lost.pop())
        return runner(inputs)

    detector = StreamingDetector(run, CONFIG, runner.interface)
    for index in range(3):
        lost.append("no memory for this frame")
        with pytest.raises(ValueError, match="no memory"):
            detector(dataset.frame(index))
        agree(detector(dataset.frame(index)), wanted[index])


def test_boxes_that_are_not_finite_are_refused_and_their_history_is_dropped(runner: OnnxRunner, dataset: FrameDataset) -> None:
    config: Config = CONFIG
    poison: list[bool] = []

    def run(inputs: Arrays) -> Arrays:
        outputs = runner(inputs)
        return {name: value * np.float32(np.nan) for name, value in outputs.items()} if poison else outputs

    detector = StreamingDetector(run, config, runner.interface)
    alone = detector(dataset.frame(2))
    detector.reset()
    detector(dataset.frame(0))
    poison.append(True)
    with pytest.raises(FrameError, match="the network's cls_logits is not finite; the next frame starts without a history"):
        detector(dataset.frame(1))
    poison.clear()
    agree(detector(dataset.frame(2)), alone)


def test_camera_images_become_the_frame_that_evaluation_reads_from_files(
    detector: StreamingDetector, runner: OnnxRunner, dataset: FrameDataset, tiny_world: Path
) -> None:
    info, wanted = dataset.info(0), dataset.frame(0)
    images = [read_image(tiny_world / name, (180, 320)) for name in info.image_files]
    frame = detector.prepare(images, info.lidar2img, wanted.can_bus, wanted.timestamp_us, wanted.scene_token)
    np.testing.assert_array_equal(frame.images, wanted.images)
    np.testing.assert_array_equal(frame.lidar2img, wanted.lidar2img)
    agree(detector(frame), evaluated(runner, dataset)[0])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((180, 320, 3), np.uint8)] * 5, r"5 camera images; the network takes 6 \(CAM_FRONT, CAM_FRONT_RIGHT"),
        ([], "0 camera images"),
        ([np.zeros((120, 320, 3), np.uint8)] * 6, r"camera images of 120 x 320 pixels .*the network takes 165 x 165 to 324 x 324"),
        ([np.zeros((180, 320, 3), np.float32)] * 6, r"camera image 0 is float32\(180, 320, 3\), all must be uint8"),
        ([np.zeros((180, 320), np.uint8)] * 6, r"camera image 0 is uint8\(180, 320\)"),
        (
            [np.zeros((180, 320, 3), np.uint8)] * 5 + [np.zeros((180, 321, 3), np.uint8)],
            r"camera image 5 is uint8\(180, 321, 3\), all must",
        ),
    ],
)
def test_camera_images_that_do_not_fit_are_told_with_what_does(detector: StreamingDetector, images: list[np.ndarray], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        detector.prepare(images, np.zeros((6, 4, 4)), np.zeros(18), 0)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.8])
def test_the_sizes_that_are_said_to_fit_are_those_that_do(scale: float) -> None:
    data = dataclasses.replace(CONFIG.data, image_scale=scale, pad_multiple=32)
    preprocessor = Preprocessor(data, (1, 3, 96, 160))
    fits = []
    for height in range(40, 260):
        try:
            preprocessor.frame([np.zeros((height, preprocessor.largest_hw[1], 3), np.uint8)], np.zeros((1, 4, 4)), np.zeros(18), 0)
            fits.append(height)
        except FrameError as error:
            said = str(error)
    assert fits == list(range(fits[0], preprocessor.largest_hw[0] + 1))
    assert f"takes {fits[0]} x " in said
    assert f" to {fits[-1]} x " in said

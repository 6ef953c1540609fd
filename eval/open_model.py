"""A checkpoint, an ONNX file and an engine behind one call, with the deployed graph's names (schema.INPUTS, schema.OUTPUTS)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qdbev import artifact, command
from qdbev.artifact import Seal
from qdbev.config import Config, from_dict
from qdbev.detectors.bevformer.model import Deployed
from qdbev.schema import INPUTS, OUTPUTS

Infer = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Detector:
    """A model that is open: its seal, the config inside it, and one frame in, one frame out (arrays as in schema.py, on the host).

    It remembers nothing; the caller hands `bev` back as the next `prev_bev`.
    """

    seal: Seal
    config: Config
    infer: Infer

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name from inputs by name."""
        return self.infer(inputs)


class DetectorError(ValueError):
    """A model file that this room cannot open."""


@contextmanager
def open_detector(path: Path, device: str | None = None) -> Iterator[Detector]:
    """Open a `.pt`, `.onnx` or `.engine` file.

    Args:
        path: A sealed artifact.
        device: Where a checkpoint runs, "cpu" when left out. Other files bring their own: ONNX runs on the CPU, an engine on its GPU.

    Raises:
        DetectorError: The suffix is unknown, or the file brings its own device.
        ArtifactError: The file or its seal is missing, damaged, or of another kind.
        ValueError: The device is not there, or an engine does not fit it.
    """
    openers = {".pt": _open_checkpoint, ".onnx": _open_onnx, ".engine": _open_engine}
    if path.suffix not in openers:
        raise DetectorError(f"{path} ends in {path.suffix or 'nothing'!r}; a model is a {', '.join(openers)} file")
    with openers[path.suffix](path, device) as detector:
        yield detector


@contextmanager
def _open_checkpoint(path: Path, device: str | None) -> Iterator[Detector]:
    from qdbev.restore import restore  # takes pytorch-quantization along, which other files need not

    target = command.device(device or "cpu")
    if target.type == "cuda":
        from plugins import torch_ops

        torch_ops.install()
    seal, model = restore(path)
    deployed = Deployed(model).to(target).eval()

    def infer(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            tensors = [torch.from_numpy(inputs[name]).to(target) for name in INPUTS]
            outputs = deployed(*tensors)
        return {name: tensor.float().cpu().numpy() for name, tensor in zip(OUTPUTS, outputs, strict=True)}

    yield Detector(seal, from_dict(seal.config), infer)


@contextmanager
def _open_onnx(path: Path, device: str | None) -> Iterator[Detector]:
    from export.runner import OnnxRunner

    if device not in (None, "cpu"):
        raise DetectorError(f"{path} runs in onnxruntime on the CPU, not on {device!r}; leave --device out, or build an engine from it")
    seal = artifact.unseal(path, "onnx")
    runner = OnnxRunner(path)

    def infer(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            return runner(inputs)
        except ValueError as error:
            raise DetectorError(f"{path}: {error}; give data with the cameras and image size it was exported for") from error

    yield Detector(seal, from_dict(seal.config), infer)


@contextmanager
def _open_engine(path: Path, device: str | None) -> Iterator[Detector]:
    from engine.session import Session

    if device is not None:
        raise DetectorError(f"{path} runs on the GPU it was built for, --device {device!r} has no meaning for it; leave --device out")
    seal = artifact.unseal(path, "engine")
    with Session(path) as session:
        yield Detector(seal, from_dict(seal.config), session.infer)

"""Opens a checkpoint, an ONNX file or an engine as a function from the deployed graph's inputs to its outputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from qdbev import command, detectors
from qdbev.artifact import Seal
from qdbev.config import Config, from_dict
from qdbev.detector import Arrays, Deployed, FrameStream


@dataclass(frozen=True)
class OpenModel:
    """A model that can run. It keeps no state: `run_stream` passes the memory from frame to frame."""

    config: Config
    run: Callable[[Arrays], Arrays]
    """Runs the deployed graph for one frame: outputs by name from inputs by name, on the host."""

    @property
    def stream(self) -> FrameStream:
        """The detector's work on the host: it makes the inputs of `run` from a frame, and boxes from its outputs."""
        return detectors.stream(self.config.model)


@dataclass(frozen=True)
class SealedModel(OpenModel):
    """An open model with the seal of its file."""

    seal: Seal
    runtime: str
    """What computes the model, with its version and the options that change its numbers."""


class ModelFileError(ValueError):
    """A model file that cannot be opened."""


@contextmanager
def open_model(path: Path, device: str | None = None) -> Iterator[SealedModel]:
    """Open a `.pt`, `.onnx` or `.engine` file.

    Args:
        device: Where a checkpoint runs, "cpu" when left out. An ONNX file always runs on the CPU, an engine on the device it was built for.

    Raises:
        ModelFileError: The suffix is unknown, or a device is given for a file that has its own.
        ArtifactError: The file or its seal is missing, damaged, or of another kind.
        ValueError: The device does not exist, or an engine does not fit it.
    """
    openers = {".pt": _open_checkpoint, ".onnx": _open_onnx, ".engine": _open_engine}
    if path.suffix not in openers:
        raise ModelFileError(f"{path} ends in {path.suffix or 'nothing'!r}; a model is a {', '.join(openers)} file")
    with openers[path.suffix](path, device) as model:
        yield model


@contextmanager
def _open_checkpoint(path: Path, device: str | None) -> Iterator[SealedModel]:
    from qdbev.restore import restore  # imports pytorch-quantization, which the other kinds of file do not need

    target = command.parse_device(device or "cpu")
    from plugins import torch_ops

    if target.type == "cuda":
        torch_ops.install()
        kernels = "CUDA kernels"
    else:
        kernels = "CPU kernels" if torch_ops.install_on_cpu() else "no kernels"
    seal, model = restore(path)
    deployed = Deployed(model).to(target).eval()

    def run(inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            return deployed.run(inputs)

    yield SealedModel(from_dict(seal.config), run, seal, f"PyTorch {torch.__version__}, {kernels}")


@contextmanager
def _open_onnx(path: Path, device: str | None) -> Iterator[SealedModel]:
    from export.runner import OnnxRunner

    if device not in (None, "cpu"):
        raise ModelFileError(f"{path} runs in onnxruntime on the CPU, not on {device!r}; leave --device out, or build an engine from it")
    runner = OnnxRunner(path)

    def run(inputs: Arrays) -> Arrays:
        try:
            return runner(inputs)
        except ValueError as error:
            raise ModelFileError(f"{path}: {error}; give data with the cameras and image size it was exported for") from error

    yield SealedModel(from_dict(runner.seal.config), run, runner.seal, runner.runtime)


@contextmanager
def _open_engine(path: Path, device: str | None) -> Iterator[SealedModel]:
    from engine.open_session import open_session

    if device is not None:
        raise ModelFileError(f"{path} runs on the device it was built for, so --device {device!r} has no effect; leave --device out")
    with open_session(path) as session:
        built_by = session.seal.facts.backend
        yield SealedModel(from_dict(session.seal.config), session.infer, session.seal, f"{built_by.name} {built_by.version}")

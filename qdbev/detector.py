"""The contract between a detector and the rooms that train, quantize, export, run and evaluate it.

A detector is a network (`Detector`) and its work on the host (`FrameStream`). The rooms use these two, `Output` and `schema.Interface`,
and name no detector; qdbev/detectors/__init__.py selects one by the type of the config.

B batch, N cameras, C width, h w a feature level, K places of the BEV, Q queries.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qdbev.schema import Batch, Detections, Frame, Interface

BACKBONE = "backbone"
"""Group of every detector that encodes the camera images. It has a learning-rate factor of its own (train.backbone_lr_factor)."""

State = Any
"""Tensors (batch B) that a network keeps from one frame for the next; only that network knows their form. None at the start."""
Memory = Any
"""Values that a stream keeps on the host from one frame for the next; only that stream knows their form. None at the start."""
Arrays = dict[str, np.ndarray]
"""Tensors of the deployed graph on the host, by the names of its `Interface`."""


class FrameOrderError(ValueError):
    """Raised for a frame that is not later than the frame before it in the same scene."""


class Output(NamedTuple):
    """Results of a network for one batch; losses, distillation and decoding read these fields and nothing else.

    image_features: per level (B, N, C, h, w), the output of the neck.
    bev: (B, K, C) features of the bird's-eye view, row-major with y as the row; None for a detector without a BEV.
    cls_logits: (decoder layers, B, Q, classes).
    box_code: (decoder layers, B, Q, 10), see qdbev/nn/box_code.py; metres, lidar frame.
    """

    image_features: tuple[Tensor, ...]
    bev: Tensor | None
    cls_logits: Tensor
    box_code: Tensor


class Detector(nn.Module):
    """A detection network. Its top-level children are the groups of the quantization policy; one is called `backbone`."""

    config: Any
    """The network's part of the run's config."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the top-level children, in the order of the progressive stages."""
        return self.config.groups

    def forward(self, batch: Batch, state: State = None) -> tuple[Output, State]:
        """Compute one frame of each sample; returns the output and the state for the next frame.

        Args:
            batch: The frames; `batch.has_prev` is zero for a sample whose `state` must be ignored.
            state: The state that the forward of the previous frame returned, or None.
        """
        raise NotImplementedError

    def advance(self, batch: Batch, state: State = None) -> State:
        """Compute only the state for the next frame, equal to the one of `forward`; cheaper where a detector can leave out its head."""
        return self(batch, state)[1]

    def interface(self, image_hw: tuple[int, int]) -> Interface:
        """Return names and shapes of the deployed graph for padded images of `image_hw` pixels (height, width)."""
        return self.config.interface(image_hw)

    def deployed(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compute the deployed graph: inputs and outputs in the order of `interface`."""
        raise NotImplementedError

    def visibility(self, batch: Batch) -> Tensor | None:
        """Return (B, N, K) bool, true where camera n sees place k of the BEV; view guidance needs it. None for a detector without a BEV."""
        return None


class FrameStream(Protocol):
    """A detector's work on the host in numpy: graph inputs from a frame and a memory, and boxes from graph outputs."""

    def inputs(self, frame: Frame, memory: Memory) -> Arrays:
        """Return the inputs of the deployed graph for `frame`; a memory of another scene is ignored.

        Raises:
            FrameOrderError: The memory is of the same scene but not of an earlier frame.
        """

    def remember(self, frame: Frame, outputs: Mapping[str, np.ndarray]) -> Memory:
        """Return the memory for the frame after `frame`."""

    def decode(self, outputs: Mapping[str, np.ndarray]) -> Detections:
        """Decode the boxes in the lidar frame, best first."""


class Deployed(nn.Module):
    """A network with the deployed graph's inputs and outputs, for the exporter and for running on arrays."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.model.deployed(*tensors)

    def run(self, inputs: Arrays) -> Arrays:
        """Compute outputs by name from inputs by name, on the device of the network's parameters, with the caller's gradient mode.

        Raises:
            ValueError: An input is missing or unknown, or has another shape or type than the network takes; or `deployed` returns other
                outputs than `interface` names.
        """
        inputs = {name: np.asarray(value) for name, value in inputs.items()}
        interface = self.model.interface(inputs["images"].shape[-2:]) if "images" in inputs else None
        if interface is None or inputs.keys() != interface.inputs.keys():
            wanted = ", ".join(interface.inputs) if interface else "images and others"
            raise ValueError(f"inputs are {', '.join(inputs) or 'missing'}; the network takes {wanted}")
        for name, shape in interface.inputs.items():
            if inputs[name].shape != shape or inputs[name].dtype != np.float32:
                raise ValueError(f"{name} is {inputs[name].dtype}{inputs[name].shape}, the network takes float32{shape}")
        device = next(self.model.parameters()).device
        outputs = self(*(torch.from_numpy(np.ascontiguousarray(inputs[name])).to(device) for name in interface.inputs))
        found, wanted = [tuple(value.shape) for value in outputs], list(interface.outputs.values())
        if found != wanted:
            network = type(self.model).__name__
            raise ValueError(f"{network}.deployed returns shapes {found}; its interface has {wanted} for {', '.join(interface.outputs)}")
        return {name: value.detach().float().cpu().numpy() for name, value in zip(interface.outputs, outputs, strict=True)}


class Step(NamedTuple):
    """One frame of a stream, with the inputs and outputs of the deployed graph."""

    frame: Frame
    inputs: Arrays
    outputs: Arrays


def run_stream(stream: FrameStream, run: Callable[[Arrays], Arrays], frames: Iterable[Frame]) -> Iterator[Step]:
    """Run frames in order of time, each with the memory of the frame before it; every scene starts without a memory.

    Args:
        run: Computes the deployed graph, with PyTorch, onnxruntime or an engine.

    Raises:
        FrameOrderError: The frames of a scene do not come in order of time.
    """
    memory: Memory = None
    for frame in frames:
        inputs = stream.inputs(frame, memory)
        outputs = run(inputs)
        memory = stream.remember(frame, outputs)
        yield Step(frame, inputs, outputs)

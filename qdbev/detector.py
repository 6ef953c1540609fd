"""The contract between a detector and the rooms that train, quantize, export, run and evaluate it.

A detector is a network (`Detector`) and what surrounds it on the host (`FrameStream`). The rooms use these two, `Output` and
`schema.Interface`, and know no detector by name; qdbev/detectors/__init__.py chooses by the type of the config.

B batch, N cameras, C width, h w a feature level, K places of the BEV, Q queries.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from qdbev.schema import Batch, Detections, Frame, Interface

State = Any
"""What a network keeps from one frame for the next (tensors of batch B), in a form that only that network reads; None at the start."""
Memory = Any
"""What a stream keeps from one frame for the next on the host, in a form that only that stream reads; None at the start."""
Arrays = dict[str, np.ndarray]
"""Tensors of the deployed graph on the host, by the names of its `Interface`."""


class FrameOrderError(ValueError):
    """A frame that is not later than the frame before it in the same scene."""


class Output(NamedTuple):
    """What a network computes for one batch; losses, distillation and decoding read these fields and nothing else.

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
    """A network. Its top-level children are the groups of the quantization policy, in the order of the progressive stages."""

    groups: ClassVar[tuple[str, ...]]
    config: Any

    def forward(self, batch: Batch, state: State = None) -> tuple[Output, State]:
        """One frame of each sample, and the state for the next frame.

        Args:
            batch: Frames; `batch.has_prev` is zero for a sample whose `state` does not count.
            state: What the forward of the previous frame returned, or None.
        """
        raise NotImplementedError

    def advance(self, batch: Batch, state: State = None) -> State:
        """Only the state for the next frame, as `forward` gives it; cheaper where a detector can leave out its head."""
        return self(batch, state)[1]

    def interface(self, image_hw: tuple[int, int]) -> Interface:
        """Names and shapes of the deployed graph for padded images of `image_hw` pixels (height, width)."""
        return self.config.interface(image_hw)

    def deployed(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The deployed graph: outputs in the order of `interface`, from inputs in its order."""
        raise NotImplementedError

    def visibility(self, batch: Batch) -> Tensor | None:
        """(B, N, K) bool: camera n sees place k of the BEV. None for a detector without a BEV; view guidance needs it."""
        return None


class FrameStream(Protocol):
    """A detector's work on the host in numpy: from a frame and a memory to the graph's inputs, and from its outputs to boxes."""

    def inputs(self, frame: Frame, memory: Memory) -> Arrays:
        """Inputs of the deployed graph for `frame`; a memory of another scene counts as none.

        Raises:
            FrameOrderError: The memory is of the same scene but not of an earlier frame.
        """
        ...

    def remember(self, frame: Frame, outputs: Mapping[str, np.ndarray]) -> Memory:
        """The memory that `frame` leaves for the next one."""
        ...

    def decode(self, outputs: Mapping[str, np.ndarray]) -> Detections:
        """Boxes of the lidar frame, best first."""
        ...


class Deployed(nn.Module):
    """A network with the deployed graph's inputs and outputs, for the exporter and to run on arrays."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the deployed graph, in order, from its inputs, in order."""
        return self.model.deployed(*tensors)

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name from inputs by name, on the device of the network's parameters; gradients as the caller has set them.

        Raises:
            ValueError: An input is missing or unknown, or has another shape or type than the network takes.
        """
        interface = self.model.interface(inputs["images"].shape[-2:]) if "images" in inputs else None
        if interface is None or inputs.keys() != interface.inputs.keys():
            wanted = ", ".join(interface.inputs) if interface else "images and others"
            raise ValueError(f"inputs are {', '.join(inputs) or 'missing'}; the network takes {wanted}")
        for name, shape in interface.inputs.items():
            if inputs[name].shape != shape or inputs[name].dtype != np.float32:
                raise ValueError(f"{name} is {inputs[name].dtype}{inputs[name].shape}, the network takes float32{shape}")
        device = next(self.model.parameters()).device
        outputs = self(*(torch.from_numpy(inputs[name]).to(device) for name in interface.inputs))
        return {name: value.detach().float().cpu().numpy() for name, value in zip(interface.outputs, outputs, strict=True)}


class Step(NamedTuple):
    """One frame of a stream, with the inputs and outputs of the deployed graph."""

    frame: Frame
    inputs: Arrays
    outputs: Arrays


def run_stream(stream: FrameStream, run: Callable[[Arrays], Arrays], frames: Iterable[Frame]) -> Iterator[Step]:
    """Run frames in order of time, each with the memory of the one before it; the memory starts anew with every scene.

    Args:
        run: The deployed graph, whatever computes it: PyTorch, onnxruntime or an engine.

    Raises:
        FrameOrderError: Frames of a scene do not come in order of time.
    """
    memory: Memory = None
    for frame in frames:
        inputs = stream.inputs(frame, memory)
        outputs = run(inputs)
        memory = stream.remember(frame, outputs)
        yield Step(frame, inputs, outputs)

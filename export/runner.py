"""The one place that opens an ONNX file in onnxruntime; parity and evaluation both run it through here."""

import functools
from pathlib import Path
from typing import Self

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from export import builtin_plugin
from qdbev import artifact
from qdbev.artifact import ArtifactError
from qdbev.schema import Interface

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
_STANDARD_DOMAINS = ("", "ai.onnx")


class OnnxRunner:
    """A sealed ONNX of the deployed graph, on the CPU, TensorRT's own plugin by its body (builtin_plugin.py).

    Q/DQ are executed as they stand, not fused into integer kernels of other rounding.

    Args:
        path: The ONNX; its seal lies beside it.

    Raises:
        ArtifactError: File or seal is missing or damaged, or the graph is not a deployed one, lacks an operator's body, or has NaN weights.
    """

    def __init__(self, path: Path) -> None:
        self.seal: artifact.Seal | None = artifact.unseal(path, "onnx")
        self._open(path, self.seal.facts.interface)

    @classmethod
    def unsealed(cls, path: Path, interface: Interface) -> Self:
        """The same for a file that has no seal yet."""
        runner = cls.__new__(cls)
        runner.seal = None
        runner._open(path, interface)
        return runner

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name from inputs by name.

        Raises:
            ValueError: An input is missing or unknown, or has another shape or type than the graph's.
        """
        _check_inputs(inputs, self.shapes)
        values = self._session.run(list(self.interface.outputs), {name: np.ascontiguousarray(value) for name, value in inputs.items()})
        return dict(zip(self.interface.outputs, values, strict=True))

    def _open(self, path: Path, interface: Interface) -> None:
        model = _load(path)
        source = model.SerializeToString() if builtin_plugin.with_bodies(model) else path
        check(path, model, interface)
        self.interface = interface
        options = onnxruntime.SessionOptions()
        # Otherwise onnxruntime (seen in 1.31) rounds biases to int32 and runs Q/DQ groups in integer kernels, which moves numbers.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.log_severity_level = 3
        _register_allocator()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False
        # Of a 3-D MatMul and its bias; with Q/DQ around and operator set 21 (the INT4 form) it makes a graph that does not load.
        without = ["MatMulAddFusion"]
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"], disabled_optimizers=without)
        except Exception as error:
            raise ArtifactError(f"onnxruntime cannot open {path}: {_first_line(error)}") from error
        self.shapes: dict[str, tuple[int, ...]] = {found.name: tuple(found.shape) for found in self._session.get_inputs()}
        """Shape of each input."""


@functools.cache
def _register_allocator() -> None:
    """Memory that grows by what is asked for. By default onnxruntime (seen in 1.31) doubles it and plans the second run apart from the
    first: one cross-attention of base then takes 11.7 GB instead of 6.1, and more than twice as long."""
    memory = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    without_limit, as_requested, default = 0, 1, -1
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(without_limit, as_requested, default, default))


def check(path: Path, model: onnx.ModelProto, interface: Interface) -> None:
    """Raise ArtifactError unless `model`, read from `path`, is a deployed graph that any runtime without plugins can run."""
    for what, found, wanted in (("inputs", model.graph.input, interface.inputs), ("outputs", model.graph.output, interface.outputs)):
        names = tuple(item.name for item in found)
        if set(names) != set(wanted):
            raise ArtifactError(f"{path} has the {what} {', '.join(names) or 'none'}; the deployed graph has {', '.join(wanted)}")
    bodies = {(function.domain, function.name) for function in model.functions}
    for node in model.graph.node:
        if node.domain not in _STANDARD_DOMAINS and (node.domain, node.op_type) not in bodies:
            raise ArtifactError(f"{path}: node {node.name} is a {node.domain}::{node.op_type} without a function body; export it again")
    for tensor in model.graph.initializer:
        if tensor.data_type in _FLOATS:
            values = numpy_helper.to_array(tensor)
            wrong = int(values.size - np.isfinite(values).sum())
            if wrong:
                raise ArtifactError(f"{path}: {wrong} of {values.size} values of {tensor.name} are NaN or infinite; the training diverged")


def _load(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
    except Exception as error:
        raise ArtifactError(f"{path} is damaged or no ONNX file ({_first_line(error)}); export it again") from error
    if not model.graph.node:
        raise ArtifactError(f"{path} holds no graph; export it again")
    return model


def _check_inputs(inputs: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> None:
    if inputs.keys() != shapes.keys():
        raise ValueError(f"inputs are {', '.join(sorted(inputs))}; the graph takes {', '.join(shapes)}")
    for name, value in inputs.items():
        if value.shape != shapes[name] or value.dtype != np.float32:
            raise ValueError(f"{name} is {value.dtype} {value.shape}; the graph takes float32 {shapes[name]}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

"""Runs a deployed ONNX graph in onnxruntime; the parity check and evaluation both use it."""

import functools
from pathlib import Path

import numpy as np
import onnxruntime

from qdbev import artifact, deployed_graph
from qdbev.artifact import ArtifactError
from qdbev.schema import Interface

LITERAL_ENTRY = ("session.disable_quant_qdq", "1")
"""Entry of a session's configuration with which Q/DQ are executed as they stand. Otherwise onnxruntime (seen in 1.31) rounds biases to
int32 and runs groups of them in integer kernels, which changes numbers."""
WITHOUT_OPTIMIZER = "MatMulAddFusion"
"""An optimizer that fuses a 3-D MatMul and its bias. With Q/DQ around it and operator set 21 (the INT4 form) the result does not load."""
LITERAL = f"{'='.join(LITERAL_ENTRY)}; disabled_optimizers={WITHOUT_OPTIMIZER}"
"""Text that tells users of the file which session options give the numbers that it was compared with."""


class OnnxRunner:
    """An ONNX of the deployed graph on the CPU.

    Q/DQ are executed literally, not fused into integer kernels with other rounding.

    Args:
        interface: Interface of a file that has no seal yet.

    Raises:
        ArtifactError: File or seal is missing or damaged, or onnxruntime refuses the graph.
        DeployedGraphError: The file is no deployed graph, lacks an operator's body, or has NaN weights.
    """

    def __init__(self, path: Path, interface: Interface | None = None) -> None:
        self.seal = artifact.unseal(path, "onnx") if interface is None else None
        self.interface = interface or self.seal.facts.interface
        deployed_graph.check(path, deployed_graph.load(path), self.interface)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(*LITERAL_ENTRY)
        options.log_severity_level = 3
        _register_allocator()
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.enable_mem_pattern = False
        without = [WITHOUT_OPTIMIZER]
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"], disabled_optimizers=without)
        except Exception as error:
            raise ArtifactError(f"onnxruntime cannot open {path}: {deployed_graph.first_line(error)}") from error

    @property
    def runtime(self) -> str:
        """The runtime with its version and the options that change numbers."""
        return f"onnxruntime {onnxruntime.__version__}, {LITERAL}"

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name from inputs by name.

        Raises:
            ValueError: An input is missing or unknown, or has another shape or type than the graph's.
        """
        inputs, shapes = {name: np.asarray(value) for name, value in inputs.items()}, self.interface.inputs
        if inputs.keys() != shapes.keys():
            raise ValueError(f"inputs are {', '.join(sorted(inputs)) or 'missing'}; the graph takes {', '.join(shapes)}")
        for name, value in inputs.items():
            if value.shape != shapes[name] or value.dtype != np.float32:
                raise ValueError(f"{name} is {value.dtype} {value.shape}; the graph takes float32 {shapes[name]}")
        values = self._session.run(list(self.interface.outputs), {name: np.ascontiguousarray(value) for name, value in inputs.items()})
        return dict(zip(self.interface.outputs, values, strict=True))


@functools.cache
def _register_allocator() -> None:
    """Let onnxruntime's memory grow by the requested size only.

    By default onnxruntime (seen in 1.31) doubles it and plans the memory of the second run anew: one cross-attention of base then takes
    11.7 GB instead of 6.1, and more than twice as long.
    """
    memory = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    without_limit, as_requested, default = 0, 1, -1
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg(without_limit, as_requested, default, default))

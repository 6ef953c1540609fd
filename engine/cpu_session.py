"""Runs an engine on the CPU that it was built for, without torch.

    with CpuSession(path) as session:
        outputs = session.infer({"images": ..., "lidar2img": ..., "can_bus": ..., "prev_bev": ..., "has_prev": ...})

It has the methods of `engine.session.Session`, with the same errors. Recurrent inputs such as `prev_bev` may be left out here, too.
"""

import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from engine import backend, compatibility, cpu
from engine.backend import EngineError
from engine.cpu import Running
from engine.session import check_tensors
from qdbev import artifact, deployed_graph


class CpuSession:
    """An engine for a CPU. `seal`, `interface`, `shapes` and `dtypes` are as in `engine.session.Session`."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Check the file and that it can run on this machine. It is opened when the `with` block is entered.

        Args:
            threads: Number of threads; None for as many as the CPU has cores.

        Raises:
            ArtifactError: The engine is missing, damaged or not sealed.
            EngineError: OpenVINO is missing, or the engine is for another CPU, version or version of the kernels.
        """
        if threads is not None and threads < 1:
            raise EngineError(f"{threads} threads; give a positive number, or none for all cores")
        self.seal = artifact.unseal(path, "engine")
        self.interface = self.seal.facts.interface
        self.path = path
        self._backend = backend.load("cpu")
        compatibility.require_cpu(path, self.seal, self._backend, cpu.this_cpu())
        self._threads = threads
        self._running: Running | None = None
        self.shapes = {**self.interface.inputs, **self.interface.outputs}
        self.dtypes: dict[str, np.dtype[Any]] = dict.fromkeys(self.shapes, np.dtype(np.float32))

    def __enter__(self) -> Self:
        try:
            self._running = Running(self._backend, self.path.read_bytes(), self.seal.facts.target, self._threads)
        except RuntimeError as error:
            raise EngineError(
                f"{self.path}: OpenVINO {self._backend.version} cannot open it ({deployed_graph.first_line(error)}); build it again: "
                f"{compatibility.rebuild_command(self.path, self.seal)}"
            ) from error
        self._kept = {input_: np.zeros(self.shapes[input_], np.float32) for _, input_ in self.interface.recurrent}
        return self

    def __exit__(self, *_: object) -> None:
        self._running = None

    def infer(self, inputs: Mapping[str, np.ndarray], outputs: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Run one frame and return its outputs by name; arguments and errors are those of `engine.session.Session.infer`."""
        outputs = tuple(self.interface.outputs) if outputs is None else outputs
        if self._running is None:
            raise EngineError(f"the session of {self.path} is not open; use it in a with statement")
        check_tensors(self.interface, self.shapes, self.dtypes, inputs, outputs)
        started = time.perf_counter()
        try:
            found = self._running({**self._kept, **inputs})
        except RuntimeError as error:
            raise EngineError(f"{self.path}: OpenVINO could not run the frame: {deployed_graph.first_line(error)}") from error
        self._seconds = time.perf_counter() - started
        self._kept = {input_: found[output] for output, input_ in self.interface.recurrent}
        return {name: found[name] for name in outputs}

    def compute_ms(self) -> float:
        """Time of the last frame's network in milliseconds."""
        return 1e3 * self._seconds

"""Running an engine on a GPU, without torch.

    with Session(path) as session:
        outputs = session.infer({"images": ..., "lidar2img": ..., "can_bus": ..., "prev_bev": ..., "has_prev": ...})

The previous BEV need not leave the GPU: leave `prev_bev` out, and the `bev` of the call before is used, by exchanging the two buffers.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from engine import backend, monitor
from engine.backend import EngineError, check
from qdbev import artifact, schema

_FED_BACK = ("prev_bev", "bev")
"""Input and output that exchange buffers after each call."""


class Session:
    """An engine, its device buffers and its stream; a context manager, because it owns GPU memory.

    `seal` is the engine's; `shapes` and `dtypes` are those of the named tensors.
    """

    def __init__(self, path: Path) -> None:
        """Check the file and that it can run here; memory is taken on entering.

        Raises:
            ArtifactError: The engine is missing, damaged or not sealed.
            EngineError: There is no GPU, the engine is for another one, or its TensorRT is missing.
        """
        self.seal = artifact.unseal(path, "engine")
        self.path = path
        device = backend.require_gpu(f"running {path}")
        built_for = self.seal.facts["target"]["compute_capabilities"]
        if built_for != "portable" and device.compute_capability not in built_for:
            raise EngineError(
                f"{path} was built for GPUs {', '.join(built_for)}; this is a {device.name} ({device.compute_capability}): build it here"
            )
        self._backend = backend.load(self.seal.facts["backend"]["name"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self._inputs: list[str] = []
        self._buffers: dict[str, int] = {}
        self._engine: Any = None
        self._context: Any = None
        self._stream: Any = None

    def __enter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def infer(self, inputs: Mapping[str, np.ndarray], outputs: Collection[str] = schema.OUTPUTS) -> dict[str, np.ndarray]:
        """One frame.

        Args:
            inputs: Named as in `schema.INPUTS`, with the engine's shapes; `prev_bev` may be left out. It is zero before the first call.
            outputs: What to copy back from the GPU.

        Raises:
            EngineError: A tensor is missing, unknown, or of the wrong shape or type; or the GPU reports a failure.
        """
        self._check_inputs(inputs)
        runtime = _runtime()
        kinds = runtime.cudaMemcpyKind
        for name, value in inputs.items():
            source = np.ascontiguousarray(value)
            check(
                runtime.cudaMemcpyAsync(self._buffers[name], source.ctypes.data, source.nbytes, kinds.cudaMemcpyHostToDevice, self._stream)
            )
        self._enqueue()
        results = {name: np.empty(self.shapes[name], self.dtypes[name]) for name in outputs}
        for name, target in results.items():
            check(
                runtime.cudaMemcpyAsync(target.ctypes.data, self._buffers[name], target.nbytes, kinds.cudaMemcpyDeviceToHost, self._stream)
            )
        check(runtime.cudaStreamSynchronize(self._stream))
        self._feed_back()
        return results

    def compute_ms(self) -> float:
        """GPU time of one run on whatever the input buffers hold, without copies."""
        runtime = _runtime()
        start, end = check(runtime.cudaEventCreate()), check(runtime.cudaEventCreate())
        try:
            check(runtime.cudaEventRecord(start, self._stream))
            self._enqueue()
            check(runtime.cudaEventRecord(end, self._stream))
            check(runtime.cudaEventSynchronize(end))
            return float(check(runtime.cudaEventElapsedTime(start, end)))
        finally:
            check(runtime.cudaEventDestroy(start))
            check(runtime.cudaEventDestroy(end))

    def _open(self) -> None:
        trt, runtime = self._backend.module, _runtime()
        messages = monitor.logger(trt)
        self._engine = trt.Runtime(messages).deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            built, reasons = self.seal.facts["backend"], messages.problems or ["no reason given"]
            first = (
                f"{self.path} (built with {built['name']} {built['version']}) cannot be opened by {self._backend.version}; build it again:"
            )
            raise EngineError("\n  ".join([first, *reasons]))
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise EngineError("\n  ".join([f"{self.path}: no memory or kernels to run it here:", *messages.problems]))
        self._stream = check(runtime.cudaStreamCreate())
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            self.shapes[name] = tuple(self._engine.get_tensor_shape(name))
            if min(self.shapes[name], default=1) < 0:
                raise EngineError(f"{self.path}: {name} has the shape {self.shapes[name]}; engines of this project have fixed shapes")
            self.dtypes[name] = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                self._inputs.append(name)
            size = max(1, int(np.prod(self.shapes[name])) * self.dtypes[name].itemsize)
            self._buffers[name] = int(check(runtime.cudaMalloc(size)))
            check(runtime.cudaMemset(self._buffers[name], 0, size))
        self._bind()

    def _close(self) -> None:
        runtime = _runtime()
        if self._stream is not None:
            runtime.cudaStreamSynchronize(self._stream)
        self._context = self._engine = None
        for pointer in self._buffers.values():
            runtime.cudaFree(pointer)
        self._buffers.clear()
        self._inputs.clear()
        if self._stream is not None:
            runtime.cudaStreamDestroy(self._stream)
        self._stream = None

    def _bind(self) -> None:
        for name, pointer in self._buffers.items():
            if not self._context.set_tensor_address(name, pointer):
                raise EngineError(f"{self.path}: TensorRT takes no buffer for {name}")

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise EngineError(f"{self.path}: TensorRT could not start the frame")

    def _feed_back(self) -> None:
        earlier, later = _FED_BACK
        if earlier in self._buffers and later in self._buffers:
            self._buffers[earlier], self._buffers[later] = self._buffers[later], self._buffers[earlier]
            self._bind()

    def _check_inputs(self, inputs: Mapping[str, np.ndarray]) -> None:
        if self._context is None:
            raise EngineError(f"the session of {self.path} is not open; use it in a with statement")
        missing = [name for name in self._inputs if name not in inputs and name != _FED_BACK[0]]
        unknown = [name for name in inputs if name not in self._inputs]
        if missing or unknown:
            raise EngineError(
                f"inputs missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}; needed: {self._inputs}"
            )
        for name, value in inputs.items():
            if value.shape != self.shapes[name] or value.dtype != self.dtypes[name]:
                raise EngineError(f"{name} is {value.dtype}{value.shape}, the engine takes {self.dtypes[name]}{self.shapes[name]}")


def _runtime() -> Any:
    from cuda.bindings import runtime

    return runtime

"""An execution context with fixed buffer addresses, replayed as a CUDA graph.

There are two of them, because the buffers of a recurrent output and its input (`bev` and `prev_bev`) are exchanged after every frame.
TensorRT asks for one context for each captured graph: the graph records addresses, and a context that is changed afterwards leaves its
graph undefined. The contexts of one engine never run at the same time and so share the memory for intermediate results.
"""

from collections.abc import Mapping
from typing import Any

from engine import backend
from engine.backend import EngineError, check


class CapturedContext:
    """A context and the buffer of each named tensor. `addresses` are on the GPU; `close` it before the engine goes."""

    def __init__(self, context: Any, addresses: Mapping[str, int], stream: Any) -> None:
        """Raises EngineError if TensorRT takes no buffer for a tensor."""
        self.addresses = addresses
        self._context = context
        self._stream = stream
        self._graph: Any = None
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT takes no buffer for {name}")

    def run(self) -> bool:
        """Start one frame; false if TensorRT could not."""
        if self._graph is None:
            return self._context.execute_async_v3(int(self._stream))
        check(backend.cuda_runtime().cudaGraphLaunch(self._graph, self._stream))
        return True

    def record(self) -> str:
        """Turn what `run` does into a CUDA graph, and return why that is not possible, or nothing.

        A frame must have run before, so that nothing is initialised while recording. Where TensorRT or a plugin does what no graph can
        hold, `run` goes on starting every kernel by itself.
        """
        runtime = backend.cuda_runtime()
        check(runtime.cudaStreamBeginCapture(self._stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        started = self._context.execute_async_v3(int(self._stream))
        status, graph = runtime.cudaStreamEndCapture(self._stream)  # in any case: a stream left recording runs nothing
        if started and int(status) == 0:
            status, self._graph = runtime.cudaGraphInstantiate(graph, 0)
        if graph is not None:
            runtime.cudaGraphDestroy(graph)
        if started and int(status) == 0:
            return ""
        self._graph = None
        runtime.cudaGetLastError()
        return f"CUDA answers {status.name}" if int(status) != 0 else "TensorRT cannot record it"

    def close(self) -> None:
        """Give back the graph and the context."""
        if self._graph is not None:
            backend.cuda_runtime().cudaGraphExecDestroy(self._graph)
        self._graph = self._context = None


def create_context(trt: Any, engine: Any, memory: int, size: int) -> Any:
    """An execution context whose intermediate results lie in `size` bytes at `memory`; None where TensorRT gives none."""
    if hasattr(trt, "ExecutionContextAllocationStrategy"):
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    else:  # TensorRT 8.6
        context = engine.create_execution_context_without_device_memory()
    if context is None:
        return None
    if hasattr(context, "set_device_memory"):
        context.set_device_memory(memory, size)
    else:
        context.device_memory = memory
    return context


def intermediate_bytes(engine: Any) -> int:
    """How much memory a context of the engine needs for intermediate results."""
    return engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size

"""An execution context with fixed buffer addresses, replayed as a CUDA graph.

A session has two of them, because the buffers of a recurrent output and its input (such as `bev` and `prev_bev`) are exchanged after every
frame. TensorRT requires a context for each captured graph: the graph contains buffer addresses, and is invalid once its context is changed.
The contexts of one engine never run at the same time, so they share the memory for intermediate results.
"""

from collections.abc import Mapping
from typing import Any

from engine import backend
from engine.backend import EngineError, check


class CapturedContext:
    """An execution context with the GPU address of each tensor's buffer, by name. Close it before the engine is freed."""

    def __init__(self, context: Any, addresses: Mapping[str, int], stream: Any) -> None:
        """Give the context its buffers. Raises EngineError if TensorRT refuses one."""
        self.addresses = addresses
        self._context = context
        self._stream = stream
        self._graph: Any = None
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise EngineError(f"TensorRT refuses the buffer of {name}")

    def run(self) -> bool:
        """Start one frame on the stream; returns False if TensorRT could not start it."""
        if self._graph is None:
            return self._context.execute_async_v3(int(self._stream))
        check(backend.cuda_runtime().cudaGraphLaunch(self._graph, self._stream))
        return True

    def record(self) -> str:
        """Record a frame as a CUDA graph, which `run` then replays; returns an empty text, or the reason why `run` does without.

        A frame must have run before, so that nothing is initialised while recording.
        """
        runtime = backend.cuda_runtime()
        check(runtime.cudaStreamBeginCapture(self._stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
        started = self._context.execute_async_v3(int(self._stream))
        status, graph = runtime.cudaStreamEndCapture(self._stream)  # also after a failure: a stream that still records runs nothing
        if started and int(status) == 0:
            status, self._graph = runtime.cudaGraphInstantiate(graph, 0)
        if graph is not None:
            runtime.cudaGraphDestroy(graph)
        if started and int(status) == 0:
            return ""
        self._graph = None
        runtime.cudaGetLastError()
        return f"CUDA reports {status.name}" if int(status) != 0 else "TensorRT could not start the frame while recording"

    def close(self) -> None:
        """Free the graph and the context."""
        if self._graph is not None:
            backend.cuda_runtime().cudaGraphExecDestroy(self._graph)
        self._graph = self._context = None

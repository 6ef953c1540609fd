"""A substitute for a GPU, so that sessions can be tested without one: CUDA's calls work on host memory, and onnxruntime is the engine.

Only what a CPU does not have is replaced: GPU memory with a limit, streams, events, graphs. Types, constants and everything else are those
of cuda-python and of TensorRT-RTX; test_engine_session.py checks the replaced calls against the real signatures. Work on the stream
advances a clock of its own, which events read: COPY_MS for each copy, NETWORK_MS for each run of the network.
"""

# ruff: noqa: N802 (the names are CUDA's and TensorRT's)

import ctypes
import functools
import itertools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt_rtx
from cuda.bindings import runtime

from export.runner import OnnxRunner

OK = runtime.cudaError_t.cudaSuccess
NO_MEMORY = runtime.cudaError_t.cudaErrorMemoryAllocation
FAILED = runtime.cudaError_t.cudaErrorLaunchFailure
NO_CAPTURE = runtime.cudaError_t.cudaErrorStreamCaptureUnsupported
PLAN = b"content of an engine file that is run as the ONNX beside it"
SCRATCH = 1 << 16
"""Bytes for intermediate results that the engine asks for."""
COPY_MS, NETWORK_MS = 0.25, 2.0
"""Milliseconds by which a copy, and a run of the network, advance the clock of the stream."""


class HostCuda:
    """The part of CUDA's runtime API that sessions use. `calls` lists the called names in order; a name in `fail` fails once.

    Attributes:
        clock_ms: Time on the stream; only work on the stream advances it.
        events: The time at which each event was recorded.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.blocks: dict[int, ctypes.Array] = {}
        self.pinned: dict[int, ctypes.Array] = {}
        self.alive: set[object] = set()
        self.calls: list[str] = []
        self.fail: dict[str, Any] = {}
        self.sticky: Any = OK
        self.recording: list[Callable[[], bool]] | None = None
        self.graphs: dict[int, list[Callable[[], bool]]] = {}
        self.capturable = True
        self.clock_ms = 0.0
        self.events: dict[int, float] = {}
        self.users: weakref.WeakSet[object] = weakref.WeakSet()
        self._handles = itertools.count(1000)

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("cuda"):
            return object.__getattribute__(self, name)
        if name not in HostCuda.__dict__:
            return getattr(runtime, name)  # types and constants
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        self.calls.append(name)
        if name in self.fail:
            self.recording = None  # a failing call also ends a recording
            return self.fail.pop(name), None
        return object.__getattribute__(self, name)(*arguments)

    def cudaMalloc(self, size):
        if size > self.limit - sum(map(len, self.blocks.values())):
            return NO_MEMORY, None
        return OK, self._take(self.blocks, size)

    def cudaFree(self, pointer):
        assert not self.users, "memory is freed under a context or an engine"
        del self.blocks[pointer]
        return (OK,)

    def cudaHostAlloc(self, size, flags):
        assert flags == 0
        return OK, self._take(self.pinned, size)

    def cudaFreeHost(self, pointer):
        del self.pinned[pointer]
        return (OK,)

    def cudaMemset(self, pointer, value, size):
        ctypes.memset(pointer, value, size)
        return (OK,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        assert stream in self.alive
        device = target if kind == runtime.cudaMemcpyKind.cudaMemcpyHostToDevice else source
        host = source if device == target else target
        assert len(self.blocks[device]) >= size, "copies past the end of a buffer"
        assert host in self.pinned, "copies from memory that is not page-locked"
        ctypes.memmove(target, source, size)
        self.clock_ms += COPY_MS
        return (OK,)

    def cudaMemGetInfo(self):
        return OK, self.limit - sum(map(len, self.blocks.values())), self.limit

    def cudaStreamCreate(self):
        return OK, self._handle()

    def cudaStreamDestroy(self, stream):
        self.alive.remove(stream)
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        assert stream in self.alive
        return (self.sticky,)

    def cudaEventCreate(self):
        return OK, self._handle()

    def cudaEventDestroy(self, event):
        self.alive.remove(event)
        return (OK,)

    def cudaEventRecord(self, event, stream):
        assert {event, stream} <= self.alive
        self.events[event] = self.clock_ms
        return (OK,)

    def cudaEventElapsedTime(self, start, end):
        assert {start, end} <= self.alive
        return OK, self.events[end] - self.events[start]

    def cudaStreamBeginCapture(self, stream, mode):
        self.recording = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        recorded, self.recording = self.recording, None
        return (OK, recorded) if self.capturable else (NO_CAPTURE, None)

    def cudaGraphInstantiate(self, graph, flags):
        handle = self._handle()
        self.graphs[handle] = graph
        return OK, handle

    def cudaGraphDestroy(self, graph):
        return (OK,)

    def cudaGraphExecDestroy(self, graph):
        self.alive.remove(graph)
        del self.graphs[graph]
        return (OK,)

    def cudaGraphLaunch(self, graph, stream):
        assert {graph, stream} <= self.alive
        return (OK if all(work() for work in self.graphs[graph]) else FAILED,)

    def cudaGetLastError(self):
        return (OK,)

    def _take(self, memory: dict[int, ctypes.Array], size: int) -> int:
        block = (ctypes.c_byte * size)(*([85] * min(size, 64)))  # new memory is not zero
        memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def _handle(self) -> int:
        handle = next(self._handles)
        self.alive.add(handle)
        return handle


class HostTensorRT:
    """TensorRT-RTX whose runtime opens the file content `PLAN` as the ONNX beside it.

    Attributes:
        lost: Counts down with every run of the network; the run at which it reaches zero fails.
        refused: Error with which the runtime refuses the engine; empty if it opens it.
        enqueued: How many frames started their kernels one by one, without a CUDA graph.
    """

    def __init__(self, cuda: HostCuda, onnx_path: Path) -> None:
        self.cuda = cuda
        self.runner = OnnxRunner(onnx_path)
        self.lost = -1
        self.refused = ""
        self.enqueued = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(tensorrt_rtx, name)

    def Runtime(self, logger):
        self.logger = logger
        return self

    def deserialize_cuda_engine(self, content: bytes):
        assert content == PLAN
        if self.refused:
            self.logger.log(tensorrt_rtx.ILogger.Severity.ERROR, self.refused)
            return None
        return Engine(self)


class Engine:
    """The part of ICudaEngine that a session uses."""

    device_memory_size_v2 = SCRATCH

    def __init__(self, trt: HostTensorRT) -> None:
        trt.cuda.users.add(self)
        self.trt = trt
        session = trt.runner._session
        self.tensors = {item.name: tuple(item.shape) for item in (*session.get_inputs(), *session.get_outputs())}
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_shape(self, name):
        return self.tensors[name]

    def get_tensor_dtype(self, name):
        return tensorrt_rtx.float32

    def create_execution_context(self, strategy):
        assert strategy == tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self)


class Context:
    """An execution context that reads its inputs from memory, runs the ONNX and writes its outputs to memory."""

    def __init__(self, engine: Engine) -> None:
        engine.trt.cuda.users.add(self)
        self.engine = engine
        self.addresses: dict[str, int] = {}

    def set_device_memory(self, pointer, size):
        assert len(self.engine.trt.cuda.blocks[pointer]) >= size == SCRATCH

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream):
        cuda = self.engine.trt.cuda
        if cuda.recording is not None:
            cuda.recording.append(self.run)
            return cuda.capturable
        self.engine.trt.enqueued += 1
        return self.run()

    def run(self) -> bool:
        trt = self.engine.trt
        trt.lost -= 1
        if trt.lost == 0:
            trt.logger.log(tensorrt_rtx.ILogger.Severity.ERROR, "the kernel was lost")
            return False
        outputs = trt.runner({name: self._array(name).copy() for name in trt.runner.interface.inputs})
        trt.cuda.clock_ms += NETWORK_MS
        for name, value in outputs.items():
            self._array(name)[...] = value
        return True

    def _array(self, name: str) -> np.ndarray:
        shape = self.engine.tensors[name]
        block = self.engine.trt.cuda.blocks[self.addresses[name]]
        return np.frombuffer(block, np.float32, int(np.prod(shape))).reshape(shape)

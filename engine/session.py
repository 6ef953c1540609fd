"""Runs an engine on a GPU, without torch.

    with Session(path) as session:
        outputs = session.infer({"images": ..., "lidar2img": ..., "can_bus": ..., "prev_bev": ..., "has_prev": ...})

The names of the tensors are those of the detector's interface, here BEVFormer's. Recurrent tensors can stay on the GPU: if a recurrent
input such as `prev_bev` is left out, the session uses the matching output (`bev`) of the last frame that succeeded, by exchanging the two
buffers. A frame that fails does not change that output, and the session can run the next frame.
"""

import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from engine import backend, compatibility, trt_callbacks
from engine.backend import EngineError, check
from engine.captured_context import CapturedContext
from engine.memory import Buffers
from qdbev import artifact
from qdbev.schema import Interface

_log = logging.getLogger(__name__)


class Session:
    """An engine with its buffers and its CUDA stream. It is a context manager, because it owns GPU memory.

    `seal` and `interface` are those of the engine file. `shapes` and `dtypes` of the tensors, by name, are known once the session is open.
    """

    def __init__(self, path: Path) -> None:
        """Check the file and that it can run on this machine. Memory is allocated when the `with` block is entered.

        Raises:
            ArtifactError: The engine is missing, damaged or not sealed.
            EngineError: There is no GPU, its TensorRT is missing, or the engine is for another GPU or version.
        """
        self.seal = artifact.unseal(path, "engine")
        self.interface = self.seal.facts.interface
        self.path = path
        device = backend.require_gpu(f"running {path}")
        compatibility.require_gpu(path, self.seal, device)
        self._backend = backend.load(self.seal.facts.backend.name)
        compatibility.require_version(path, self.seal, self._backend, device)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self._contexts: list[CapturedContext] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def infer(self, inputs: Mapping[str, np.ndarray], outputs: Collection[str] | None = None) -> dict[str, np.ndarray]:
        """Run one frame and return its outputs by name.

        Args:
            inputs: Arrays by the names of the interface. Recurrent inputs may be left out: then the outputs of the last frame are used,
                which are zero before the first frame.
            outputs: Names of the outputs to copy back from the GPU; all of them if None.

        Raises:
            EngineError: A tensor is missing, unknown, or of the wrong shape or type; or the GPU reports a failure.
        """
        outputs = tuple(self.interface.outputs) if outputs is None else outputs
        self._check(inputs, outputs)
        captured = self._contexts[self._parity]
        start, end = self._events
        with self._recovering():
            for name, value in inputs.items():
                self._copy(name, captured, value)
            check(self._runtime.cudaEventRecord(start, self._stream))
            self._run(captured)
            check(self._runtime.cudaEventRecord(end, self._stream))
            for name in outputs:
                self._copy(name, captured)
            check(self._runtime.cudaStreamSynchronize(self._stream))
        self._parity = 1 - self._parity
        return {name: self._pinned(name).copy() for name in outputs}

    def compute_ms(self) -> float:
        """GPU time of the last frame's network in milliseconds, without the copies of inputs and outputs."""
        return float(check(self._runtime.cudaEventElapsedTime(*self._events)))

    def _open(self, stack: ExitStack) -> None:
        trt = self._backend.module
        self._runtime = backend.cuda_runtime()
        self._buffers = stack.enter_context(Buffers(self.path))
        self._stream = check(self._runtime.cudaStreamCreate())
        stack.callback(self._runtime.cudaStreamDestroy, self._stream)
        self._events: list[Any] = []
        for _ in range(2):
            self._events.append(check(self._runtime.cudaEventCreate()))
            stack.callback(self._runtime.cudaEventDestroy, self._events[-1])
        self._messages = trt_callbacks.logger(trt)
        self._host: dict[str, np.ndarray] = {}
        self._parity, self._broken = 0, ""
        stack.callback(self._close_engine)
        self._deserialize(trt)
        self._describe(trt)
        self._create_contexts(trt)
        stack.callback(self._runtime.cudaStreamSynchronize, self._stream)
        self._warm_up()

    def _deserialize(self, trt: Any) -> None:
        # A local variable would keep the engine and its memory alive in the traceback of an error.
        self._engine = trt.Runtime(self._messages).deserialize_cuda_engine(self.path.read_bytes())
        if self._engine is None:
            device = backend.require_gpu(f"running {self.path}")
            self._fail(
                f"{self._backend.name} {self._backend.version} cannot open it; {self._buffers.state()}. If memory is not the reason, "
                f"build it again: {compatibility.rebuild_command(self.path, self.seal, device)}"
            )

    def _describe(self, trt: Any) -> None:
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            self.shapes[name] = tuple(self._engine.get_tensor_shape(name))
            self.dtypes[name] = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
        fixed = all(min(shape, default=1) > 0 for shape in self.shapes.values())
        wanted = self.interface.inputs | self.interface.outputs
        if not fixed or self.shapes != wanted:
            self._fail(f"it has the tensors {self.shapes}; its seal says {wanted}")

    def _create_contexts(self, trt: Any) -> None:
        straight = {name: self._buffers.device(name, self._bytes(name)) for name in self.shapes}
        swapped = dict(straight)
        for output, input_ in self.interface.recurrent:
            swapped |= {output: straight[input_], input_: straight[output]}
        size = self._engine.device_memory_size_v2
        shared = self._buffers.device("the layers' intermediate results", size)
        for addresses in (straight, swapped):
            context = self._engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None:
                self._fail(f"no memory or kernels to run it here; {self._buffers.state()}")
            context.set_device_memory(shared, size)
            self._contexts.append(CapturedContext(context, addresses, self._stream))

    def _bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtypes[name].itemsize

    def _warm_up(self) -> None:
        """Run each context once on zeros and record it as a CUDA graph; afterwards set the recurrent tensors to zero again."""
        reason = ""
        for captured in self._contexts:
            self._run(captured)
            check(self._runtime.cudaStreamSynchronize(self._stream))
            reason = reason or captured.record()
        if reason:
            _log.warning("%s: no CUDA graph (%s); every frame launches its kernels one by one, which takes longer", self.path, reason)
        for name in (name for pair in self.interface.recurrent for name in pair):
            check(self._runtime.cudaMemset(self._contexts[0].addresses[name], 0, self._bytes(name)))

    def _run(self, captured: CapturedContext) -> None:
        self._messages.problems.clear()
        if not captured.run():
            self._fail(f"TensorRT could not start the frame; {self._buffers.state()}")

    def _copy(self, name: str, captured: CapturedContext, value: np.ndarray | None = None) -> None:
        """Queue a copy of `value` to the GPU through page-locked memory; without a value, a copy of the tensor from the GPU."""
        host, device, kinds = self._pinned(name), captured.addresses[name], self._runtime.cudaMemcpyKind
        if value is not None:
            np.copyto(host, value)
            check(self._runtime.cudaMemcpyAsync(device, host.ctypes.data, host.nbytes, kinds.cudaMemcpyHostToDevice, self._stream))
        else:
            check(self._runtime.cudaMemcpyAsync(host.ctypes.data, device, host.nbytes, kinds.cudaMemcpyDeviceToHost, self._stream))

    def _pinned(self, name: str) -> np.ndarray:
        """The page-locked array of a tensor. It is allocated at first use, because a stream never copies the recurrent tensors."""
        if name not in self._host:
            self._host[name] = self._buffers.pinned(name, self.shapes[name], self.dtypes[name])
        return self._host[name]

    @contextmanager
    def _recovering(self) -> Iterator[None]:
        """When a frame fails, wait for the work it queued, and note whether CUDA still works in this process."""
        try:
            yield
        except BaseException:
            self._runtime.cudaStreamSynchronize(self._stream)
            self._runtime.cudaGetLastError()
            status, *_ = self._runtime.cudaStreamSynchronize(self._stream)
            self._broken = status.name if int(status) != 0 else ""
            raise

    def _check(self, inputs: Mapping[str, np.ndarray], outputs: Collection[str]) -> None:
        if not self._contexts:
            raise EngineError(f"the session of {self.path} is not open; use it in a with statement")
        if self._broken:
            raise EngineError(
                f"{self.path}: an earlier frame left the GPU unusable for this process ({self._broken}); start the process again"
            )
        check_tensors(self.interface, self.shapes, self.dtypes, inputs, outputs)

    def _fail(self, what: str) -> None:
        raise EngineError("\n  ".join([f"{self.path}: {what}", *self._messages.problems]))

    def _close_engine(self) -> None:
        """Free the contexts, then the engine; both must go before the stream, the events and the buffers that they use."""
        for captured in self._contexts:
            captured.close()
        self._contexts.clear()
        self._engine = None
        self._host.clear()
        self._events.clear()


def check_tensors(
    interface: Interface,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype[Any]],
    inputs: Mapping[str, np.ndarray],
    outputs: Collection[str],
) -> None:
    """Raise EngineError if an input is missing, unknown, or of another shape or type than the engine's, or an output is unknown."""
    known, recurrent = interface.inputs, [name for _, name in interface.recurrent]
    missing = [name for name in known if name not in inputs and name not in recurrent]
    unknown = [*(name for name in inputs if name not in known), *(name for name in outputs if name not in interface.outputs)]
    if missing or unknown:
        raise EngineError(
            f"missing inputs: {', '.join(missing) or 'none'}; unknown names: {', '.join(unknown) or 'none'}; "
            f"the engine takes {', '.join(known)}"
        )
    for name, value in inputs.items():
        if value.shape != shapes[name] or value.dtype != dtypes[name]:
            raise EngineError(f"{name} is {value.dtype}{value.shape}, the engine takes {dtypes[name]}{shapes[name]}")

"""The memory of a session: buffers on the GPU, and page-locked buffers on the host, which the GPU can copy without the CPU.

All buffers are freed together. If memory runs out, the error says for what it was needed, how much, and how much is free.
"""

import ctypes
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from engine import backend
from engine.backend import EngineError, check

_PAGE_LOCKED = 0
"""cudaHostAllocDefault."""


class Buffers:
    """All buffers of one engine. A context manager that frees them at its end."""

    def __init__(self, owner: Path) -> None:
        self._owner = owner
        self._runtime = backend.cuda_runtime()
        self._device: dict[int, int] = {}
        self._host: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pointer in self._device:
            self._runtime.cudaFree(pointer)
        for pointer in self._host:
            self._runtime.cudaFreeHost(pointer)
        self._device.clear()
        self._host.clear()

    def device(self, purpose: str, size: int) -> int:
        """Allocate `size` bytes on the GPU, set them to zero and return their address.

        Raises:
            EngineError: The GPU has too little free memory; the message names the `purpose`.
        """
        size = max(1, size)
        status, pointer = self._runtime.cudaMalloc(size)
        if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            self._runtime.cudaGetLastError()
            raise EngineError(
                f"{self._owner}: no GPU memory for {purpose} ({_mb(size)}); {self.state()}. Close other programs that use the GPU"
            )
        address = int(check((status, pointer)))
        self._device[address] = size
        check(self._runtime.cudaMemset(address, 0, size))
        return address

    def pinned(self, purpose: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Allocate a page-locked array on the host; it must not be used after the buffers are freed.

        Raises:
            EngineError: The system has too little page-locked memory; the message names the `purpose`.
        """
        size = max(1, int(np.prod(shape)) * dtype.itemsize)
        status, pointer = self._runtime.cudaHostAlloc(size, _PAGE_LOCKED)
        if status == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            self._runtime.cudaGetLastError()
            raise EngineError(f"{self._owner}: no page-locked host memory for {purpose} ({_mb(size)}); close other programs")
        address = int(check((status, pointer)))
        self._host.append(address)
        block = (ctypes.c_byte * size).from_address(address)
        return np.frombuffer(block, dtype, count=int(np.prod(shape))).reshape(shape)

    def state(self) -> str:
        """Describe free and used GPU memory, for error messages."""
        status, free, total = self._runtime.cudaMemGetInfo()
        if int(status) != 0:
            return f"how much GPU memory is free is unknown ({status.name})"
        return f"{_mb(free)} of {_mb(total)} of GPU memory are free, {_mb(sum(self._device.values()))} are used by this session's buffers"


def _mb(size: int) -> str:
    return f"{size / 2**20:.1f} MB"

"""The memory of a session: buffers on the GPU, and page-locked buffers on the host, which the GPU can copy without the CPU."""

import ctypes
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from engine import backend
from engine.backend import EngineError, check

_PAGE_LOCKED = 0
"""cudaHostAllocDefault."""


class Buffers(ExitStack):
    """All buffers of one engine. A context manager that frees them at its end."""

    def __init__(self, owner: Path) -> None:
        super().__init__()
        self._owner = owner
        self._runtime = backend.cuda_runtime()
        self._device_bytes = 0

    def device(self, purpose: str, size: int) -> int:
        """Allocate `size` bytes on the GPU, set them to zero and return their address. Raises EngineError if too few are free."""
        size = max(1, size)
        address = self._allocated(self._runtime.cudaMalloc(size), self._runtime.cudaFree)
        if address is None:
            raise EngineError(
                f"{self._owner}: no GPU memory for {purpose} ({_mb(size)}); {self.state()}. Close other programs that use the GPU"
            )
        self._device_bytes += size
        check(self._runtime.cudaMemset(address, 0, size))
        return address

    def pinned(self, purpose: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Allocate a page-locked array on the host, to be used until the buffers are freed. Raises EngineError if memory is short."""
        count = math.prod(shape)
        size = max(1, count * dtype.itemsize)
        address = self._allocated(self._runtime.cudaHostAlloc(size, _PAGE_LOCKED), self._runtime.cudaFreeHost)
        if address is None:
            raise EngineError(f"{self._owner}: no page-locked host memory for {purpose} ({_mb(size)}); close other programs")
        return np.frombuffer((ctypes.c_byte * size).from_address(address), dtype, count).reshape(shape)

    def state(self) -> str:
        """Describe free and used GPU memory, for error messages."""
        status, free, total = self._runtime.cudaMemGetInfo()
        if int(status) != 0:
            return f"how much GPU memory is free is unknown ({status.name})"
        return f"{_mb(free)} of {_mb(total)} of GPU memory are free, {_mb(self._device_bytes)} are used by this session's buffers"

    def _allocated(self, result: tuple[Any, Any], free: Callable[[int], object]) -> int | None:
        """The address in the result of an allocation, which is freed at the end; None if there is too little memory."""
        if result[0] == self._runtime.cudaError_t.cudaErrorMemoryAllocation:
            self._runtime.cudaGetLastError()
            return None
        address = int(check(result))
        self.callback(free, address)
        return address


def _mb(size: int) -> str:
    return f"{size / 2**20:.1f} MB"

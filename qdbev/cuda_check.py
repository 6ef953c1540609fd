"""Check the status that every cuda-python call returns. This module imports neither torch nor cuda-python."""

from typing import Any


class CudaError(ValueError):
    """A call of the CUDA driver, the CUDA runtime or NVRTC failed."""


def check(result: tuple[Any, ...], error: type[ValueError] = CudaError) -> Any:
    """Return the value, or the tuple of values, of a cuda-python call from its result (status, values...); raises `error` if it failed."""
    status, *values = result
    if int(status) != 0:
        raise error(f"a CUDA call failed with {status.name}")
    return values[0] if len(values) == 1 else tuple(values)

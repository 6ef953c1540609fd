"""Compile the attention kernels of plugins/attention as host C++. It is the same text as on a GPU; the teams run one after another."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plugins.attention.cases import operator_inputs
from plugins.attention.variant import Variant
from plugins.kernel import Launch

_HEADER = Path(__file__).with_name("kernel_on_host.h")
_ORDER = 'extern "C" int query_at(int order, int num_query, int row) { return variant_0::query_at(order, num_query, row); }\n'
_DEFINE = re.compile(r"^#define (\w+)", re.MULTILINE)


class HostKernels:
    """A shared library with the kernels of several variants. Without g++ the test is skipped."""

    def __init__(self, variants: Iterable[Variant], folder: Path, flags: Sequence[str] = ()) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("needs g++ to compile the kernels for the host")
        self._index = {variant: index for index, variant in enumerate(dict.fromkeys(variants))}
        source, library = folder / "kernels.cpp", folder / "kernels.so"
        entries = "".join(_entry(variant, index) for variant, index in self._index.items())
        source.write_text(f'#include "{_HEADER}"\n{entries}{_ORDER}')
        command = [compiler, "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", *flags]
        done = subprocess.run([*command, str(source), "-o", str(library)], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0 and not done.stderr, done.stderr
        self._library = ctypes.CDLL(str(library))

    def attend(self, variant: Variant, value: Tensor, scale: float, others: Sequence[Tensor], row_length: int = 0) -> Tensor:
        """Return the output (B, Q, M * C). `others` are the operator's inputs after `value` and its scale."""
        batch, num_query = others[-1].shape[:2]
        dtype = getattr(torch, variant.out)
        out = torch.full((batch, num_query, variant.num_heads * variant.channels), torch.nan, dtype=dtype)
        inputs = operator_inputs(variant, value, scale, [tensor.contiguous() for tensor in others])
        numbers = {"num_query": num_query, "num_cameras": value.shape[1], "row_length": row_length}
        self._call(variant, [tensor.data_ptr() for tensor in (*inputs, out)], variant.grid(num_query, batch), numbers)
        return out

    def query_at(self, order: int, num_query: int, row_length: int) -> int:
        """Return the index of the query that the kernels compute at position `order`."""
        return self._library.query_at(order, num_query, row_length)

    def run(self, kernel: Variant, launch: Launch, inputs: Sequence[Tensor], out: Tensor) -> None:
        """Run a kernel on the host; has the parameters of plugins.launch.run."""
        self._call(kernel, [tensor.data_ptr() for tensor in (*inputs, out)], launch.grid, launch.numbers)

    def _call(self, variant: Variant, addresses: list[int], grid: tuple[int, int, int], numbers: dict[str, int]) -> None:
        assert all(address % 16 == 0 for address in addresses), (
            "the kernels load and store 16 bytes at a time, so every tensor must start at a multiple of 16 bytes"
        )
        sizes = (*grid, numbers["num_query"], numbers.get("num_cameras", 1), numbers["row_length"])
        function = getattr(self._library, f"run_{self._index[variant]}")
        function((ctypes.c_void_p * len(addresses))(*addresses), *map(ctypes.c_int, sizes))


def _numbers(variant: Variant) -> list[str]:
    """Return the names of the kernel's int32 parameters in order."""
    return ["num_query", *["num_cameras"] * variant.spatial, "row_length"]


def _entry(variant: Variant, index: int) -> str:
    """Return host C++ with the kernel in a namespace and `run_<index>(pointers, grid x, y, z, queries, cameras, row length)`."""
    pointers, numbers = (*variant.form.inputs, "out"), {"num_query": "queries", "num_cameras": "cameras", "row_length": "row"}
    types = {"value": "const void*", "value_scale": f"const variant_{index}::OutNumber*", "out": "void*"}
    passed = [f"({types.get(name, 'const float*')})a[{position}]" for position, name in enumerate(pointers)]
    arguments = ", ".join([*passed[:-1], *(numbers[name] for name in _numbers(variant)), passed[-1]])
    call = f"variant_{index}::{variant.entry}({arguments})"
    source = variant.source()
    macros = set(_DEFINE.findall(source)) - set(_DEFINE.findall(_HEADER.read_text()))
    undefine = "".join(f"#undef {macro}\n" for macro in sorted(macros))
    return f"""
namespace variant_{index} {{
constexpr int HELD = {variant.lanes};
{source}
}}
extern "C" void run_{index}(void* const* a, int x, int y, int z, int queries, [[maybe_unused]] int cameras, int row) {{
    launch({{unsigned(x), unsigned(y), unsigned(z)}}, {variant.threads}, {variant.lanes}, [=] {{ {call}; }});
}}
{undefine}"""

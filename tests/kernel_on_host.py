"""The kernels of plugins/attention.cu compiled as host C++: the same text as on a GPU, run one team after the other."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plugins.variant import THREADS, Variant

_HEADER = Path(__file__).with_name("kernel_on_host.h")
_ORDER = 'extern "C" int query_at(int order, int num_query, int row) { return variant_0::query_at(order, num_query, row); }\n'
_DEFINE = re.compile(r"^#define (\w+)", re.MULTILINE)


class HostKernels:
    """A library of variants. Where there is no g++, making it skips the test."""

    def __init__(self, variants: Iterable[Variant], folder: Path, flags: Sequence[str] = ()) -> None:
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.skip("needs g++ to compile the kernels for the host")
        self._index = {variant: index for index, variant in enumerate(dict.fromkeys(variants))}
        source, library = folder / "kernels.cpp", folder / "kernels.so"
        entries = "".join(_entry(variant, index) for variant, index in self._index.items())
        source.write_text(f'#include "{_HEADER}"\n{entries}{_ORDER}')
        command = [compiler, "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas", *flags]
        done = subprocess.run([*command, str(source), "-o", str(library)], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        self._library = ctypes.CDLL(str(library))

    def attend(self, variant: Variant, value: Tensor, scale: float, others: Sequence[Tensor], row_length: int = 0) -> Tensor:
        """(B, Q, M * C). `value` and `others` are the operator's inputs, `scale` what a step of an int8 `value` is worth."""
        batch, num_query = others[-1].shape[:2]
        dtype = getattr(torch, variant.out)
        out = torch.full((batch, num_query, variant.num_heads * variant.channels), torch.nan, dtype=dtype)
        value_scale = torch.tensor(scale, dtype=dtype)
        tensors = [value, *[value_scale] * (variant.value == "int8"), *(tensor.contiguous() for tensor in others), out]
        numbers = {"num_query": num_query, "num_cameras": value.shape[1], "row_length": row_length}
        self._call(variant, [tensor.data_ptr() for tensor in tensors], variant.grid(num_query, batch), numbers)
        return out

    def query_at(self, order: int, num_query: int, row_length: int) -> int:
        """The query that the kernels compute `order`-th."""
        return self._library.query_at(order, num_query, row_length)

    def run(
        self,
        device: torch.device,
        source: str,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        values: tuple[int, ...],
        types: tuple[type, ...],
    ) -> None:
        """In place of plugins.launch.run."""
        variant = next(variant for variant in self._index if variant.source() == source)
        assert kernel == variant.op and threads == THREADS and len(values) == len(types) == len(variant.parameters)
        given = dict(zip(variant.parameters, zip(values, types, strict=True), strict=True))
        addresses = [value for value, kind in given.values() if kind is ctypes.c_void_p]
        self._call(variant, addresses, grid, {name: value for name, (value, kind) in given.items() if kind is ctypes.c_int})

    def _call(self, variant: Variant, addresses: list[int], grid: tuple[int, int, int], numbers: dict[str, int]) -> None:
        assert all(address % 16 == 0 for address in addresses), "a kernel's loads and stores begin at multiples of 16 bytes"
        sizes = (*grid, numbers["num_query"], numbers.get("num_cameras", 1), numbers["row_length"])
        function = getattr(self._library, f"run_{self._index[variant]}")
        function((ctypes.c_void_p * len(addresses))(*addresses), *map(ctypes.c_int, sizes))


def _entry(variant: Variant, index: int) -> str:
    """The variant's kernel in a namespace, and `run_<index>(addresses, grid x, y, z, queries, cameras, row length)`."""
    numbers = {"num_query": "queries", "num_cameras": "cameras", "row_length": "row"}
    pointers = [name for name in variant.parameters if name not in numbers]
    types = {"value": "const void*", "value_scale": f"const variant_{index}::OutNumber*", "out": "void*"}
    numbers |= {name: f"({types.get(name, 'const float*')})a[{index}]" for index, name in enumerate(pointers)}
    arguments = ", ".join(numbers[name] for name in variant.parameters)
    source = variant.source()
    macros = set(_DEFINE.findall(source)) - set(_DEFINE.findall(_HEADER.read_text()))
    undefine = "".join(f"#undef {macro}\n" for macro in sorted(macros))
    return f"""
namespace variant_{index} {{
constexpr int HELD = {variant.lanes};
{source}
}}
extern "C" void run_{index}(void* const* a, int x, int y, int z, int queries, [[maybe_unused]] int cameras, int row) {{
    launch({{unsigned(x), unsigned(y), unsigned(z)}}, {THREADS}, {variant.lanes}, [=] {{ variant_{index}::{variant.op}({arguments}); }});
}}
{undefine}"""

"""One attention kernel with its compile-time constants, its source and its launch. The kernel itself is attention.cu."""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from plugins.kernel import Attributes, KernelError, KernelFamily, Launch, OutType, Shapes, Types, ValueType
from qdbev.ops.contract import INTEGER_FORMS, MSDA, MSDA_INT8, SCA, SCA_INT8, Operator

FLOAT_TYPES: tuple[Types, ...] = (("float32", "float32"), ("float16", "float16"))
"""Number types of `value` and of the output in the operators with a floating-point `value`."""
INT8_TYPES: tuple[Types, ...] = (("int8", "float32"), ("int8", "float16"))
"""Number types of `value` and of the output in the operators with an int8 `value`."""
TYPES = (*FLOAT_TYPES, *INT8_TYPES)
"""All combinations of number types for which the attentions have a kernel."""
MAX_CAMERAS = 32
"""Largest number of cameras per launch. The kernel stores which cameras see a query as bits of a 32-bit word."""
MAX_BATCH = 65535
"""Largest batch per launch, which is CUDA's limit for the number of blocks along z."""

_SOURCES = [Path(__file__).with_name(name) for name in ("numbers.cuh", "attention.cu")]
_BYTES: dict[ValueType, int] = {"float32": 4, "float16": 2, "int8": 1}
_MACRO: dict[ValueType, str] = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8"}
_LOAD_BYTES = 16
"""Bytes that one thread loads at once, at most."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """An attention kernel with all its compile-time constants; implements plugins.kernel.Kernel.

    Batch, number of queries and number of cameras are arguments of a launch.
    """

    threads: ClassVar[int] = 256
    """Threads per block."""

    operator: Operator
    """MSDA or SCA. The type of `value` decides between this operator and its int8 form; see `form`."""
    value: ValueType
    """Number type of the input `value`. Coordinates, visibility and logits are always float32."""
    out: OutType
    """Number type of the output, and of `value_scale` in the int8 forms."""
    num_heads: int
    channels: int
    """Channels per head."""
    num_points: int
    """Sampling points per query, head and level."""
    num_pillar_points: int
    """Reference points per query and camera; 1 in multi-scale deformable attention."""
    level_hw: tuple[tuple[int, int], ...]
    """Height and width of each level, in cells."""

    def __post_init__(self) -> None:
        _require(
            self.channels >= 4 and self.channels & (self.channels - 1) == 0 and self.lanes <= 32,
            f"{self.channels} channels per head in {self.value}: kernels exist for powers of two from 4 to {512 // self.value_bytes}",
        )
        _require(1 <= self.num_points <= 32, f"{self.num_points} sampling points: kernels exist for 1 to 32 per level")
        _require(
            self.num_pillar_points >= 1 and self.num_points % self.num_pillar_points == 0,
            f"{self.num_points} sampling points cannot be divided evenly among {self.num_pillar_points} pillar points",
        )
        _require(
            len(self.level_hw) > 0 and all(h >= 1 and w >= 1 for h, w in self.level_hw),
            f"level_hw is {list(self.level_hw)}: there must be at least one level, and each must have at least one cell",
        )
        size = self.num_keys * self.num_heads * self.channels * self.value_bytes
        _require(size < 2**31, f"the keys of one camera take {size} bytes: kernels exist for less than 2 GiB")

    @property
    def form(self) -> Operator:
        """The operator that this kernel computes: `operator`, or its int8 form if `value` is int8."""
        return INTEGER_FORMS[self.operator.name] if self.value == "int8" else self.operator

    @property
    def entry(self) -> str:
        """Name of the kernel function; the int8 forms have the same name as the float forms."""
        return self.operator.torch_name

    @property
    def spatial(self) -> bool:
        """True for spatial cross-attention, which has cameras and `visible`."""
        return self.operator == SCA

    @property
    def value_bytes(self) -> int:
        """Bytes per number of `value`."""
        return _BYTES[self.value]

    @property
    def num_keys(self) -> int:
        """Number of keys of all levels together, per camera."""
        return sum(h * w for h, w in self.level_hw)

    @property
    def lanes(self) -> int:
        """Number of threads that compute one query and head together; each computes the channels of one load of up to 16 bytes."""
        return max(1, self.channels * self.value_bytes // _LOAD_BYTES)

    def grid(self, num_query: int, batch: int) -> tuple[int, int, int]:
        """Return the number of blocks along x, y and z."""
        return -(-num_query * self.lanes // self.threads), self.num_heads, batch

    def launch(self, shapes: Shapes) -> Launch:
        """Return the grid and the int32 arguments; see plugins.kernel.Kernel."""
        B, Q = shapes["attention_logits"][:2]
        N = shapes["value"][1] if self.spatial else 1
        cameras = (N,) * self.spatial
        samples = (B, Q, self.num_heads, len(self.level_hw), self.num_points)
        expected = {
            "value": (B, *cameras, self.num_keys, self.num_heads, self.channels),
            "reference_points": (B, *cameras, Q, *((self.num_pillar_points, 2) if self.spatial else (2,))),
            "visible": (B, *cameras, Q),
            "sampling_offsets": (*samples, 2),
            "attention_logits": samples,
        }
        for name, found in shapes.items():
            if name == "value_scale":
                _require(math.prod(found) == 1, f"value_scale is {tuple(found)}, must be one number")
            else:
                _require(tuple(found) == expected[name], f"{name} is {tuple(found)}, must be {expected[name]}")
        _require(
            B <= MAX_BATCH and N <= MAX_CAMERAS,
            f"the batch is {B}, with {N} cameras; one launch takes a batch of up to {MAX_BATCH} and up to {MAX_CAMERAS} cameras",
        )
        num_cameras = {"num_cameras": N} if self.spatial else {}
        return Launch(self.grid(Q, B), {"num_query": Q, **num_cameras, "row_length": row_length(Q)})

    def source(self) -> str:
        """Return the CUDA C++ source. After the declarations of tests/kernel_on_host.h it is also host C++."""
        constants = {
            "SPATIAL": int(self.spatial),
            "HEADS": self.num_heads,
            "CHANNELS": self.channels,
            "LEVELS": len(self.level_hw),
            "POINTS": self.num_points,
            "PILLARS": self.num_pillar_points,
            "LEVEL_HW": ", ".join(f"{{{h}, {w}}}" for h, w in self.level_hw),
            "KEYS": self.num_keys,
            "VALUE": _MACRO[self.value],
            "OUT": _MACRO[self.out],
            "THREADS": self.threads,
        }
        defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
        return defines + "".join(f'#line 1 "{path.name}"\n{path.read_text()}' for path in _SOURCES)


def row_length(num_query: int) -> int:
    """Return the side of the query grid if `num_query` is a square number, else 0. The kernel walks a square grid in bands."""
    side = math.isqrt(num_query)
    return side if side * side == num_query else 0


def of_shapes(operator: Operator, types: Types, shapes: Shapes, attributes: Attributes) -> Variant:
    """Return the kernel of `operator`, MSDA or SCA, for these inputs and `level_hw`. Raises KernelError if there is none."""
    value, out = types
    _require(
        len(shapes["value"]) >= 2 and len(shapes["attention_logits"]) == 5 and len(shapes["reference_points"]) >= 2,
        f"value is {tuple(shapes['value'])}, reference_points {tuple(shapes['reference_points'])} and attention_logits "
        f"{tuple(shapes['attention_logits'])}; {operator.name} needs the shapes that plugins/README.md lists",
    )
    sizes = [int(size) for size in attributes["level_hw"]]
    return Variant(
        operator=operator,
        value=value,
        out=out,
        num_heads=shapes["value"][-2],
        channels=shapes["value"][-1],
        num_points=shapes["attention_logits"][-1],
        num_pillar_points=shapes["reference_points"][-2] if operator == SCA else 1,
        level_hw=tuple(zip(sizes[::2], sizes[1::2], strict=True)),
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise KernelError(message)


KERNELS: dict[Operator, KernelFamily] = {
    MSDA: KernelFamily(FLOAT_TYPES, functools.partial(of_shapes, MSDA)),
    SCA: KernelFamily(FLOAT_TYPES, functools.partial(of_shapes, SCA)),
    MSDA_INT8: KernelFamily(INT8_TYPES, functools.partial(of_shapes, MSDA)),
    SCA_INT8: KernelFamily(INT8_TYPES, functools.partial(of_shapes, SCA)),
}
"""The kernels of each of the four attention operators."""

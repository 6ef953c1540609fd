"""What a compiled kernel is fixed to, how it is launched, and which variants the recipes need. The kernel is plugins/attention.cu."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qdbev.config import Config
from qdbev.data.image_transform import NUSCENES_HW, image_transform
from synthetic.config import WORLDS

Op = Literal["spatial_cross_attention", "multi_scale_deformable_attention"]
"""Also the name of the kernel."""
Number = Literal["float32", "float16", "int8"]
Out = Literal["float32", "float16"]

TYPES: tuple[tuple[Number, Out], ...] = (("float32", "float32"), ("float16", "float16"), ("int8", "float16"), ("int8", "float32"))
"""Of the input `value` and of the output."""
THREADS = 256
"""A block."""
MAX_CAMERAS = 32
"""A kernel keeps the cameras that see a query as bits of a word."""
MAX_BATCH = 65535
"""Blocks along z."""

_SOURCES = [Path(__file__).with_name(name) for name in ("numbers.cuh", "attention.cu")]
_BYTES: dict[Number, int] = {"float32": 4, "float16": 2, "int8": 1}
_MACRO: dict[Number, str] = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8"}
_LOAD_BYTES = 16


class VariantError(ValueError):
    """Sizes that no kernel exists for, or that do not fit together."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The constants of a kernel. Batch, queries and cameras are arguments of a launch."""

    op: Op
    value: Number
    """Type of the input `value`; `value_scale` is of the output's type, all other inputs are float32."""
    out: Out
    num_heads: int
    channels: int
    """Of one head."""
    num_points: int
    num_pillar_points: int
    """1 in multi-scale deformable attention."""
    level_hw: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        _require(
            self.channels >= 4 and self.channels & (self.channels - 1) == 0 and self.lanes <= 32,
            f"{self.channels} channels a head in {self.value}: kernels exist for powers of two from 4 to {512 // self.value_bytes}",
        )
        _require(1 <= self.num_points <= 32, f"{self.num_points} sampling points: kernels exist for 1 to 32 a level")
        _require(
            self.num_pillar_points >= 1 and self.num_points % self.num_pillar_points == 0,
            f"{self.num_points} sampling points cannot be shared among {self.num_pillar_points} pillar points",
        )
        _require(
            len(self.level_hw) > 0 and all(h >= 1 and w >= 1 for h, w in self.level_hw),
            f"level_hw {list(self.level_hw)}: there must be a level, and each at least one cell",
        )
        size = self.num_keys * self.num_heads * self.channels * self.value_bytes
        _require(size < 2**31, f"the keys of one camera take {size} bytes; kernels reach 2 GiB")

    @property
    def value_bytes(self) -> int:
        """Of one number of `value`."""
        return _BYTES[self.value]

    @property
    def num_keys(self) -> int:
        """Of all levels."""
        return sum(h * w for h, w in self.level_hw)

    @property
    def lanes(self) -> int:
        """Threads that compute one query and head together, each what one load of up to 16 bytes brings."""
        return max(1, self.channels * self.value_bytes // _LOAD_BYTES)

    @property
    def queries_a_block(self) -> int:
        """Queries of one head that a block of THREADS computes."""
        return THREADS // self.lanes

    def grid(self, num_query: int, batch: int) -> tuple[int, int, int]:
        """Blocks of a launch along x, y and z."""
        return -(-num_query // self.queries_a_block), self.num_heads, batch

    @property
    def parameters(self) -> tuple[str, ...]:
        """The kernel's parameters: inputs, then int32 numbers, then the output, as TensorRT passes them."""
        return (*input_names(self.op, self.value), *self.numbers, "out")

    @property
    def numbers(self) -> tuple[str, ...]:
        """Its int32 parameters."""
        return ("num_query", *["num_cameras"] * (self.op == "spatial_cross_attention"), "row_length")

    def launch_numbers(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Values of `numbers`, and `batch`, for inputs of these shapes, by name.

        Raises:
            VariantError: They do not fit together, or a launch cannot take so many.
        """
        B, Q = shapes["attention_logits"][:2]
        N = shapes["value"][1] if "visible" in shapes else 1
        cameras = (N,) * ("visible" in shapes)
        expected = {
            "value": (B, *cameras, self.num_keys, self.num_heads, self.channels),
            "reference_points": (B, *cameras, Q, *((self.num_pillar_points, 2) if cameras else (2,))),
            "visible": (B, *cameras, Q),
            "sampling_offsets": (B, Q, self.num_heads, len(self.level_hw), self.num_points, 2),
            "attention_logits": (B, Q, self.num_heads, len(self.level_hw), self.num_points),
        }
        for name, found in shapes.items():
            if name == "value_scale":
                _require(math.prod(found) == 1, f"value_scale is {tuple(found)}, must be one number")
            else:
                _require(tuple(found) == expected[name], f"{name} is {tuple(found)}, must be {expected[name]}")
        _require(B <= MAX_BATCH and N <= MAX_CAMERAS, f"batch {B}, {N} cameras; kernels take up to {MAX_BATCH} and {MAX_CAMERAS}")
        return {"batch": B, "num_query": Q, "num_cameras": N, "row_length": row_length(Q)}

    def source(self) -> str:
        """CUDA C++ of this variant; also C++ of the host, behind the declarations of tests/kernel_on_host.h."""
        constants = {
            "SPATIAL": int(self.op == "spatial_cross_attention"),
            "HEADS": self.num_heads,
            "CHANNELS": self.channels,
            "LEVELS": len(self.level_hw),
            "POINTS": self.num_points,
            "PILLARS": self.num_pillar_points,
            "LEVEL_HW": ", ".join(f"{{{h}, {w}}}" for h, w in self.level_hw),
            "KEYS": self.num_keys,
            "VALUE": _MACRO[self.value],
            "OUT": _MACRO[self.out],
            "THREADS": THREADS,
        }
        defines = "".join(f"#define {name} {value}\n" for name, value in constants.items())
        return defines + "".join(f'#line 1 "{path.name}"\n{path.read_text()}' for path in _SOURCES)


def input_names(op: Op, value: Number) -> tuple[str, ...]:
    """The inputs of an operator, in order."""
    scale, visible = ("value_scale",) * (value == "int8"), ("visible",) * (op == "spatial_cross_attention")
    return ("value", *scale, "reference_points", *visible, "sampling_offsets", "attention_logits")


def of_shapes(value: Number, out: Out, shapes: Mapping[str, Sequence[int]], level_hw: Sequence[tuple[int, int]]) -> Variant:
    """The kernel for inputs of these shapes, by name; with `visible` it is spatial cross-attention.

    Raises:
        VariantError: There is none.
    """
    spatial = "visible" in shapes
    return Variant(
        op="spatial_cross_attention" if spatial else "multi_scale_deformable_attention",
        value=value,
        out=out,
        num_heads=shapes["value"][-2],
        channels=shapes["value"][-1],
        num_points=shapes["attention_logits"][-1],
        num_pillar_points=shapes["reference_points"][-2] if spatial else 1,
        level_hw=tuple((int(h), int(w)) for h, w in level_hw),
    )


def row_length(num_query: int) -> int:
    """Queries of a row where so many are taken for a square grid, else 0: only the order of computation depends on it, no number."""
    side = math.isqrt(num_query)
    return side if side * side == num_query else 0


def of_recipe(config: Config) -> Iterator[Variant]:
    """Every attention that the recipe's network has, with all TYPES.

    Image sizes are those of nuScenes, and for data/micro those of the synthetic world.
    """
    model = config.model
    for value, out in TYPES:
        shared = {
            "value": value,
            "out": out,
            "num_heads": model.num_heads,
            "channels": model.embed_dim // model.num_heads,
        }
        yield Variant(
            op="spatial_cross_attention",
            num_points=model.num_spatial_points,
            num_pillar_points=model.num_pillar_points,
            level_hw=camera_levels(config),
            **shared,
        )
        yield Variant(
            op="multi_scale_deformable_attention",
            num_points=model.num_points,
            num_pillar_points=1,
            level_hw=(model.bev_hw,),
            **shared,
        )


def camera_levels(config: Config) -> tuple[tuple[int, int], ...]:
    """Sizes of the levels that the recipe's neck gives for its images."""
    stored_hw = WORLDS[config.name]().image_hw if config.name in WORLDS else NUSCENES_HW
    return tuple(config.model.level_hw(image_transform(config.data, stored_hw).padded_hw))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise VariantError(message)

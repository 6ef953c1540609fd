"""Check the attention kernels on this machine's GPU and measure their speed: `python -m bench.kernels --out FILE`.

Spatial cross-attention is measured at the size of the recipe base, with the camera visibility of the synthetic rig, which is close to
that of nuScenes. It is compared with PyTorch's own operators, with mmcv's kernel if mmcv is installed, and with a lower bound of the
time: the larger of the time to move every byte once at the speed of a device copy, and the time to read all gathered cache sectors at
the speed of reads that hit the L2 cache.
"""

import argparse
import dataclasses
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from bench import report
from bench.memory_traffic import corners_inside, traffic
from bench.rig import camera_attention
from plugins import launch
from plugins.attention.cases import Case, edge_cases, error_ratio, level_attribute, operator_inputs, random_cases
from plugins.attention.variant import TYPES, Variant
from plugins.kernel import Launch, OutType, Types, ValueType
from qdbev.command import entry_point
from qdbev.ops.msda import joint_softmax
from qdbev.ops.sca import dense_spatial_cross_attention, gathered_spatial_cross_attention
from qdbev.recipes import RECIPES

GOALS = {"pytorch_over_kernel": 3.0, "mmcv_over_kernel": 2.0, "floor_over_kernel": 0.5, "float16_over_int8": 1.5}
"""Smallest acceptable ratio of two times on an H200, at the size of base. `floor` is the lower bound of the time."""
MEASURED: dict[ValueType, OutType] = {"float32": "float32", "float16": "float16", "int8": "float16"}
"""Number type of the output with which each number type of `value` is measured."""
_RANDOM_CASES = 1000
"""Number of random problems on which each kernel is checked."""
_REPEATS, _FEW_REPEATS = 100, 10
"""Number of timed runs of a kernel, and of everything slower."""
_COPY_BYTES = 1 << 30
"""Bytes of the device copy that is timed; more than any L2 cache holds."""
_READ_THREADS, _READ_AT_ONCE = 512, 8
"""Threads per block and loads in flight per thread; the same numbers as in bench/bandwidth.cu."""
_CHECKED_QUERIES = 997
"""Approximate number of queries of the measured problem that are compared with PyTorch on the CPU."""
_log = logging.getLogger(__name__)


class BenchError(ValueError):
    """There is no GPU to measure on, or the kernels compute wrong numbers."""


def check() -> dict[str, Any]:
    """Return facts about the GPU and the errors of the kernels on it, compared with PyTorch on the CPU.

    Raises:
        BenchError: There is no GPU that PyTorch can use.
    """
    if not torch.cuda.is_available():
        raise BenchError(
            "measuring the kernels needs an NVIDIA GPU with its driver (libcuda.so.1) and a CUDA build of torch, and torch finds none on "
            "this machine. Without a GPU, `python -m bench.kernel_build` compiles the kernels and `make test` checks their numbers"
        )
    torch.manual_seed(0)
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "correctness": {" to ".join(types): correctness(types) for types in TYPES},
    }


def correctness(types: Types) -> dict[str, Any]:
    """Return the largest error of a kernel on the GPU, as a share of the permitted error, over random problems and all edge cases."""
    worst, name, count = 0.0, "", 0
    for case in (*random_cases(_RANDOM_CASES), *edge_cases()):
        variant, value, scale = case.in_types(types)
        inputs = [tensor.cuda() for tensor in operator_inputs(variant, value, scale, case.others())]
        out = run(variant, inputs).cpu()
        share = error_ratio(types[0], scale, out, case.truth(value, scale))
        worst, name = max((worst, name), (share, case.name))
        count += out.shape[0]
    _log.info("%s: %d problems, largest error %.2f of the permitted one (%s)", " to ".join(types), count, worst, name)
    return {"problems": count, "worst_share_of_tolerance": worst, "worst_case": name, "passed": worst <= 1}


def run(variant: Variant, inputs: Sequence[Tensor]) -> Tensor:
    """Return the output (B, Q, M * C) of the kernel for the operator's inputs on the GPU."""
    return launch.compute(variant.form, inputs, level_attribute(variant))


def measure(case: Case) -> dict[str, Any]:
    """Measure one problem: times, memory speeds, lower bounds of the time, and the kernels' errors on some of its queries."""
    ceilings = {"copy_bytes_per_s": copy_speed(), "l2_read_bytes_per_s": l2_read_speed()}
    corners = corners_inside(case.reference_points, case.visible, case.sampling_offsets, case.variant.level_hw)
    times, moved, floors, errors = {}, {}, {}, {}
    for number, out in MEASURED.items():
        variant, value, scale = case.in_types((number, out))
        inputs = operator_inputs(variant, value, scale, case.others())
        times[f"kernel_{number}"] = median_ms(run, variant, inputs, repeats=_REPEATS)
        counted = traffic(variant, *case.visible.shape, corners)
        moved[number] = dataclasses.asdict(counted)
        seconds = (counted.bytes_once / ceilings["copy_bytes_per_s"], counted.gathered_bytes / ceilings["l2_read_bytes_per_s"])
        floors[number] = 1000 * max(seconds)
        errors[number] = _largest_error(case, run(variant, inputs), value, scale)
    times |= pytorch_times(case) | mmcv_times(case)
    for name, value in times.items():
        _log.info("%s: %s", name, value if isinstance(value, str) else f"{value:.3f} ms")
    views = float(case.visible.sum(1).mean())
    about = {"visible_cameras_per_query": views, "corners_inside": corners, "traffic": moved}
    return {**about, "ceilings": ceilings, "times_ms": times, "floors_ms": floors, "largest_errors": errors}


def pytorch_times(case: Case) -> dict[str, float]:
    """Measure PyTorch code in which every camera reads every query, and in which each camera reads only the queries it sees."""
    times = {}
    for number in ("float32", "float16"):
        tensors = [tensor.to(getattr(torch, number)) for tensor in (case.value, *case.others())]
        for name, form in (("per_camera", dense_spatial_cross_attention), ("gathered", gathered_spatial_cross_attention)):
            times[f"pytorch_{name}_{number}"] = median_ms(form, *tensors, case.variant.level_hw)
    return times


def mmcv_times(case: Case) -> dict[str, float | str]:
    """Measure mmcv's kernel, called for each camera with all queries; sampling locations and softmax are computed before the timing.

    The value is the reason if mmcv cannot be measured.
    """
    try:
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
    except ImportError as error:
        return {"mmcv_per_camera": f"not measured: mmcv's operators cannot be imported ({error})"}
    level_hw = torch.tensor(case.variant.level_hw, device="cuda")
    starts = torch.cat((level_hw.new_zeros(1), level_hw.prod(1).cumsum(0)[:-1]))
    N, P, D = case.visible.shape[1], case.variant.num_points, case.variant.num_pillar_points
    pillars = case.reference_points[0].repeat(1, 1, P // D, 1)[:, :, None, None]  # (N, Q, 1, 1, P, 2)
    locations = pillars + case.sampling_offsets / level_hw.flip(1)[:, None]  # (N, Q, M, L, P, 2)
    weights = joint_softmax(case.attention_logits).expand(N, -1, -1, -1, -1)
    times: dict[str, float | str] = {}
    for number in ("float32", "float16"):
        value, *rest = (tensor.to(getattr(torch, number)).contiguous() for tensor in (case.value[0], locations, weights))
        try:
            times[f"mmcv_per_camera_{number}"] = median_ms(MultiScaleDeformableAttnFunction.apply, value, level_hw, starts, *rest, N)
        except RuntimeError as error:
            times[f"mmcv_per_camera_{number}"] = f"not measured: {str(error).splitlines()[0]}"
    return times


def copy_speed() -> float:
    """Return the speed of a device copy in bytes per second, where reads and writes both count."""
    source = torch.randint(256, (_COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / median_ms(target.copy_, source) * 1000


@dataclass(frozen=True)
class ReadThroughL2:
    """The kernel of bandwidth.cu, with what a launch needs of plugins.kernel.Kernel."""

    entry: ClassVar[str] = "read_through_l2"
    threads: ClassVar[int] = _READ_THREADS

    def source(self) -> str:
        return Path(__file__).with_name("bandwidth.cu").read_text()


def l2_read_speed() -> float:
    """Return the speed of reads that hit the L2 cache, in bytes per second."""
    properties = torch.cuda.get_device_properties(0)
    step = _READ_THREADS * _READ_AT_ONCE
    # A quarter of the cache, which is also less than the half that is close to a multiprocessor.
    words = max(1, properties.L2_cache_size // 4 // (16 * step)) * step
    buffer, out = torch.randint(2**31, (4 * words,), dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    blocks, rounds = 8 * properties.multi_processor_count, 256
    kernel, shape = ReadThroughL2(), Launch((blocks, 1, 1), {"words": words, "rounds": rounds})
    return blocks * rounds * step * 16 / median_ms(launch.run, kernel, shape, [buffer], out) * 1000


def median_ms(work: Callable[..., object], *arguments: Any, repeats: int = _FEW_REPEATS) -> float:
    """Return the median GPU time of `work(*arguments)` in milliseconds. The L2 cache is filled with other data first, as in a network."""
    other = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()  # this also keeps the GPU busy until `work` has been launched
        start.record()
        work(*arguments)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def _largest_error(case: Case, out: Tensor, value: Tensor, scale: float) -> float:
    """Return the largest error of some queries of `out` compared with PyTorch on the CPU; for int8 in steps of the scale."""
    queries = torch.arange(0, out.shape[1], out.shape[1] // _CHECKED_QUERIES + 1, device="cuda")
    some = dataclasses.replace(
        case,
        reference_points=case.reference_points[:, :, queries].cpu(),
        visible=case.visible[:, :, queries].cpu(),
        sampling_offsets=case.sampling_offsets[:, queries].cpu(),
        attention_logits=case.attention_logits[:, queries].cpu(),
    )
    return float((out[:, queries].cpu().double() - some.truth(value.cpu(), scale)).abs().max()) / scale


def goals(figures: dict[str, Any]) -> dict[str, Any]:
    """Return each goal of GOALS with the ratio that was reached and whether it is met; both are None if it was not measured."""
    times, floors = figures["times_ms"], figures["floors_ms"]
    mmcv = [times[f"mmcv_per_camera_{n}"] / times[f"kernel_{n}"] for n in MEASURED if isinstance(times.get(f"mmcv_per_camera_{n}"), float)]
    reached = {
        "pytorch_over_kernel": min(times[f"pytorch_per_camera_{n}"] / times[f"kernel_{n}"] for n in ("float32", "float16")),
        "mmcv_over_kernel": min(mmcv, default=None),
        "floor_over_kernel": min(floors[n] / times[f"kernel_{n}"] for n in MEASURED),
        "float16_over_int8": times["kernel_float16"] / times["kernel_int8"],
    }
    return {name: {"goal": GOALS[name], "reached": value, "met": value and value >= GOALS[name]} for name, value in reached.items()}


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Check the kernels on this machine's GPU and measure them."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the figures")
    out = parser.parse_args(argv).out
    content = check()
    report.write(out, content)  # before measuring, which may end the process
    figures = measure(camera_attention(RECIPES["base"](), "cuda"))
    report.write(out, {**content, **figures, "goals": goals(figures)})
    wrong = [name for name, found in content["correctness"].items() if not found["passed"]]
    if wrong:
        raise BenchError(f"the kernels compute wrong numbers in {', '.join(wrong)}; {out} has the errors")
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    main()

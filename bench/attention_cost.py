"""What camera cross-attention costs on a CPU: `python -m bench.attention_cost --out runs/demo/attention.json`.

The operator gathered (qdbev/ops/sca.py) and dense (qdbev/ops/sca_dense.py), and the network beside one with the official code's padded
attention (bench/padded_attention.py). Each form runs in a process of its own, so that peak memory is its own; the two of a pair take
turns, so that ratios hold on a busy machine. The rig is the synthetic one, close to that of nuScenes. Peak memory as Linux counts it.
"""

import argparse
import json
import logging
import multiprocessing
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.padded_attention import pad_attention
from qdbev import artifact
from qdbev.command import entry_point
from qdbev.config import Config
from qdbev.data.rig import network_rig
from qdbev.detectors.bevformer.encoder import Encoder
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.geometry import pillar_points, project
from qdbev.ops.sca import spatial_cross_attention
from qdbev.ops.sca_dense import dense_spatial_cross_attention
from qdbev.recipes import RECIPES
from qdbev.schema import CAMERAS, Batch

ATOL = 1e-4
"""Of outputs and gradients, in float32."""
SHARE_OF_MEMORY = 0.75
"""Of the machine's memory, which the process of one form may take; one that takes more is ended and reported as such."""
TURN_LIMIT_S = 1800.0
"""Seconds that one run of one form may take before its process is ended."""
_POLL_S = 0.02
"""Seconds between two looks at a running form's memory."""

_MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_"

_log = logging.getLogger(__name__)
Work = Callable[[], tuple[list[Tensor], dict[str, float]]]
"""One run: its outputs, and seconds of its parts."""


@dataclass(frozen=True)
class Case:
    """What two forms are compared on; `part` is operator, encoder or model."""

    recipe: str
    part: str
    backward: bool
    forms: tuple[str, str]
    turns: int

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.recipe} {self.part} {'forward and backward' if self.backward else 'forward'}"


_OPERATOR, _NETWORK = ("gathered", "dense"), ("ours", "official style")
CASES = (
    Case("tiny", "operator", False, _OPERATOR, 9),
    Case("tiny", "operator", True, _OPERATOR, 9),
    Case("tiny", "encoder", False, _NETWORK, 9),
    Case("tiny", "model", False, _NETWORK, 5),
    Case("base", "operator", False, _OPERATOR, 1),
    Case("base", "operator", True, _OPERATOR, 1),
    Case("base", "encoder", False, _NETWORK, 1),
)


def compare(case: Case, limit: int) -> dict[str, object]:
    """Median seconds, peak MiB above the inputs, and outputs' distance of both forms; ratios are the second form's over the first's.

    Args:
        case: What to run.
        limit: Bytes of memory that the process of each form may take.

    Raises:
        ValueError: The two forms differ by more than ATOL.
    """
    with _freed_memory_returned():
        alone = _answers(case, 1, limit)
    answers = alone if case.turns == 1 else _answers(case, case.turns, limit)
    figures: dict[str, object] = {"recipe": case.recipe, "part": case.part, "backward": case.backward, "turns": case.turns}
    for form in case.forms:
        figures[form] = _summary(alone[form][0], answers[form])
    first, second = (answers[form] for form in case.forms)
    if not any("failed" in figures[form] for form in case.forms):
        figures["largest_difference"] = _largest_difference(case, first[-1]["outputs"], second[-1]["outputs"])
        figures["time_ratio"] = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(first, second, strict=True))
        figures["memory_ratio"] = alone[case.forms[1]][0]["peak_mib"] / alone[case.forms[0]][0]["peak_mib"]
    return figures


@contextmanager
def _freed_memory_returned() -> Iterator[None]:
    """For processes started inside: glibc gives freed blocks back at once, so that a peak counts live tensors and not its reserves."""
    kept = os.environ.get(_MMAP_THRESHOLD)
    os.environ[_MMAP_THRESHOLD] = str(1 << 16)
    try:
        yield
    finally:
        os.environ.pop(_MMAP_THRESHOLD)
        if kept is not None:
            os.environ[_MMAP_THRESHOLD] = kept


def _answers(case: Case, turns: int, limit: int) -> dict[str, list[dict]]:
    """What both forms answer in `turns` turns, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[BaseProcess, Connection]] = {}
    for form in case.forms:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, case, form), daemon=True)
        process.start()
        theirs.close()
        workers[form] = process, ours
    try:
        return _take_turns(workers, turns, limit)
    finally:
        for process, pipe in workers.values():
            pipe.close()
            process.kill()
            process.join()


def _take_turns(workers: dict[str, tuple[BaseProcess, Connection]], turns: int, limit: int) -> dict[str, list[dict]]:
    """What every form answered, turn by turn; the order within a turn alternates."""
    answers: dict[str, list[dict]] = {form: [] for form in workers}
    for turn in range(turns):
        for form in sorted(workers, reverse=bool(turn % 2)):
            if not (answers[form] and "failed" in answers[form][-1]):
                answers[form].append(_answer(*workers[form], limit))
    return answers


def _answer(process: BaseProcess, pipe: Connection, limit: int) -> dict:
    """One run of a form. Its process is ended when it takes more than `limit` bytes of memory or TURN_LIMIT_S seconds.

    Memory is watched from outside: under a limit of its address space OpenBLAS waits for memory in a matrix product without end.
    """
    deadline = time.monotonic() + TURN_LIMIT_S
    failed = {"failed": "the process was ended, most likely for want of memory"}
    try:
        pipe.send("run")
        while not pipe.poll(_POLL_S):
            if _status_kib("VmRSS", process.pid) * 1024 > limit:
                failed = {"failed": f"took more than {limit / 2**30:.2f} GiB of memory"}
                process.kill()
            elif time.monotonic() > deadline:
                failed = {"failed": f"took more than {TURN_LIMIT_S:.0f} s"}
                process.kill()
        return pipe.recv()
    except (EOFError, OSError):
        return failed


def _summary(alone: dict, turns: list[dict]) -> dict[str, object]:
    for answer in (alone, turns[-1]):
        if "failed" in answer:
            return {"failed": answer["failed"]}
    parts = {name: statistics.median(turn["parts"][name] for turn in turns) for name in turns[0]["parts"]}
    return {"seconds": statistics.median(turn["seconds"] for turn in turns), "peak_mib": alone["peak_mib"], **parts}


def _largest_difference(case: Case, first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """Of any two outputs, as a share of the first's largest value where that exceeds one."""
    largest = max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1)) for a, b in zip(first, second, strict=True))
    if not largest <= ATOL:
        raise ValueError(f"{case.title}: {' and '.join(case.forms)} differ by {largest:.1e}; more than {ATOL} is no rounding")
    return largest


def _serve(pipe: Connection, case: Case, form: str) -> None:
    """Build the form, then run it whenever asked, until the other end closes."""
    torch.manual_seed(0)
    config = RECIPES[case.recipe]()
    # Inputs are drawn before the network: a swapped module draws numbers of its own.
    build = {"operator": _operator, "encoder": _encoder, "model": _model}[case.part]
    work = build(config, form, case.backward)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is in memory now
    start_kib = _status_kib("VmRSS")
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        try:
            start = time.perf_counter()
            outputs, parts = work()
            seconds = time.perf_counter() - start
        except (RuntimeError, MemoryError) as error:
            pipe.send({"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"})
            return
        peak_mib = (_status_kib("VmHWM") - start_kib) / 1024
        pipe.send({"seconds": seconds, "peak_mib": peak_mib, "parts": parts, "outputs": [x.detach().numpy() for x in outputs]})


def _status_kib(name: str, pid: int | str | None = "self") -> int:
    """A figure of a process as Linux reports it in /proc; 0 for a process that has ended."""
    found = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


def _operator(config: Config, form: str, backward: bool) -> Work:
    model, lidar2img, image_hw = config.model, *_rig(config)
    pillars = pillar_points(model.bev_hw, model.num_pillar_points, model.pc_range)
    reference_points, hit = project(pillars, lidar2img, image_hw)
    level_hw, Q, M = model.level_hw(image_hw), reference_points.shape[2], model.num_heads
    keys, samples = sum(h * w for h, w in level_hw), (1, Q, M, model.num_levels, model.num_spatial_points)
    learned = [
        torch.randn(1, len(CAMERAS), keys, M, model.embed_dim // M),
        reference_points,
        2 * torch.randn(*samples, 2),
        torch.randn(samples),
    ]
    value, references, offsets, logits = (tensor.requires_grad_(backward) for tensor in learned)
    visible = hit.any(-1).to(value.dtype)
    attention = {"gathered": spatial_cross_attention, "dense": dense_spatial_cross_attention}[form]

    def work() -> tuple[list[Tensor], dict[str, float]]:
        out = attention(value, references, visible, offsets, logits, level_hw)
        return [out, *(torch.autograd.grad(out.sum(), learned) if backward else [])], {}

    return work


def _encoder(config: Config, form: str, _: bool) -> Work:
    lidar2img, image_hw = _rig(config)
    features = [torch.randn(1, len(CAMERAS), config.model.embed_dim, h, w) for h, w in config.model.level_hw(image_hw)]
    motion = _motion(config)
    encoder = _with_form(Encoder(config.model), config, form)
    given = (features, lidar2img, motion[0], image_hw, motion[1], torch.ones(1))

    @torch.no_grad()
    def work() -> tuple[list[Tensor], dict[str, float]]:
        return [encoder(*given)], {}

    return work


def _model(config: Config, form: str, _: bool) -> Work:
    lidar2img, image_hw = _rig(config)
    images = torch.randn(1, len(CAMERAS), 3, *image_hw)
    can_bus, prev_bev = _motion(config)
    batch = Batch(images, lidar2img, can_bus, torch.ones(1), [], [], [])
    model = BEVFormer(config.model).eval()
    _with_form(model.encoder, config, form)
    clocks = {name: _Clock(model.get_submodule(name)) for name in ("backbone", "neck", "encoder", "decoder", "head")}

    @torch.no_grad()
    def work() -> tuple[list[Tensor], dict[str, float]]:
        output, _ = model(batch, prev_bev)
        return [output.bev, output.cls_logits, output.box_code], {f"{name}_s": clock.seconds for name, clock in clocks.items()}

    return work


class _Clock:
    """Seconds of a module's latest forward."""

    def __init__(self, module: nn.Module) -> None:
        self.seconds = self._start = 0.0
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._start = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start


def _with_form(encoder: Encoder, config: Config, form: str) -> Encoder:
    """`encoder`, its offsets and weights dependent on the query as in a trained one; padded attention in the official style."""
    for layer in encoder.layers:
        for projection in (layer.spatial.deformable_attention.sampling_offsets, layer.spatial.deformable_attention.attention_weights):
            nn.init.normal_(projection.weight, std=0.05)
    if form == "official style":
        pad_attention(encoder, config.model)
    return encoder.eval()


def _motion(config: Config) -> tuple[Tensor, Tensor]:
    """can_bus and prev_bev of a second frame."""
    can_bus = torch.zeros(1, 18)
    can_bus[0, 0], can_bus[0, 17] = 2.0, 3.0  # metres ahead, degrees
    return can_bus, torch.randn(1, config.model.bev_hw[0] * config.model.bev_hw[1], config.model.embed_dim)


def _rig(config: Config) -> tuple[Tensor, tuple[int, int]]:
    """lidar2img (1, N, 4, 4) and padded image size."""
    lidar2img, padded_hw = network_rig(config.data)
    return torch.from_numpy(lidar2img).float()[None], padded_hw


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Compare the forms of camera cross-attention in time and peak memory."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention_cost", description=main.__doc__)
    parser.add_argument("--recipes", nargs="+", choices=("tiny", "base"), default=["tiny", "base"])
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    limit = int(SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    rows = []
    for case in CASES:
        if case.recipe not in args.recipes:
            continue
        rows.append(compare(case, limit))
        _log.info(_line(case, rows[-1]))
    about = {"rows": rows, "hardware": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads", "made": artifact.provenance()}
    if args.out:
        with artifact.atomic(args.out) as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n")
    sys.stdout.write(f"{len(rows)} comparisons" + (f" in {args.out}\n" if args.out else "\n"))


def _line(case: Case, row: dict) -> str:
    texts = [f"{form} {row[form].get('failed') or '{seconds:.3f} s, {peak_mib:.0f} MiB'.format(**row[form])}" for form in case.forms]
    ratios = f"; ratio {row['time_ratio']:.2f} in time, {row['memory_ratio']:.2f} in memory" if "time_ratio" in row else ""
    return f"{case.title}: {'; '.join(texts)}{ratios}"


if __name__ == "__main__":
    main()

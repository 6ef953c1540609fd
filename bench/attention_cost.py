"""Measures time and memory of camera cross-attention on a CPU: `python -m bench.attention_cost --out runs/demo/attention.json`.

Compares two forms of the operator, gathered and dense (qdbev/ops/sca.py), and two forms of BEVFormer, ours and one
whose attention is padded as in the official code (bench/padded_attention.py). Each form runs in a process of its own, whose peak of the
resident memory is measured. The two forms take turns, so that their ratio is also right on a busy machine.
"""

import argparse
import ctypes
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench import report
from bench.padded_attention import pad_attention
from bench.rig import camera_attention, rig
from bench.worker import Worker, WorkerError, status_kib
from qdbev import artifact
from qdbev.command import entry_point
from qdbev.config import Config
from qdbev.detectors.bevformer.encoder import Encoder
from qdbev.detectors.bevformer.model import BEVFormer
from qdbev.ops.sca import dense_spatial_cross_attention, spatial_cross_attention
from qdbev.recipes import RECIPES
from qdbev.schema import CAMERAS, Batch

ATOL = 1e-4
"""Largest allowed difference between the outputs and gradients of two forms, in float32."""
SHARE_OF_MEMORY = 0.75
"""Share of the machine's memory that one form may take; a form that takes more is ended and reported as failed."""
TURN_LIMIT_S = 1800.0
"""Seconds that one run of one form may take; a form that takes longer is ended and reported as failed."""
_MMAP_THRESHOLD, _SMALL = -3, 1 << 16
"""Parameter of glibc's mallopt, and its value: blocks of this many bytes or more are given back to the system as soon as they are freed."""

_log = logging.getLogger(__name__)
Work = tuple[Callable[[], list[Tensor]], dict[str, float]]
"""A function that runs a form once and returns its outputs, and the seconds of its parts by name in the latest run."""


@dataclass(frozen=True)
class Case:
    """A comparison of two forms of a part (operator, encoder or model) of a recipe's network."""

    recipe: str
    part: str
    backward: bool
    forms: tuple[str, str]
    turns: int

    @property
    def title(self) -> str:
        """Description of the case for messages."""
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
    """Measure both forms: median seconds, peak MiB above the inputs, and the largest difference between their outputs.

    The ratios are the second form's figure over the first's.

    Args:
        limit: Bytes of memory that the process of each form may take.

    Raises:
        ValueError: The two forms differ by more than ATOL.
    """
    alone = _measure(case, 1, limit, live_only=True)
    measured = alone if case.turns == 1 else _measure(case, case.turns, limit)
    figures: dict[str, object] = {"recipe": case.recipe, "part": case.part, "backward": case.backward, "turns": case.turns}
    for form in case.forms:
        figures[form] = _summary(alone[form][0], measured[form])
    first, second = (measured[form] for form in case.forms)
    if not any("failed" in figures[form] for form in case.forms):
        figures["largest_difference"] = _largest_difference(case, first[-1]["outputs"], second[-1]["outputs"])
        figures["time_ratio"] = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(first, second, strict=True))
        figures["memory_ratio"] = alone[case.forms[1]][0]["peak_mib"] / alone[case.forms[0]][0]["peak_mib"]
    return figures


def _measure(case: Case, turns: int, limit: int, live_only: bool = False) -> dict[str, list[dict]]:
    """The measurements of both forms, turn by turn, each form in a process of its own; the order within a turn alternates.

    A form that fails gets a last entry with the reason as `failed`, and no further turn.
    """
    found: dict[str, list[dict]] = {form: [] for form in case.forms}
    with ExitStack() as stack:
        workers = {form: stack.enter_context(Worker(_prepare, case, form, live_only)) for form in case.forms}
        for turn in range(turns):
            for form in sorted(workers, reverse=bool(turn % 2)):
                try:
                    found[form].append(workers[form].run(limit, TURN_LIMIT_S))
                except WorkerError as error:
                    found[form].append({"failed": str(error)})
                    del workers[form]
    return found


def _summary(alone: dict, turns: list[dict]) -> dict[str, object]:
    for turn in (alone, turns[-1]):
        if "failed" in turn:
            return {"failed": turn["failed"]}
    parts = {name: statistics.median(turn["parts"][name] for turn in turns) for name in turns[0]["parts"]}
    return {"seconds": statistics.median(turn["seconds"] for turn in turns), "peak_mib": alone["peak_mib"], **parts}


def _largest_difference(case: Case, first: list[np.ndarray], second: list[np.ndarray]) -> float:
    """The largest difference between two outputs, relative to the first form's largest value if that exceeds one."""
    largest = max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1)) for a, b in zip(first, second, strict=True))
    if not largest <= ATOL:
        raise ValueError(f"{case.title}: {' and '.join(case.forms)} differ by {largest:.1e}, more than rounding can explain ({ATOL})")
    return largest


def _prepare(case: Case, form: str, live_only: bool) -> Callable[[], dict]:
    """Build the form; the returned function runs it once and returns seconds, peak MiB, seconds of its parts and outputs.

    With `live_only` the peak counts live tensors only, because freed blocks are given back to the system at once.
    """
    if live_only:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _SMALL)
    torch.manual_seed(0)
    build = {"operator": _operator, "encoder": _encoder, "model": _model}[case.part]
    work, parts = build(RECIPES[case.recipe](), form, case.backward)
    Path("/proc/self/clear_refs").write_text("5")  # Linux restarts the peak at the memory that is in use now
    start_kib = status_kib("VmRSS")

    def measure() -> dict:
        start = time.perf_counter()
        outputs = work()
        seconds = time.perf_counter() - start
        peak_mib = (status_kib("VmHWM") - start_kib) / 1024
        return {"seconds": seconds, "peak_mib": peak_mib, "parts": parts, "outputs": [x.detach().numpy() for x in outputs]}

    return measure


def _operator(config: Config, form: str, backward: bool) -> Work:
    inputs = camera_attention(config, "cpu")
    learned = [inputs.value, inputs.reference_points, inputs.sampling_offsets, inputs.attention_logits]
    for tensor in learned:
        tensor.requires_grad_(backward)
    attention = {"gathered": spatial_cross_attention, "dense": dense_spatial_cross_attention}[form]

    def work() -> list[Tensor]:
        out = attention(inputs.value, *inputs.others(), inputs.variant.level_hw)
        return [out, *(torch.autograd.grad(out.sum(), learned) if backward else [])]

    return work, {}


def _encoder(config: Config, form: str, _: bool) -> Work:
    lidar2img, image_hw = rig(config)
    # The inputs are drawn before the network is built, because a swapped module draws random numbers too.
    features = [torch.randn(1, len(CAMERAS), config.model.embed_dim, h, w) for h, w in config.model.level_hw(image_hw)]
    can_bus, prev_bev = _motion(config)
    encoder = _with_form(Encoder(config.model), config, form)

    @torch.no_grad()
    def work() -> list[Tensor]:
        return [encoder(features, lidar2img, can_bus, image_hw, prev_bev, torch.ones(1))]

    return work, {}


def _model(config: Config, form: str, _: bool) -> Work:
    lidar2img, image_hw = rig(config)
    images = torch.randn(1, len(CAMERAS), 3, *image_hw)
    can_bus, prev_bev = _motion(config)
    batch = Batch(images, lidar2img, can_bus, torch.ones(1), [], [], [])
    model = BEVFormer(config.model).eval()
    _with_form(model.encoder, config, form)
    seconds: dict[str, float] = {}
    for name in config.model.groups:
        _time(model.get_submodule(name), f"{name}_s", seconds)

    @torch.no_grad()
    def work() -> list[Tensor]:
        output, _ = model(batch, prev_bev)
        return [output.bev, output.cls_logits, output.box_code]

    return work, seconds


def _time(module: nn.Module, name: str, seconds: dict[str, float]) -> None:
    """Enter the seconds of each forward of `module` into `seconds` under `name`."""
    module.register_forward_pre_hook(lambda *_: seconds.update({name: -time.perf_counter()}))
    module.register_forward_hook(lambda *_: seconds.update({name: seconds[name] + time.perf_counter()}))


def _with_form(encoder: Encoder, config: Config, form: str) -> Encoder:
    """`encoder` with offsets and weights that depend on the query, as after training, and with the attention of `form`."""
    for layer in encoder.layers:
        for projection in (layer.spatial.deformable_attention.sampling_offsets, layer.spatial.deformable_attention.attention_weights):
            nn.init.normal_(projection.weight, std=0.05)
    if form == "official style":
        pad_attention(encoder, config.model)
    return encoder.eval()


def _motion(config: Config) -> tuple[Tensor, Tensor]:
    """`can_bus` (1, 18) and the BEV (1, cells, C) that a second frame gets."""
    can_bus = torch.zeros(1, 18)
    can_bus[0, 0], can_bus[0, 17] = 2.0, 3.0  # metres ahead, degrees
    return can_bus, torch.randn(1, config.model.bev_hw[0] * config.model.bev_hw[1], config.model.embed_dim)


@entry_point
def main(argv: list[str] | None = None) -> None:
    """Compare the forms of camera cross-attention in time and peak memory."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention_cost", description=main.__doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    artifact.require_target(args.out)
    limit = int(SHARE_OF_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    rows = []
    for case in CASES:
        rows.append(compare(case, limit))
        _log.info(_line(case, rows[-1]))
    report.write(args.out, {"rows": rows, "hardware": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"})
    sys.stdout.write(f"{len(rows)} comparisons" + (f" in {args.out}\n" if args.out else "\n"))


def _line(case: Case, row: dict) -> str:
    texts = [f"{form} {row[form].get('failed') or '{seconds:.3f} s, {peak_mib:.0f} MiB'.format(**row[form])}" for form in case.forms]
    ratios = f"; ratio {row['time_ratio']:.2f} in time, {row['memory_ratio']:.2f} in memory" if "time_ratio" in row else ""
    return f"{case.title}: {'; '.join(texts)}{ratios}"


if __name__ == "__main__":
    main()

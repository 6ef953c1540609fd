"""Test the benchmark of the attention kernels without a GPU: its errors, its result file, and what it counts."""

import json
from itertools import product
from unittest.mock import ANY

import pytest
import torch
from torch import Generator

from bench import kernels
from bench.kernel_build import variants
from bench.memory_traffic import corners_inside, traffic
from bench.rig import rig
from plugins.attention.cases import SIZES, draw
from qdbev.geometry import pillar_points, project
from qdbev.ops.contract import SCA
from qdbev.recipes import RECIPES


def test_the_benchmark_needs_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="error: measuring the kernels needs an NVIDIA GPU"):
        kernels.main(["--out", str(tmp_path / "kernels.json")])
    assert not list(tmp_path.iterdir())


def test_wrong_kernels_fail_the_benchmark_after_all_is_written(monkeypatch, tmp_path):
    found = {"float32 to float32": {"passed": True}, "int8 to float16": {"passed": False}}
    monkeypatch.setattr(kernels, "check", lambda: {"correctness": found})
    monkeypatch.setattr(kernels, "camera_attention", lambda config, device: None)
    monkeypatch.setattr(kernels, "measure", lambda case: {"times_ms": {}})
    monkeypatch.setattr(kernels, "goals", lambda figures: {})
    out = tmp_path / "kernels.json"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(kernels, "measure", lambda case: 1 / 0)
        kernels.main(["--out", str(out)])
    assert json.loads(out.read_text()) == {"correctness": found, "made": ANY}, "the result of the check is kept"
    with pytest.raises(SystemExit, match="wrong numbers in int8 to float16; .*kernels.json"):
        kernels.main(["--out", str(out)])
    assert json.loads(out.read_text()) == {"correctness": found, "times_ms": {}, "goals": {}, "made": ANY}


def test_the_rig_of_the_benchmark_sees_most_cells_once():
    model = RECIPES["base"]().model
    points, hit = project(pillar_points(model.bev_hw, model.num_pillar_points, model.pc_range), *rig(RECIPES["base"]()))
    assert points.shape == (1, 6, 40000, 4, 2)
    assert 1.0 < float(hit.any(-1).float().sum(1).mean()) < 1.3


def test_corners_are_counted_as_they_are_read():
    case = draw("", SIZES[2], Generator().manual_seed(0), num_query=9)
    count = 0
    for b, n, q in (case.visible > 0).nonzero().tolist():
        for m, level, p in product(range(2), range(4), range(8)):
            height, width = SIZES[2].level_hw[level]
            at = case.reference_points[b, n, q, p % 4] * torch.tensor([width, height]) + case.sampling_offsets[b, q, m, level, p] - 0.5
            column, row = at.floor().int().tolist()
            count += sum(0 <= c < width and 0 <= r < height for c, r in product((column, column + 1), (row, row + 1)))
    assert corners_inside(case.reference_points, case.visible, case.sampling_offsets, SIZES[2].level_hw) == count > 0


def test_the_traffic_of_base_is_that_of_the_readme():
    corners = 40000 * 8 * 4 * 8 * 4 * 5 // 4  # at 1.25 cameras a query, all inside
    figures = {}
    for variant in variants(RECIPES["base"]()):
        if variant.operator == SCA and kernels.MEASURED[variant.value] == variant.out:
            counted = traffic(variant, 1, 6, 40000, corners)
            megabytes = (round(counted.bytes_once / 1e6), round(counted.gathered_bytes / 1e6))
            figures[variant.value] = (*megabytes, round(counted.operations / 1e9, 1))
    assert figures == {"float32": (362, 6554, 3.3), "float16": (247, 3277, 3.3), "int8": (199, 1638, 3.3)}


def test_goals_report_what_was_reached_and_what_was_not_measured():
    times = {f"kernel_{number}": ms for number, ms in zip(kernels.MEASURED, (2.0, 1.0, 0.5), strict=True)}
    times |= {"pytorch_per_camera_float32": 20.0, "pytorch_per_camera_float16": 2.5, "mmcv_per_camera": "not measured: no mmcv"}
    found = kernels.goals({"times_ms": times, "floors_ms": {"float32": 1.2, "float16": 0.6, "int8": 0.2}})
    assert found["pytorch_over_kernel"] == {"goal": 3.0, "reached": 2.5, "met": False}
    assert found["mmcv_over_kernel"]["reached"] is None and found["mmcv_over_kernel"]["met"] is None
    assert found["floor_over_kernel"] == {"goal": 0.5, "reached": 0.4, "met": False}
    assert found["float16_over_int8"] == {"goal": 1.5, "reached": 2.0, "met": True}
    json.dumps(found)

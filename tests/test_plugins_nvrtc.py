"""Compile the kernels without a GPU: every architecture, no spilled registers, the cache, and clear errors."""

import dataclasses
import json

import pytest

from bench import kernel_build
from bench.kernel_build import ARCHITECTURES, camera_levels, variants
from plugins import nvrtc
from plugins.attention.cases import SIZES
from plugins.attention.variant import TYPES, Variant, row_length
from plugins.kernel import KernelError
from plugins.nvrtc import CompileError, build, cubin
from qdbev.ops.contract import MSDA, SCA
from qdbev.recipes import RECIPES

SMALL = SIZES[1]
BROKEN = 'extern "C" __global__ void broken(int* out) { *out = nonsense; }'


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qdbev" / "kernels"


def test_every_architecture_gets_machine_code_that_spills_nothing():
    codes = set()
    for architecture in ARCHITECTURES:
        code, usage = build(SMALL.source(), architecture)
        assert code[:4] == b"\x7fELF"
        assert 16 <= usage["registers"] <= 255
        assert usage | {"registers": 0} == dict.fromkeys(nvrtc.FIGURES, 0)
        codes.add(code)
    assert len(codes) == len(ARCHITECTURES)


def test_the_kernels_of_base_leave_registers_for_the_blocks_they_want():
    wanted = {"float32": 3, "float16": 3, "int8": 2}  # blocks of 256 threads on a multiprocessor of 65536 registers
    for variant in variants(RECIPES["base"]()):
        _, usage = build(variant.source(), "sm_90")
        assert usage["registers"] * 256 * wanted[variant.value] <= 65536
        assert usage["spill_store_bytes"] == 0


def test_a_spill_is_counted():
    spilling = SIZES[0].source().replace("__launch_bounds__(THREADS, BLOCKS)", "__launch_bounds__(THREADS, 8)")
    _, usage = build(spilling, "sm_90")
    assert usage["spill_store_bytes"] > 0 and usage["stack_bytes"] > 0


def test_shared_memory_is_counted():
    body = "__shared__ int s[256]; s[threadIdx.x] = a[threadIdx.x]; __syncthreads(); a[0] = s[7];"
    source = f'extern "C" __global__ void share(int* a) {{ {body} }}'
    assert build(source, "sm_90")[1]["shared_bytes"] == 1024


def test_a_kernel_is_compiled_once(own_cache, monkeypatch):
    code = cubin(SMALL.source(), "sm_90")
    monkeypatch.setattr(nvrtc, "build", lambda *_: pytest.fail("compiled again"))
    assert cubin(SMALL.source(), "sm_90") == code
    assert [path.read_bytes() for path in own_cache.iterdir()] == [code]


def test_another_source_or_architecture_is_another_kernel(own_cache, monkeypatch):
    monkeypatch.setattr(nvrtc, "build", lambda source, architecture: (f"{architecture} {len(source)}".encode(), None))
    assert cubin("a", "sm_80") == b"sm_80 1"
    assert cubin("ab", "sm_80") == b"sm_80 2"
    assert cubin("a", "sm_90") == b"sm_90 1"


def test_a_kernel_that_cannot_be_kept_is_compiled_all_the_same(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cubin(SMALL.source(), "sm_90")[:4] == b"\x7fELF"
    assert "cannot be stored" in caplog.text


def test_source_that_does_not_compile_is_refused_with_the_compilers_words():
    with pytest.raises(CompileError, match='"nonsense" is undefined'):
        build(BROKEN, "sm_90")


def test_an_architecture_that_nvrtc_does_not_know_is_refused_with_those_it_knows():
    with pytest.raises(CompileError, match="sm_20 .it supports sm_.*sm_90"):
        build(SMALL.source(), "sm_20")


def test_the_report_has_a_row_for_each_attention_number_and_architecture(tmp_path):
    report = tmp_path / "report.json"
    kernel_build.main(["--report", str(report), "--recipes", "micro", "--architectures", "sm_87"])
    found = json.loads(report.read_text())
    wanted = {(v.operator.torch_name, v.value, v.out) for v in variants(RECIPES["micro"]())}
    assert {(row["op"], row["value"], row["out"]) for row in found["rows"]} == wanted and len(wanted) == 8
    assert all(row["architecture"] == "sm_87" and row["registers"] > 0 and row["spill_store_bytes"] == 0 for row in found["rows"])
    assert found["spill_bytes"] == 0


def test_the_recipes_need_what_their_networks_have():
    base = list(variants(RECIPES["base"]()))
    assert [(v.operator, (v.value, v.out)) for v in base] == [(operator, types) for types in TYPES for operator in (SCA, MSDA)]
    assert base[0].level_hw == ((116, 200), (58, 100), (29, 50), (15, 25)) and base[1].level_hw == ((200, 200),)
    assert (base[0].num_heads, base[0].channels, base[0].num_points, base[0].num_pillar_points) == (8, 32, 8, 4)
    levels = {name: camera_levels(RECIPES[name]()) for name in ("micro", "tiny", "small")}
    assert levels == {"micro": ((12, 20), (6, 10)), "tiny": ((15, 25),), "small": ((23, 40),)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": 12}, "12 channels per head in float32: .* powers of two from 4 to 128"),
        ({"channels": 2}, "2 channels"),
        ({"channels": 256}, "256 channels"),
        ({"channels": 1024, "value": "int8"}, "from 4 to 512"),
        ({"num_points": 36}, "36 sampling points: kernels exist for 1 to 32"),
        ({"num_points": 6}, "6 sampling points cannot be divided evenly among 4 pillar points"),
        ({"level_hw": ()}, "there must be at least one level"),
        ({"level_hw": ((3, 0),)}, "each must have at least one cell"),
        ({"level_hw": ((6000, 6000),)}, "kernels exist for less than 2 GiB"),
    ],
)
def test_sizes_that_no_kernel_exists_for_are_refused(change, words):
    with pytest.raises(KernelError, match=words):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize(("sizes", "lanes"), [(SIZES[0], 8), (SIZES[1], 4), (SIZES[5], 1)])
def test_a_grid_holds_every_query_once(sizes: Variant, lanes):
    assert sizes.lanes == lanes
    per_block = 256 // lanes
    for num_query in (1, per_block, per_block + 1, 40000):
        blocks, heads, batch = sizes.grid(num_query, 3)
        assert (blocks - 1) * per_block < num_query <= blocks * per_block
        assert (heads, batch) == (sizes.num_heads, 3)


@pytest.mark.parametrize(("num_query", "length"), [(40000, 200), (625, 25), (900, 30), (1, 1), (899, 0), (300, 0)])
def test_square_grids_are_recognised_by_their_number_of_queries(num_query, length):
    assert row_length(num_query) == length

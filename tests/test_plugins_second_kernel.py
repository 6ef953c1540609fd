"""Show that the plugin room takes a kernel that is no attention: a small kernel for ModulatedDeformableIm2col, which exists only here.

It differs from the attentions in what the generic modules must not assume: its first input is not named `value`, it has no int8 form,
its attribute is one integer, and its output has four axes.
"""

import ctypes
import functools
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lean_tensorrt import Instance, lean_tensorrt
from torch import Generator, Tensor

from plugins import launch, nvrtc, tensorrt_ops, torch_ops
from plugins.kernel import Attributes, KernelError, KernelFamily, Launch, OutType, Shapes, Types
from plugins.launch import LaunchError
from plugins.operators import KERNELS
from qdbev.ops.contract import IM2COL
from qdbev.ops.deform_conv import modulated_deformable_im2col

SOURCE = r"""
extern "C" __global__ void modulated_deformable_im2col(const float* x, const float* offsets, const float* mask, int channels, int height,
                                                       int width, int out_height, int out_width, float* out) {
    const int columns = out_height * out_width, index = blockIdx.x * THREADS + threadIdx.x, sample = blockIdx.z;
    if (index >= channels * 9 * columns) return;
    const int position = index % columns, tap = index / columns % 9, channel = index / columns / 9;
    const float* shift = offsets + (sample * 18 + 2 * tap) * columns + position;
    const float y = position / out_width * STRIDE + tap / 3 - 1 + shift[0];
    const float x_at = position % out_width * STRIDE + tap % 3 - 1 + shift[columns];
    const float* image = x + (sample * channels + channel) * height * width;
    float sum = 0;
    for (int corner = 0; corner < 4; ++corner) {
        const int row = int(floorf(y)) + corner / 2, column = int(floorf(x_at)) + corner % 2;
        const float share = (1 - fabsf(y - row)) * (1 - fabsf(x_at - column));
        if (row >= 0 && row < height && column >= 0 && column < width) sum += share * image[row * width + column];
    }
    out[sample * channels * 9 * columns + index] = sum * mask[(sample * 9 + tap) * columns + position];
}
"""

HOST = r"""
#include <math.h>
struct Index { int x, y, z; };
static Index blockIdx, threadIdx;
#define __global__
%s
extern "C" void run(void* const* tensors, const int* n, int x, int y, int z) {
    for (blockIdx = {}; blockIdx.z < z; ++blockIdx.z)
        for (blockIdx.x = 0; blockIdx.x < x; ++blockIdx.x)
            for (threadIdx = {}; threadIdx.x < THREADS; ++threadIdx.x)
                modulated_deformable_im2col((const float*)tensors[0], (const float*)tensors[1], (const float*)tensors[2],
                                            n[0], n[1], n[2], n[3], n[4], (float*)tensors[3]);
}
"""


@dataclass(frozen=True)
class Im2colKernel:
    """The kernel for one stride; implements plugins.kernel.Kernel."""

    threads: ClassVar[int] = 128
    out: ClassVar[OutType] = "float32"
    entry: ClassVar[str] = "modulated_deformable_im2col"

    stride: int

    def source(self) -> str:
        return f"#define THREADS {self.threads}\n#define STRIDE {self.stride}\n{SOURCE}"

    def launch(self, shapes: Shapes) -> Launch:
        B, C, H, W = shapes["x"]
        h, w = shapes["mask"][2:]
        if tuple(shapes["offsets"]) != (B, 18, h, w):
            raise KernelError(f"offsets is {tuple(shapes['offsets'])}, must be {(B, 18, h, w)}")
        grid = (-(-C * 9 * h * w // self.threads), 1, B)
        return Launch(grid, {"channels": C, "height": H, "width": W, "out_height": h, "out_width": w})


def of_shapes(types: Types, shapes: Shapes, attributes: Attributes) -> Im2colKernel:
    (stride,) = attributes["stride"]
    return Im2colKernel(int(stride))


FAMILY = KernelFamily(types=(("float32", "float32"),), make=of_shapes)


@pytest.fixture
def listed(monkeypatch) -> None:
    """Add the kernel to the list of kernels."""
    monkeypatch.setitem(KERNELS, IM2COL, FAMILY)


@pytest.fixture
def on_host(listed, monkeypatch, tmp_path) -> None:
    """Let launches run the kernel, compiled as host C++."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernel for the host")
    monkeypatch.setattr(launch, "run", functools.partial(run_on_host, tmp_path))
    monkeypatch.setattr(launch, "require_one_gpu", lambda tensors: None)


def run_on_host(folder: Path, kernel: Im2colKernel, launched: Launch, inputs: Sequence[Tensor], out: Tensor) -> None:
    """Compile and run the kernel on the host; has the parameters of plugins.launch.run after `folder`."""
    text, library = folder / "im2col.cpp", folder / "im2col.so"
    text.write_text(HOST % kernel.source())
    subprocess.run(["g++", "-std=c++17", "-shared", "-fPIC", str(text), "-o", str(library)], check=True, timeout=60)
    pointers, numbers = [tensor.data_ptr() for tensor in (*inputs, out)], launched.numbers.values()
    ctypes.CDLL(str(library)).run((ctypes.c_void_p * len(pointers))(*pointers), (ctypes.c_int * len(numbers))(*numbers), *launched.grid)


def inputs(stride: int) -> list[Tensor]:
    generator = Generator().manual_seed(0)
    h, w = 8 // stride, 10 // stride
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [draw(2, 5, 8, 10), 2 * draw(2, 18, h, w), draw(2, 9, h, w).sigmoid()]


@pytest.mark.parametrize("stride", [1, 2])
def test_the_function_that_pytorch_calls_on_a_gpu_equals_the_pytorch_operator(on_host, stride):
    out = torch_ops.evaluation(IM2COL)(*inputs(stride), stride)
    torch.testing.assert_close(out, modulated_deformable_im2col(*inputs(stride), stride), atol=1e-5, rtol=0)


def test_a_number_type_without_a_kernel_is_refused_by_the_name_of_the_input(on_host):
    x, *rest = inputs(1)
    with pytest.raises(LaunchError, match="^x is torch.float16; the kernels of ModulatedDeformableIm2col compute float32 to float32$"):
        launch.compute(IM2COL, [x.half(), *rest], {"stride": (1,)})


def test_the_error_about_the_device_names_the_first_input(listed):
    with pytest.raises(LaunchError, match="^x is on cpu"):
        launch.compute(IM2COL, inputs(1), {"stride": (1,)})


def test_tensorrt_gets_the_kernel_with_the_interface_of_the_contract():
    x, offsets, mask = (tuple(tensor.shape) for tensor in inputs(2))
    failures: list[str] = []
    with lean_tensorrt() as trt:
        tensorrt_ops.register_operator(trt, "sm_90", IM2COL, FAMILY, failures)
        try:
            definition = trt.plugin._lib.QDP_REGISTRY["qdbev::ModulatedDeformableIm2col"]
            assert definition.input_tensor_names == ["x", "offsets", "mask"] and list(definition.input_attrs) == ["stride"]
            (offered,) = definition.autotune_func(x, offsets, mask, None)
            assert [combination.types for combination in offered._get_combinations()] == [[trt.DataType.FLOAT] * 4]
            shapes = {"x": x, "offsets": offsets, "mask": mask}
            plugin = Instance(trt, IM2COL, shapes, {}, {"stride": [2]})
            assert plugin.output_shape() == [2, 45, 4, 5]
            parameters, numbers, name, code = plugin.launch()
            assert name == "modulated_deformable_im2col" and numbers.nbSymExprs == 5
            assert code == nvrtc.cubin(Im2colKernel(2).source(), "sm_90")
            with pytest.raises(KernelError, match=r"offsets is \(2, 17, 4, 5\)"):
                Instance(trt, IM2COL, {**shapes, "offsets": (2, 17, 4, 5)}, {}, {"stride": [2]}).launch()
        finally:
            unregister(trt)
    assert failures == ["ModulatedDeformableIm2col: offsets is (2, 17, 4, 5), must be (2, 18, 4, 5)"]


def unregister(trt) -> None:
    """Remove the plugin from NVIDIA's registries, which belong to the process and not to this test."""
    registry = trt.get_plugin_registry()
    registry.deregister_creator(registry.get_creator("ModulatedDeformableIm2col", "1", "qdbev"))
    del trt.plugin._lib.QDP_REGISTRY["qdbev::ModulatedDeformableIm2col"]

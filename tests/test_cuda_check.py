"""Test the check of the status that cuda-python calls return, with the status types of cuda-python."""

import subprocess
import sys

import pytest
from cuda.bindings import driver, nvrtc, runtime

from qdbev.cuda_check import CudaError, check


def test_the_values_of_a_call_that_succeeded_are_returned():
    assert check((driver.CUresult.CUDA_SUCCESS, 7)) == 7
    assert check((runtime.cudaError_t.cudaSuccess, 1, 2)) == (1, 2)
    assert check((nvrtc.nvrtcResult.NVRTC_SUCCESS,)) == ()


@pytest.mark.parametrize(
    "status",
    [driver.CUresult.CUDA_ERROR_NOT_FOUND, runtime.cudaError_t.cudaErrorLaunchFailure, nvrtc.nvrtcResult.NVRTC_ERROR_COMPILATION],
)
def test_a_call_that_failed_raises_with_the_name_of_the_status(status):
    with pytest.raises(CudaError, match=status.name):
        check((status, None))


def test_the_caller_may_choose_the_class_of_the_error():
    class OtherError(ValueError):
        pass

    with pytest.raises(OtherError):
        check((driver.CUresult.CUDA_ERROR_NOT_FOUND,), OtherError)


def test_importing_it_imports_neither_torch_nor_cuda():
    code = "import sys, qdbev.cuda_check; assert not {'torch', 'cuda', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set: set it before pytest starts")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, torch.float16] if torch.cuda.is_available() else [torch.float32])
def ops(request, device):
    """In the interpreter float32 alone, whose limits are narrow; float16 is there in test_gpu_check, whose parts run
    every operation in it, and bfloat16 in a test of each file."""
    from kernels.gpu.backend import TritonOps

    return TritonOps(device, request.param)


@pytest.fixture
def exact(device):
    from kernels.reference import ReferenceOps

    return ReferenceOps(device, torch.float64)


@pytest.fixture
def make(device):
    from kernels.gpu.check_data import Maker

    return Maker(device)


@pytest.fixture
def close():
    """Bounds come from `check_correctness.error_limit`: a unit per rounding to the dtype, and the float32 sum."""
    from kernels.gpu.check_correctness import error_limit, relative_error

    def check(ops, got, want, roundings, terms):
        error, limit = relative_error(got, want), error_limit(ops.dtype, ops.device, roundings, terms)
        assert error <= limit, f"relative error {error:.2e}, limit {limit:.2e}"

    return check

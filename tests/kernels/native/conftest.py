"""The compiled operations, which `make test` builds; without a compiler the tests that need them skip."""

from __future__ import annotations

import pytest
import torch

from kernels.native.backend import NativeOps
from kernels.native.library import Pool, machine_choice


@pytest.fixture(scope="session")
def pool() -> Pool:
    choice = machine_choice()
    if choice.library is None:
        pytest.skip(f"the native extension is not there: {choice.reason}")
    return Pool(choice.library, 2)


@pytest.fixture
def ops(pool: Pool) -> NativeOps:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    made = NativeOps(torch.device("cpu"))
    torch.set_num_threads(threads)
    return made

"""Which extension serves, and what happens where none can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.cpu import CpuOps
from kernels.native import library, selftest
from kernels.native.backend import NativeOps
from kernels.native.library import machine_choice
from kernels.native.matrix import PackedMatrix
from kernels.ops import make_ops

CPU = torch.device("cpu")


@pytest.fixture
def fresh() -> object:
    machine_choice.cache_clear()
    yield None
    machine_choice.cache_clear()


def test_auto_on_a_cpu_is_the_extension_where_it_was_built() -> None:
    ops = make_ops(CPU, torch.float32)
    expected = CpuOps if machine_choice().library is None else NativeOps
    assert type(ops) is expected, machine_choice().reason


def test_a_machine_without_extension_gets_the_portable_back_end(fresh: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.sysconfig, "get_config_var", lambda name: ".nowhere.so")
    assert isinstance(make_ops(CPU, torch.float32), CpuOps)
    with pytest.raises(RuntimeError, match=r"not built.*use backend 'cpu'"):
        make_ops(CPU, torch.float32, "native")


def test_an_extension_that_computes_wrongly_is_refused(fresh: object, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PackedMatrix.multiply

    def wrong(self: PackedMatrix, x: torch.Tensor, norm: None = None) -> torch.Tensor:
        return right(self, x, norm) * 1.001

    monkeypatch.setattr(selftest.PackedMatrix, "multiply", wrong)
    choice = machine_choice()
    assert choice.library is None and "WRONG" in choice.reason and "misses its bound" in choice.reason


def test_a_cpu_without_the_instructions_never_runs_them(fresh: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert machine_choice().library is None and "no AVX2" in machine_choice().reason


def test_the_widest_extension_is_passed_over_where_the_cpu_lacks_vnni(
    fresh: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    if machine_choice().library is None:
        pytest.skip(machine_choice().reason)
    machine_choice.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    flags = Path("/proc/cpuinfo").read_text("utf-8")
    expected = "_avx512" if "avx512_vnni" in flags else "_avx2"
    library_ = machine_choice().library
    assert library_ is not None and library_.name == expected, machine_choice().reason


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float32), ("cpu", torch.float16)])
def test_other_devices_and_dtypes_are_refused(device: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"backend 'native' on device|only float32"):
        NativeOps(torch.device(device), dtype)


def test_choice_says_why() -> None:
    assert machine_choice().reason
    assert Path(library.__file__).with_name("linear.c").is_file()

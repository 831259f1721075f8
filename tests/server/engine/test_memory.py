"""Sizing of the KV cache from what is free, and the messages when it cannot be done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import random_model

from server.config import ServerConfig
from server.engine.build import build_engine, make_ledger, pick_kv_dtype
from server.engine.memory import DeviceMemory, MemoryBudgetError, plan_kv, read_memory
from server.model.load import WeightBytes
from spq.errors import OptionError
from spq.sizes import format_bytes, parse_bytes

MIB = 1024**2
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def plan(free: int = 8000 * MIB, process: int = 1000 * MIB, device: torch.device = CUDA, **options: object):  # type: ignore[no-untyped-def]
    values: dict[str, object] = {
        "token_bytes": 64 * 1024,
        "block_size": 16,
        "wanted_len": 4096,
        "explicit_len": False,
        "max_num_seqs": 64,
        "memory_budget": None,
        "kv_memory": None,
        **options,
    }
    return plan_kv(DeviceMemory(16000 * MIB, free, process), device=device, **values)  # type: ignore[arg-type]


def test_the_cache_takes_what_is_left_but_no_more_than_can_be_used() -> None:
    size = 16 * 64 * 1024
    found = plan()
    margin = 32 * MIB + round(0.02 * 9000 * MIB)
    assert found.num_blocks == (8000 * MIB - margin) // size
    assert found.max_model_len == 4096
    assert plan(max_num_seqs=4).num_blocks == 4 * 4096 // 16


def test_a_budget_is_for_the_whole_process() -> None:
    found = plan(memory_budget=2000 * MIB)
    assert found.limit == 2000 * MIB
    assert found.num_blocks * 16 * 64 * 1024 + 1000 * MIB <= 2000 * MIB


def test_kv_memory_and_the_cpu_default_bound_the_cache() -> None:
    assert plan(kv_memory=100 * MIB).num_blocks == 100
    assert plan(device=CPU).num_blocks == 1024  # 1 GiB
    assert plan(device=CPU, free=2000 * MIB).num_blocks == 500  # a quarter of what is free
    assert plan(device=CPU, wanted_len=24 * 1024).max_model_len == 24 * 1024  # 1.5 GiB: one sequence as long as asked


def test_a_context_that_does_not_fit_is_shortened_unless_it_was_asked_for() -> None:
    assert plan(kv_memory=64 * MIB).max_model_len == 1024
    with pytest.raises(MemoryBudgetError, match=r"4096 tokens of KV cache need 256 MiB.*--max-model-len"):
        plan(kv_memory=64 * MIB, explicit_len=True)


def test_an_impossible_budget_says_how_much_is_needed() -> None:
    with pytest.raises(MemoryBudgetError, match=r"It needs (.*) in all") as caught:
        plan(memory_budget=900 * MIB)
    needed = str(caught.value).split("needs ")[-1].split(" in all")[0]
    assert parse_bytes(needed) >= 1000 * MIB
    plan(memory_budget=parse_bytes(needed) + 20 * MIB)  # 3 printed digits, and the margin grows with the budget


def test_int8_prompts_are_refused_where_no_kernel_has_them(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    config = ServerConfig(model=str(tmp_path), device="cpu", int8_prefill=True)
    with pytest.raises(OptionError, match=r"--device cpu.*need the triton backend"):
        build_engine(tmp_path, config, progress=lambda phase, done: None)


def test_an_impossible_budget_is_refused_by_the_real_thing(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    config = ServerConfig(model=str(tmp_path), device="cpu", memory_budget=64 * MIB)
    with pytest.raises(MemoryBudgetError, match=r"--memory-budget 64 MiB.*needs more"):
        build_engine(tmp_path, config, progress=lambda phase, done: None)


def test_a_context_beyond_the_model_is_refused(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    config = ServerConfig(model=str(tmp_path), device="cpu", max_model_len=100_000)
    with pytest.raises(OptionError, match="--max-model-len 100000 exceeds the model's 256"):
        build_engine(tmp_path, config, progress=lambda phase, done: None)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "bfloat16"])
def test_the_ledger_adds_up_to_the_limit(tmp_path: Path, kv_dtype: str) -> None:
    random_model("llama").save_pretrained(tmp_path)
    config = ServerConfig(model=str(tmp_path), device="cpu", kv_dtype=kv_dtype, memory_budget=4000 * MIB)
    info = build_engine(tmp_path, config, progress=lambda phase, done: None).info
    assert sum(info.ledger.values()) == min(4000 * MIB, sum(info.ledger.values()))
    assert abs(sum(info.ledger.values()) - 4000 * MIB) < 64 * MIB  # free memory moves while the engine is built
    per_head = {"auto": 4 * 12, "int8": 12 + 4, "bfloat16": 2 * 12}[kv_dtype]
    assert info.ledger["kv"] == info.kv_tokens * 2 * 3 * 2 * per_head


def test_a_ledger_with_graphs_adds_up() -> None:
    used, found = WeightBytes(3000 * MIB, 500 * MIB), plan(process=4200 * MIB)
    kv = found.num_blocks * 16 * 64 * 1024
    ledger = make_ledger(used, found, kv=kv, workspace=300 * MIB, graphs=90 * MIB, process=4200 * MIB)
    assert sum(ledger.values()) == found.limit == 12200 * MIB
    assert ledger["graphs"] == 90 * MIB
    assert ledger["other"] == 310 * MIB
    assert 0 <= ledger["free"] < 0.03 * found.limit + 32 * MIB  # the margin, and less than one page


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_are_in_the_ledger_of_a_gpu(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    for on in (True, False):
        told: list[float] = []
        config = ServerConfig(model=str(tmp_path), device="cuda", cuda_graphs=on, kv_memory=64 * MIB)
        info = build_engine(tmp_path, config, progress=lambda phase, done, told=told: told.append(done)).info
        assert (info.ledger["graphs"] > 0) == on
        assert min(info.ledger.values()) >= 0
        assert len(set(told)) > (30 if on else 3)  # of loading, of each step and of each graph, twice


def test_the_kv_cache_is_int8_where_kernels_read_it_as_it_is() -> None:
    class FakeOps:
        dtype = torch.bfloat16

        def __init__(self, name: str) -> None:
            self.name = name

    def pick(backend: str, head_dim: int, kv_dtype: str = "auto") -> torch.dtype:
        config = ServerConfig(model="m", kv_dtype=kv_dtype)  # type: ignore[arg-type]
        return pick_kv_dtype(config, head_dim, FakeOps(backend))  # type: ignore[arg-type]

    assert pick("triton", 128) == torch.int8
    assert pick("native", 16) == torch.int8
    assert pick("triton", 8) == torch.bfloat16
    assert pick("cpu", 128) == torch.bfloat16
    assert pick("triton", 128, "float16") == torch.float16
    assert pick("cpu", 128, "int8") == torch.int8


def test_this_process_is_measured() -> None:
    before = read_memory(CPU)
    ballast = torch.ones(64 * MIB, dtype=torch.uint8)
    grown = read_memory(CPU).process - before.process
    del ballast
    assert 56 * MIB < grown < 96 * MIB
    assert 0 < before.free <= before.total


@pytest.mark.parametrize(
    ("text", "count"),
    [("6GiB", 6 * 1024**3), ("1.5 GiB", 3 * 1024**3 // 2), ("900m", 900 * MIB), ("6GB", 6 * 10**9), ("1024", 1024)],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "6XiB", "six", "1e99999GiB", "-"])
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_bytes(text)


def test_sizes_are_written() -> None:
    assert [format_bytes(n) for n in (12, 2048, 512 * MIB, 7237000000)] == ["12 B", "2 KiB", "512 MiB", "6.74 GiB"]

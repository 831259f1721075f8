"""How much memory the process uses and may use on its device, and how much of it the KV cache gets.

The cache is sized last, from what is measured free once weights are loaded and the largest step has run; there is no
fraction to guess. Bytes everywhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from spq.sizes import format_bytes

MIB = 1024**2
MARGIN_BYTES = 32 * MIB  # kept free for what grows after start: allocator slack,
CPU_MARGIN_BYTES = 64 * MIB  # and on the CPU, where they are the same memory, connections, texts and log-probabilities
MARGIN_SHARE = 0.02  # of the limit, on top
CPU_KV_SHARE = 0.25  # of free memory at most, where nobody set a budget: other programs live there too,
CPU_KV_BYTES = 1024 * MIB  # and so much is enough, unless a single sequence may need more
MIN_CONTEXT = 256  # tokens that must fit, where the operator asked for no length


class MemoryBudgetError(Exception):
    """The model cannot run in the memory allowed; the message says how much it needs."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A reading. `process` is what this process holds on the device."""

    total: int
    free: int
    process: int


@dataclass(frozen=True, slots=True)
class KvPlan:
    """How the cache is laid out."""

    num_blocks: int
    max_model_len: int  # tokens
    limit: int  # bytes the process may hold


def read_memory(device: torch.device) -> DeviceMemory:
    """CUDA: the driver's free bytes, everything not free counted as ours (other processes on the card included,
    so the budget errs on the safe side). CPU: resident set, and what the kernel or the cgroup says is available."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total, free, total - free)
    fields = {
        line.split(":")[0]: int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines()
    }
    total, free = fields["MemTotal"], fields["MemAvailable"]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    limit = _cgroup_limit()
    if limit is not None and limit < total:
        total, free = limit, min(free, max(0, limit - resident))
    return DeviceMemory(total, free, resident)


def room_for_layers(memory: DeviceMemory, *, reserve: int, memory_budget: int | None) -> int:
    """Bytes that decoded layers may take beyond what `memory` says the process holds; `reserve` is for the cache and
    the steps. Below 0 where even that has no room."""
    limit = min(memory.process + memory.free, memory_budget or memory.total)
    return limit - memory.process - _margin(limit, MARGIN_BYTES) - reserve


def plan_kv(
    memory: DeviceMemory,
    *,
    device: torch.device,
    token_bytes: int,
    block_size: int,
    wanted_len: int,
    explicit_len: bool,
    max_num_seqs: int,
    memory_budget: int | None,
    kv_memory: int | None,
) -> KvPlan:
    """Size the cache. `memory` was read with weights loaded and after the largest step.

    Raises MemoryBudgetError when not even one sequence of the length asked for (or of 256 tokens) would fit.
    """
    limit = min(memory.process + memory.free, memory_budget or memory.total)
    margin = _margin(limit, CPU_MARGIN_BYTES if device.type == "cpu" else MARGIN_BYTES)
    room = limit - memory.process - margin
    if kv_memory is not None:
        room = min(room, kv_memory)
    elif memory_budget is None and device.type == "cpu":
        room = min(room, round(CPU_KV_SHARE * memory.free), max(CPU_KV_BYTES, token_bytes * (wanted_len + block_size)))
    block_bytes = token_bytes * block_size
    must_len = wanted_len if explicit_len else min(MIN_CONTEXT, wanted_len)
    must_blocks = -(-must_len // block_size)
    if room < must_blocks * block_bytes:
        needed = memory.process + margin + must_blocks * block_bytes
        raise MemoryBudgetError(
            f"{must_len} tokens of KV cache need {format_bytes(must_blocks * block_bytes)}, but "
            f"{format_bytes(max(0, room))} are left of {format_bytes(limit)}: the process holds "
            f"{format_bytes(memory.process)} and keeps {format_bytes(margin)} spare. It needs "
            f"{format_bytes(needed)} in all: raise --memory-budget (or --kv-memory) to that, shorten "
            f"--max-model-len, or use --kv-dtype int8"
        )
    blocks = min(room // block_bytes, max_num_seqs * -(-wanted_len // block_size))
    return KvPlan(blocks, min(wanted_len, blocks * block_size), limit)


def _margin(limit: int, least: int) -> int:
    return least + round(MARGIN_SHARE * limit)


def _cgroup_limit() -> int | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        return None if text == "max" else int(text)
    return None

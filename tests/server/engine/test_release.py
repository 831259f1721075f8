"""Memory given back: freed blocks and untouched pages of libraries leave the process, and it works on."""

from __future__ import annotations

from pathlib import Path

import torch

from server.engine.release import release_libraries, unchanged_mappings
from spq.allocator import release_freed

MIB = 2**20
SMAPS = """\
7f0000000000-7f0000001000 r--p 00000000 08:01 11 /usr/lib/libx.so.1
Rss:                   4 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
7f0000001000-7f0000005000 r-xp 00001000 08:01 11 /usr/lib/libx.so.1
Anonymous:             0 kB
7f0000005000-7f0000006000 r--p 00005000 08:01 11 /usr/lib/libx.so.1
Anonymous:             4 kB
7f0000006000-7f0000007000 rw-p 00006000 08:01 11 /usr/lib/libx.so.1
Anonymous:             0 kB
7f0000007000-7f0000008000 r--p 00000000 08:01 12 /data/model.safetensors
Anonymous:             0 kB
7f0000008000-7f0000009000 r-xp 00000000 00:00 0
Anonymous:             0 kB
7f0000009000-7f000000a000 r-xp 00000000 08:01 13 /opt/with space/_core.cpython-311.so
Anonymous:             0 kB
7f000000a000-7f000000b000 r-xp 00000000 08:01 13 /usr/bin/python3.11
Anonymous:             0 kB
"""


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def test_only_unchanged_read_only_mappings_of_libraries_are_given_up() -> None:
    found = unchanged_mappings(SMAPS)
    assert found == [(0x7F0000000000, 0x1000), (0x7F0000001000, 0x4000), (0x7F0000009000, 0x1000)]


def test_library_pages_leave_and_come_back() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    expected = (x @ x).softmax(-1)
    before = resident("RssFile")
    release_libraries()
    assert resident("RssFile") < before / 2
    assert torch.equal((x @ x).softmax(-1), expected)
    release_libraries()  # and again, with other pages resident


def test_freed_blocks_leave() -> None:
    blocks = [torch.ones(16 * 1024) for _ in range(2000)]  # 64 KiB each: below the size that is mapped by itself
    kept = blocks[::50]
    held = resident("RssAnon")
    del blocks
    release_freed()
    assert resident("RssAnon") < held - 100 * MIB
    assert all(float(block.sum()) == 16 * 1024 for block in kept)

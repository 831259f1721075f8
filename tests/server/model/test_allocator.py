from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch

from server.model.allocator import mapped_blocks

MIB = 1 << 20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_blocks_between_others_go_back_to_the_system() -> None:
    with mapped_blocks():
        blocks = [torch.ones(MIB, dtype=torch.uint8) for _ in range(60)]
        full = resident()
        kept = blocks[::2]  # every other one is freed: a heap could give none of them back
        del blocks
        assert full - resident() > 25 * MIB
        assert all(int(block[-1]) == 1 for block in kept)

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# a process of its own: elsewhere the heap has holes left by others, and malloc takes these before it maps
PROGRAM = """
import os, torch
from pathlib import Path
from spq.allocator import mapped_blocks

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

with mapped_blocks():
    blocks = [torch.ones(1 << 20, dtype=torch.uint8) for _ in range(60)]
    full = resident()
    kept = blocks[::2]  # every other one is freed: a heap could give none of them back
    del blocks
    assert all(int(block[-1]) == 1 for block in kept)
    print(full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_blocks_between_others_go_back_to_the_system() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 25 << 20


# glibc's malloc_trim leaves the end of a thread's arena alone
IN_A_THREAD = """
import os, threading
from pathlib import Path
from spq.allocator import mapped_blocks, release_freed, trimmed_arenas
import torch

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

with mapped_blocks():
    pass  # as after a load: what is smaller than 32 MiB comes from an arena, and 64 MiB may stay at its end
blocks = []
thread = threading.Thread(target=lambda: blocks.extend(torch.ones(1 << 20, dtype=torch.uint8) for _ in range(40)))
thread.start()
thread.join()
full = resident()
with trimmed_arenas():
    blocks.clear()
release_freed()
print(full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_the_end_of_a_threads_arena_goes_back_to_the_system() -> None:
    ran = subprocess.run([sys.executable, "-c", IN_A_THREAD], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ran.stdout) > 30 << 20

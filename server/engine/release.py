"""Gives memory back to the system: pages of libraries that starting took, and all of an engine that was dropped.

Not the accounts (`server.engine.memory`), and not freed blocks (`spq.allocator`). What is touched again
comes back, from the kernel's cache of files in microseconds. For the CPU, where this memory is the model's too; on a
GPU's host it makes no odds.
"""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import torch

from server.engine.engine import Engine
from server.engine.memory import read_memory
from spq.allocator import release_freed, trimmed_arenas

MADV_DONTNEED = 4  # madvise(2): the pages are given up; a file's are read again where they are touched


def release_libraries() -> None:
    """Give up the pages of shared objects that are as in their files; those that serving needs come back.

    Importing torch runs through most of its libraries once: 95 MiB of all are resident then, and 22 MiB when the server
    has been at work. Takes 10 to 20 ms. Mappings with a page of our own in them are left alone: relocations are such.
    """
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, length in unchanged_mappings(Path("/proc/self/smaps").read_text("utf-8", "replace")):
        madvise(start, length, MADV_DONTNEED)


def held_bytes(device: str) -> int:
    """What the process holds on the device of `ModelInfo`: as `memory.read_memory` counts it."""
    return read_memory(torch.device(device.partition(":")[0])).process


def release_engine(engine: Engine) -> int:
    """Return what an engine, whose loop has ended, has on its device and of the system's memory. Returns what the
    process still holds on the device.

    On a GPU the CUDA context stays, some hundreds of MiB; it goes with the process alone.
    """
    with trimmed_arenas():
        engine.release()
        gc.collect()
    if engine.info.device.startswith("cuda"):
        torch.cuda.empty_cache()
    release_freed()
    release_libraries()
    return held_bytes(engine.info.device)


def unchanged_mappings(smaps: str) -> list[tuple[int, int]]:
    """(address, bytes) of the mappings of shared objects that cannot be written and hold no page of the process's own;
    `smaps` as in proc(5). Libraries are never unmapped, so the addresses stay theirs."""
    found: list[tuple[int, int]] = []
    candidate: tuple[int, int] | None = None
    for line in smaps.splitlines():
        words = line.split()
        if not words[0].endswith(":"):  # the head of a mapping: addresses, permissions, offset, device, inode, path
            start, end = (int(address, 16) for address in words[0].split("-"))
            library = len(words) > 5 and ".so" in Path(words[-1]).name and words[1] in ("r-xp", "r--p")
            candidate = (start, end - start) if library else None
        elif words[0] == "Anonymous:" and candidate is not None and int(words[1]) == 0:
            found.append(candidate)
    return found

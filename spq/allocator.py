"""Memory that goes back to the system when it is freed: large blocks while a model is loaded, the rest when asked for.

glibc takes blocks of up to 32 MiB from its heap once one of that size was freed, and matrices that were read, laid out,
then dropped leave holes there: an int8 model of 299 MiB took 552 MiB to load, and 332 MiB where they are mapped alone.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_... of malloc.h
LOADING_BYTES = 256 << 10  # of blocks that are mapped while a model is loaded
# Afterwards both are where glibc's own adaptation ends, so that steps reuse their memory: setting one ends adaptation.
RUNNING_BYTES = 32 << 20


@contextmanager
def mapped_blocks() -> Iterator[None]:
    """Within, memory of 256 KiB or more is mapped from the system and unmapped when freed; nothing but with glibc."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(MMAP_THRESHOLD, LOADING_BYTES)
    try:
        yield
    finally:
        mallopt(MMAP_THRESHOLD, RUNNING_BYTES)
        mallopt(TRIM_THRESHOLD, 2 * RUNNING_BYTES)


@contextmanager
def trimmed_arenas() -> Iterator[None]:
    """Within, what is freed at the end of an arena goes back at once, also in those of threads; only with glibc.

    `malloc_trim` shrinks the main arena alone, and a model is loaded on a thread: of one that was dropped, up to
    2 * RUNNING_BYTES stayed at the end of each arena that a start had used.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(TRIM_THRESHOLD, 0)
    try:
        yield
    finally:
        mallopt(TRIM_THRESHOLD, 2 * RUNNING_BYTES)


def release_freed() -> None:
    """Give blocks that were freed back, where the C library can (glibc).

    It keeps freed blocks of up to 32 MiB for later ones. Loading and the warm-up free many of sizes that serving never
    asks for again: 88 MiB of a model of 110 M parameters, beside 105 MiB of weights. Takes a millisecond or two.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

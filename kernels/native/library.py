"""Finds, loads and tests the compiled operations; the C side says what they do.

Not their use (`kernels.native.backend`). The extensions are plain shared objects without Python in them, one per
instruction set; `pip install` builds those that the machine's compiler can build, and none is needed: without them, or
where one fails its test, `kernels.cpu` serves.
"""

from __future__ import annotations

import ctypes
import functools
import sysconfig
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.ops import LayerKv

STORE, ADD, GATE_UP = 0, 1, 2  # modes of spq_linear
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # of a cache or of scales
# Best first, by what torch found the CPU to have; ATEN_CPU_CAPABILITY lowers it as it does for torch.
EXTENSIONS = {"AVX512": ("_avx512", "_avx2"), "AVX2": ("_avx2",)}
BLOCK = 16  # outputs of a block of a packed matrix
WIDEST_HEAD = 512


class CMatrix(Structure):
    """`Matrix` of native.h."""

    _fields_ = (
        ("packed", c_void_p),
        ("scale", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("segment", c_int64),
        ("levels", c_int64),
        ("group", c_int64),
        ("zero", c_void_p),
        ("scale_kind", c_int64),
    )


class CCache(Structure):
    """`Cache` of native.h."""

    _fields_ = (
        ("key", c_void_p),
        ("value", c_void_p),
        ("key_scale", c_void_p),
        ("value_scale", c_void_p),
        ("heads", c_int64),
        ("width", c_int64),
        ("kind", c_int64),
    )


class CHeads(Structure):
    """`Heads` of heads.c."""

    _fields_ = (
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_stride", c_int64),
        ("k_stride", c_int64),
        ("v_stride", c_int64),
        ("rows", c_int64),
        ("query_heads", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("q_eps", c_float),
        ("k_eps", c_float),
        ("slots", c_void_p),
        ("q_out", c_void_p),
    )


class CQueries(Structure):
    """`Queries` of attention.c."""

    _fields_ = (
        ("q", c_void_p),
        ("out", c_void_p),
        ("tables", c_void_p),
        ("contexts", c_void_p),
        ("starts", c_void_p),
        ("sequences", c_int64),
        ("table_stride", c_int64),
        ("page", c_int64),
        ("query_heads", c_int64),
        ("window", c_int64),
        ("scale", c_float),
    )


def c_cache(kv: LayerKv) -> CCache:
    """One layer's cache for the C side, which must not outlive it."""
    key_scale = None if kv.key_scale is None else kv.key_scale.data_ptr()
    value_scale = None if kv.value_scale is None else kv.value_scale.data_ptr()
    heads, width = kv.key.shape[1:]
    return CCache(kv.key.data_ptr(), kv.value.data_ptr(), key_scale, value_scale, heads, width, KINDS[kv.key.dtype])


@dataclass(frozen=True, slots=True)
class Library:
    """The functions of one extension, with their types declared."""

    name: str
    functions: ctypes.CDLL


@dataclass(frozen=True, slots=True)
class Choice:
    """The extension to use, or none, and why."""

    library: Library | None
    reason: str


@functools.cache
def machine_choice() -> Choice:
    """The best extension that was built, that this CPU can run and that computes correctly; tested once per process."""
    from kernels.native.selftest import fault  # it multiplies through this module

    notes = []
    for name in EXTENSIONS.get(torch.backends.cpu.get_cpu_capability(), ()):
        path = Path(__file__).parent / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not path.is_file():
            notes.append(f"{name}: not built (no C compiler when this was installed?)")
            continue
        library = load(name, path)
        if not library.functions.spq_supported():
            notes.append(f"{name}: this CPU lacks instructions that it uses")
            continue
        wrong = fault(library)
        if wrong is None:
            notes.append(f"{name}: passed its test")
            return Choice(library, "; ".join(notes))
        notes.append(f"{name}: WRONG, {wrong}")
    return Choice(None, "; ".join(notes) or "there is no extension for this CPU: it has no AVX2")


def load(name: str, path: Path) -> Library:
    """Load one extension and declare its functions. Raises OSError where it is not one."""
    functions = ctypes.CDLL(str(path))
    declared = {
        "spq_supported": (c_int, []),
        "spq_pool_new": (c_void_p, [c_int]),
        "spq_pool_limit": (None, [c_void_p, c_int]),
        "spq_pool_free": (None, [c_void_p]),
        "spq_pack_int8": (None, [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64]),
        "spq_pack_int4": (None, [POINTER(CMatrix), c_void_p, c_int64, c_void_p, c_int64, c_int64]),
        "spq_int4_block_bytes": (c_int64, [POINTER(CMatrix)]),
        "spq_embed": (None, [POINTER(CMatrix), c_void_p, c_int64, c_void_p]),
        "spq_linear": (
            None,
            [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_float, POINTER(CMatrix), c_void_p, c_int64, c_int],
        ),
        "spq_silu_mul": (None, [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64]),
        "spq_heads": (None, [c_void_p, POINTER(CHeads), POINTER(CCache)]),
        "spq_layers": (None, [c_void_p, c_void_p, c_void_p, c_int64, POINTER(CHeads), POINTER(CQueries), c_void_p]),
        "spq_attention": (None, [c_void_p, POINTER(CQueries), POINTER(CCache)]),
    }
    for function, (result, arguments) in declared.items():
        entry = getattr(functions, function)
        entry.restype, entry.argtypes = result, arguments
    return Library(name, functions)


class Pool:
    """Threads of the extension; the thread that calls an operation is one of them. Not for two callers at once."""

    def __init__(self, library: Library, threads: int) -> None:
        """Raises MemoryError where the system gives no memory for it."""
        self.library = library
        self.address = library.functions.spq_pool_new(threads)
        if not self.address:
            raise MemoryError("no memory for the thread pool")

    def limit(self, threads: int) -> None:
        """Let only that many work from now on (at least one, at most as many as there are)."""
        self.library.functions.spq_pool_limit(self.address, threads)

    def __del__(self) -> None:
        if getattr(self, "address", None):
            self.library.functions.spq_pool_free(self.address)
            self.address = None

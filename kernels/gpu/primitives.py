"""Device functions that several kernels share: dequantization, the tile product, rounding, counting programs in.

Not kernels: they are inlined into the kernels that call them.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantize(w, dtype: tl.constexpr, MAGIC: tl.constexpr, UPCAST: tl.constexpr):
    """A tile of stored weights as `dtype`, without the scale.

    MAGIC: bytes q + 128 become fp16 by bits alone: 0x6400 | b is 1024 + b, minus 1152 is q, exactly. The direct cast
    int8 -> fp16 uses the slow conversion unit (64 I2F per 64 weights in the SASS of sm_80 and sm_90); int8 -> bf16
    on sm_90 does not, so bf16 (and fp32) keep int8 and cast. UPCAST: as in `dot`.
    """
    if MAGIC:
        return (w.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    elif UPCAST:
        return w.to(tl.float32)
    else:
        return w.to(dtype)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b in float32. UPCAST is for Triton's interpreter, which casts int8 to bf16 and multiplies bf16
    wrongly (it works on the raw bits): there everything becomes float32 first.
    """
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to_even(x):
    """Nearest integer of float32 x, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def silu(x):
    """x * sigmoid(x) in float32 (Elfwing et al. 2018)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def arrive_last(counter, total):
    """Count this program in; true in the last of `total`, which then may read what the others stored before.

    The barrier lets every thread of the program store before one of them counts; acquire-release at the scope of the
    device orders those stores before the last arrival's loads (PTX memory model, causality order). The counter is
    zero again afterwards, so that launches in stream order can share it.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter, 0)
    return last

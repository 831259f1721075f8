"""Rotary embedding of q and k, and the write of k and v to the cache, in one launch.

The cache is 16-bit (or float32) or int8 with one scale per token and head, made here.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import next_power_of_2
from kernels.gpu.primitives import round_to_even
from kernels.ops import LayerKv

_MIN_STEP = tl.constexpr(1e-12)  # of an all-zero row, as in the reference


@triton.jit
def _store_row(a, b, cache, scale, at, scale_at, i, ok, HALF: tl.constexpr, INT8: tl.constexpr):
    """Write the halves a, b of one head; int8 with step = absmax / 127."""
    if INT8:
        step = tl.maximum(tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 0) / 127.0, _MIN_STEP)
        tl.store(scale + scale_at, step)
        a = tl.minimum(tl.maximum(round_to_even(a / step), -127.0), 127.0)
        b = tl.minimum(tl.maximum(round_to_even(b / step), -127.0), 127.0)
    tl.store(cache + at + i, a.to(cache.dtype.element_ty), mask=ok)
    tl.store(cache + at + HALF + i, b.to(cache.dtype.element_ty), mask=ok)


@triton.jit
def rotary_store_kernel(
    q,
    k,
    v,
    cos,
    sin,
    q_out,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    slots,
    q_stride,
    k_stride,
    v_stride,
    slot_stride,
    head_stride,
    num_q_heads,
    num_kv_heads,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    INT8: tl.constexpr,
):
    """One program per (token, head of q then of k/v); heads lie 2 * HALF apart within a token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    ok = i < HALF
    c = tl.load(cos + token * HALF + i, mask=ok, other=0.0)
    s = tl.load(sin + token * HALF + i, mask=ok, other=0.0)
    if head < num_q_heads:
        row = q + token * q_stride + head * 2 * HALF
        a = tl.load(row + i, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(row + HALF + i, mask=ok, other=0.0).to(tl.float32)
        to = q_out + (token * num_q_heads + head) * 2 * HALF
        tl.store(to + i, (a * c - b * s).to(q_out.dtype.element_ty), mask=ok)
        tl.store(to + HALF + i, (b * c + a * s).to(q_out.dtype.element_ty), mask=ok)
    else:
        h = head - num_q_heads
        slot = tl.load(slots + token)
        at = slot * slot_stride + h * head_stride
        scale_at = slot * num_kv_heads + h
        row = k + token * k_stride + h * 2 * HALF
        a = tl.load(row + i, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(row + HALF + i, mask=ok, other=0.0).to(tl.float32)
        _store_row(a * c - b * s, b * c + a * s, k_cache, k_scale, at, scale_at, i, ok, HALF, INT8)
        row = v + token * v_stride + h * 2 * HALF
        a = tl.load(row + i, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(row + HALF + i, mask=ok, other=0.0).to(tl.float32)
        _store_row(a, b, v_cache, v_scale, at, scale_at, i, ok, HALF, INT8)


def rotary_store(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, kv: LayerKv, slots: Tensor) -> Tensor:
    """q [T, HQ, D], k and v [T, HKV, D], cos and sin float32 [T, D/2], slots int64 [T] -> rotated q [T, HQ, D].

    Tokens may lie any stride apart, heads of a token must be contiguous. Raises ValueError for an odd head size or
    cache tensors of different layout.
    """
    tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if head_dim % 2 or kv.key.stride() != kv.value.stride() or kv.key.stride(2) != 1:
        raise ValueError(f"head size {head_dim} must be even, key and value cache laid out alike with dense heads")
    if tuple(cos.shape) != (tokens, head_dim // 2) or cos.dtype != torch.float32:
        raise ValueError(f"cos is {cos.dtype} {tuple(cos.shape)}; float32 [{tokens}, {head_dim // 2}] is needed")
    q, k, v = (_dense_heads(x) for x in (q, k, v))
    out = torch.empty(tokens, num_q_heads, head_dim, dtype=q.dtype, device=q.device)
    if tokens:
        rotary_store_kernel[(tokens, num_q_heads + num_kv_heads)](
            q,
            k,
            v,
            cos.contiguous(),
            sin.contiguous(),
            out,
            kv.key,
            kv.value,
            kv.key if kv.key_scale is None else kv.key_scale,
            kv.value if kv.value_scale is None else kv.value_scale,
            slots,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            kv.key.stride(0),
            kv.key.stride(1),
            num_q_heads,
            num_kv_heads,
            HALF=head_dim // 2,
            BLOCK=next_power_of_2(head_dim // 2),
            INT8=kv.key_scale is not None,
            num_warps=1,
        )
    return out


def _dense_heads(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()

"""What happens to query, key and value heads once they are projected: norms, rotation, the write to the cache.

As a function for the epilogue of a fused kernel (`write_heads`), and as a kernel of its own for prompts and float
projections. The cache is 16-bit (or float32) or int8 with one scale per token and head, made here.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.configs import next_power_of_2
from kernels.gpu.primitives import round_to_even
from kernels.ops import HeadTransform, LayerKv

_MIN_STEP = tl.constexpr(1e-12)  # of an all-zero row, as in the reference
_ROWS = 4  # tokens per program of the kernel below


@triton.jit
def _rotate(a, b, cos, sin, row, i, ok, HALF: tl.constexpr):
    """Half-split rotary embedding (Su et al. 2021, eq. 34) of the halves a, b [R, HALF]."""
    c = tl.load(cos + row[:, None] * HALF + i[None, :], mask=ok, other=0.0)
    s = tl.load(sin + row[:, None] * HALF + i[None, :], mask=ok, other=0.0)
    return a * c - b * s, b * c + a * s


@triton.jit
def _head_norm(a, b, weight, eps, i, HALF: tl.constexpr):
    """Root mean square norm over a head of 2 * HALF."""
    inverse = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)
    first = tl.load(weight + i, mask=i < HALF, other=0.0).to(tl.float32)
    second = tl.load(weight + HALF + i, mask=i < HALF, other=0.0).to(tl.float32)
    return a * inverse[:, None] * first[None, :], b * inverse[:, None] * second[None, :]


@triton.jit
def _store(a, b, cache, scale, at, scale_at, i, row_ok, ok, HALF: tl.constexpr, INT8: tl.constexpr):
    """Write the halves of one head of several tokens; int8 with step = absmax / 127."""
    if INT8:
        step = tl.maximum(tl.max(tl.maximum(tl.abs(a), tl.abs(b)), 1) / 127.0, _MIN_STEP)
        tl.store(scale + scale_at, step, mask=row_ok)
        a = tl.minimum(tl.maximum(round_to_even(a / step[:, None]), -127.0), 127.0)
        b = tl.minimum(tl.maximum(round_to_even(b / step[:, None]), -127.0), 127.0)
    tl.store(cache + at[:, None] + i[None, :], a.to(cache.dtype.element_ty), mask=ok)
    tl.store(cache + at[:, None] + HALF + i[None, :], b.to(cache.dtype.element_ty), mask=ok)


@triton.jit
def write_heads(
    a,
    b,
    row,
    row_ok,
    head,
    q_norm,
    k_norm,
    cos,
    sin,
    q_out,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    slots,
    num_q_heads,
    num_kv_heads,
    slot_stride,
    head_stride,
    q_eps,
    k_eps,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    INT8: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
):
    """Halves a, b [R, HALF_PAD] (float32, zero past HALF) of head `head` (queries, keys, then values) of the tokens
    `row` [R] (int64): queries to q_out [T, num_q_heads, 2 * HALF], keys and values to the slots of the cache."""
    i = tl.arange(0, HALF_PAD)
    ok = row_ok[:, None] & (i < HALF)[None, :]
    if head < num_q_heads:
        if Q_NORM:
            a, b = _head_norm(a, b, q_norm, q_eps, i, HALF)
        a, b = _rotate(a, b, cos, sin, row, i, ok, HALF)
        to = q_out + ((row * num_q_heads + head) * (2 * HALF))[:, None] + i[None, :]
        tl.store(to, a.to(q_out.dtype.element_ty), mask=ok)
        tl.store(to + HALF, b.to(q_out.dtype.element_ty), mask=ok)
    else:
        slot = tl.load(slots + row, mask=row_ok, other=0)
        if head < num_q_heads + num_kv_heads:
            h = head - num_q_heads
            if K_NORM:
                a, b = _head_norm(a, b, k_norm, k_eps, i, HALF)
            a, b = _rotate(a, b, cos, sin, row, i, ok, HALF)
            at = slot * slot_stride + h * head_stride
            _store(a, b, k_cache, k_scale, at, slot * num_kv_heads + h, i, row_ok, ok, HALF, INT8)
        else:
            h = head - num_q_heads - num_kv_heads
            at = slot * slot_stride + h * head_stride
            _store(a, b, v_cache, v_scale, at, slot * num_kv_heads + h, i, row_ok, ok, HALF, INT8)


@triton.jit(do_not_specialize=["T"])
def transform_heads_kernel(
    q,
    k,
    v,
    q_norm,
    k_norm,
    cos,
    sin,
    q_out,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    slots,
    T,
    q_stride,
    k_stride,
    v_stride,
    num_q_heads,
    num_kv_heads,
    slot_stride,
    head_stride,
    q_eps,
    k_eps,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    INT8: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per (ROWS tokens, head of q, k or v); heads lie 2 * HALF apart within a token."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, HALF_PAD)
    row_ok = row < T
    ok = row_ok[:, None] & (i < HALF)[None, :]
    first_key = num_q_heads
    first_value = num_q_heads + num_kv_heads
    base = q
    stride = q_stride
    local = head
    if head >= first_value:
        base = v
        stride = v_stride
        local = head - first_value
    elif head >= first_key:
        base = k
        stride = k_stride
        local = head - first_key
    at = base + (row * stride + local * 2 * HALF)[:, None] + i[None, :]
    a = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=ok, other=0.0).to(tl.float32)
    write_heads(
        a, b, row, row_ok, head, q_norm, k_norm, cos, sin, q_out, k_cache, v_cache, k_scale, v_scale, slots,
        num_q_heads, num_kv_heads, slot_stride, head_stride, q_eps, k_eps, Q_NORM, K_NORM, INT8, HALF, HALF_PAD,
    )  # fmt: skip


def transform_heads(q: Tensor, k: Tensor, v: Tensor, heads: HeadTransform, kv: LayerKv, slots: Tensor) -> Tensor:
    """q [T, HQ * D], k and v [T, HKV * D], slots int64 [T] -> q normed and rotated [T, HQ, D]; k and v go to the cache.

    Rows may lie any stride apart. Raises ValueError as `check_heads`.
    """
    tokens, head_dim = q.shape[0], kv.key.shape[2]
    check_heads(heads, kv, tokens)
    num_q_heads, num_kv_heads = q.shape[1] // head_dim, k.shape[1] // head_dim
    out = torch.empty(tokens, num_q_heads, head_dim, dtype=q.dtype, device=q.device)
    if tokens:
        rows = 128 if q.device.type == "cpu" else _ROWS  # the interpreter pays per program
        transform_heads_kernel[(-(-tokens // rows), num_q_heads + 2 * num_kv_heads)](
            q,
            k,
            v,
            *head_arguments(heads, kv, slots, out),
            tokens,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            num_q_heads,
            num_kv_heads,
            *head_scalars(heads, kv),
            **head_constants(heads, kv),
            ROWS=rows,
            num_warps=4,
        )
    return out


def check_heads(heads: HeadTransform, kv: LayerKv, tokens: int) -> None:
    """Raises ValueError for an odd head size, angles of another shape or cache tensors of different layout."""
    head_dim = kv.key.shape[2]
    if head_dim % 2 or kv.key.stride() != kv.value.stride() or kv.key.stride(2) != 1:
        raise ValueError(f"head size {head_dim} must be even, key and value cache laid out alike with dense heads")
    for angles in (heads.cos, heads.sin):
        if (
            tuple(angles.shape) != (tokens, head_dim // 2)
            or angles.dtype != torch.float32
            or not angles.is_contiguous()
        ):
            raise ValueError(
                f"cos is {angles.dtype} {tuple(angles.shape)}; float32 [{tokens}, {head_dim // 2}] is needed"
            )


def head_arguments(heads: HeadTransform, kv: LayerKv, slots: Tensor, q_out: Tensor) -> tuple[Tensor, ...]:
    """Tensors of `write_heads` from q_norm to slots; what a kernel will not read is any tensor."""
    return (
        heads.cos if heads.q_norm is None else heads.q_norm.weight,
        heads.cos if heads.k_norm is None else heads.k_norm.weight,
        heads.cos,
        heads.sin,
        q_out,
        kv.key,
        kv.value,
        heads.cos if kv.key_scale is None else kv.key_scale,
        heads.cos if kv.value_scale is None else kv.value_scale,
        slots,
    )


def head_scalars(heads: HeadTransform, kv: LayerKv) -> tuple[float, ...]:
    """Numbers of `write_heads` from slot_stride to k_eps."""
    q_eps, k_eps = (0.0 if norm is None else norm.eps for norm in (heads.q_norm, heads.k_norm))
    return kv.key.stride(0), kv.key.stride(1), q_eps, k_eps


def head_constants(heads: HeadTransform, kv: LayerKv) -> dict[str, bool | int]:
    """Compile-time arguments of `write_heads`."""
    half = kv.key.shape[2] // 2
    return {
        "Q_NORM": heads.q_norm is not None,
        "K_NORM": heads.k_norm is not None,
        "INT8": kv.key_scale is not None,
        "HALF": half,
        "HALF_PAD": next_power_of_2(half),
    }

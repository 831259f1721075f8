"""A stack of decoder layers as the compiled code reads it: built once per model, run once per step.

Not the operations one by one (`kernels.native.backend`), which serve what does not fit here: float matrices in a layer,
biases after attention or in the MLP, heads whose width is not a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p, pointer

import torch
from torch import Tensor

from kernels.cpu_linear import Joint
from kernels.layers import Layer
from kernels.native.library import WIDEST_HEAD, CCache, CHeads, CMatrix, CQueries, Pool, c_cache
from kernels.native.matrix import PackedMatrix
from kernels.ops import AttentionBatch, LayerKv, Norm


class CMap(Structure):
    """`Map` of layers.c."""

    _fields_ = (("first", POINTER(CMatrix)), ("second", POINTER(CMatrix)))


class CLayer(Structure):
    """`Layer` of layers.c."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("input_eps", c_float),
        ("post_eps", c_float),
        ("projections", POINTER(CMatrix)),
        ("second", POINTER(CMatrix) * 3),
        ("bias", c_void_p * 3),
        ("column", c_int64 * 3),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("q_eps", c_float),
        ("k_eps", c_float),
        ("out", CMap),
        ("down", CMap),
        ("gate_up", POINTER(CMatrix)),
        ("window", c_int64),
    )


class CLayers(Structure):
    """`Layers` of layers.c."""

    _fields_ = (
        ("layers", POINTER(CLayer)),
        ("caches", POINTER(CCache)),
        ("count", c_int64),
        ("hidden", c_int64),
        ("query_heads", c_int64),
        ("first", c_int64),
        ("second", c_int64),
    )


class Program:
    """The layers of one model over one cache. Keeps both alive: the C side holds their addresses."""

    def __init__(self, layers: Sequence[Layer], cache: Sequence[LayerKv], pool: Pool) -> None:
        """For layers that `fits` accepts."""
        self.layers, self.cache = layers, cache
        self._pool = pool
        entries = [_entry(layer) for layer in layers]
        self._entries = (CLayer * len(entries))(*entries)
        self._caches = (CCache * len(entries))(*(c_cache(kv) for kv in cache))
        kv_heads, width = cache[0].key.shape[1:]
        self._wide = _outputs(layers[0].qkv, 0)
        firsts = [max(_stack(y.qkv).outputs, y.gate_up.outputs // 2, _middle(y.o)) for y in layers]
        seconds = [max(2 * self._wide, _middle(y.down)) for y in layers]
        pairs = any(output.up is not None for y in layers for output in y.qkv.outputs)
        self._row = max(firsts) + max(seconds) + (2 * kv_heads * width if pairs else 0)
        self._layers = CLayers(
            self._entries, self._caches, len(entries), _stack(layers[0].qkv).inputs, self._wide // width,
            max(firsts), max(seconds),
        )  # fmt: skip

    def run(self, h: Tensor, cos: Tensor, sin: Tensor, batch: AttentionBatch, scale: float) -> Tensor:
        """h [T, hidden] through all layers, in place; cos and sin [T, D/2]."""
        rows = h.shape[0]
        work = torch.empty(rows * self._row)
        cos, sin, tables = cos.contiguous(), sin.contiguous(), batch.block_tables
        heads = CHeads(rows=rows, query_heads=self._layers.query_heads, cos=cos.data_ptr(), sin=sin.data_ptr(),
                       slots=batch.slots.data_ptr())  # fmt: skip
        queries = CQueries(
            None, None, tables.data_ptr(), batch.context_lens.data_ptr(), batch.query_starts.data_ptr(),
            tables.shape[0], tables.stride(0), batch.block_size, self._layers.query_heads, 0, scale,
        )  # fmt: skip
        self._pool.library.functions.spq_layers(
            self._pool.address, byref(self._layers), h.data_ptr(), rows, byref(heads), byref(queries), work.data_ptr()
        )
        return h


def fits(layers: Sequence[Layer], cache: Sequence[LayerKv]) -> bool:
    """Whether a Program can run these layers."""
    width = cache[0].key.shape[-1]
    return width % 8 == 0 and width <= WIDEST_HEAD and all(_fits(layer) for layer in layers)


def _fits(layer: Layer) -> bool:
    if not isinstance(layer.gate_up, PackedMatrix):
        return False
    for joint in (layer.qkv, layer.o, layer.down):
        ups = [output.up for output in joint.outputs if output.up is not None]
        if len(joint.firsts) != 1 or not all(isinstance(m, PackedMatrix) for m in [*joint.firsts, *ups]):
            return False
    return layer.o.outputs[0].bias is None and layer.down.outputs[0].bias is None


def _entry(layer: Layer) -> CLayer:
    entry = CLayer(
        input_norm=layer.input_norm.weight.data_ptr(),
        post_norm=layer.post_norm.weight.data_ptr(),
        input_eps=layer.input_norm.eps,
        post_eps=layer.post_norm.eps,
        projections=pointer(_stack(layer.qkv).c_matrix),
        out=_map(layer.o),
        down=_map(layer.down),
        gate_up=pointer(layer.gate_up.c_matrix),
        window=layer.window or 0,
    )
    for i, output in enumerate(layer.qkv.outputs):
        entry.column[i] = 0 if output.columns is None else output.columns.start
        if output.up is not None:
            entry.second[i] = pointer(output.up.c_matrix)
        if output.bias is not None:
            entry.bias[i] = output.bias.data_ptr()
    if layer.q_norm is not None:
        entry.q_norm, entry.q_eps = _norm(layer.q_norm)
    if layer.k_norm is not None:
        entry.k_norm, entry.k_eps = _norm(layer.k_norm)
    return entry


def _norm(norm: Norm) -> tuple[int, float]:
    return norm.weight.data_ptr(), norm.eps


def _map(joint: Joint) -> CMap:
    up = joint.outputs[0].up
    return CMap(pointer(_stack(joint).c_matrix), None if up is None else pointer(_packed(up).c_matrix))


def _packed(matrix: object) -> PackedMatrix:
    assert isinstance(matrix, PackedMatrix), "checked by `fits`"
    return matrix


def _stack(joint: Joint) -> PackedMatrix:
    return _packed(joint.firsts[0])


def _middle(joint: Joint) -> int:
    """Width of what lies between the two factors; 0 for one matrix."""
    return 0 if joint.outputs[0].up is None else _stack(joint).outputs


def _outputs(joint: Joint, index: int) -> int:
    output = joint.outputs[index]
    if output.up is not None:
        return _packed(output.up).outputs
    columns = output.columns
    return _stack(joint).outputs if columns is None else columns.stop - columns.start

"""A stack of decoder layers as the compiled code reads it: built once per model, run once per step.

Not the operations one by one (`kernels.native.backend`), which serve what does not fit here: float matrices in a layer,
and heads whose width is not a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int64, c_void_p, pointer

import torch
from torch import Tensor

from kernels.cpu_linear import Joint, Matrix
from kernels.layers import Layer
from kernels.native.library import WIDEST_HEAD, CCache, CHeads, CMatrix, CQueries, Pool, c_cache
from kernels.native.matrix import PackedMatrix
from kernels.ops import AttentionBatch, LayerKv, Norm

MOST_FIRSTS = 6  # of layers.c; three projections with corrections have no more


class COutput(Structure):
    """`Output` of layers.c."""

    _fields_ = (
        ("first", c_int64 * 2),
        ("column", c_int64 * 2),
        ("second", POINTER(CMatrix) * 2),
        ("bias", c_void_p),
        ("columns", c_int64),
    )


class CJoint(Structure):
    """`Joint` of layers.c."""

    _fields_ = (
        ("firsts", POINTER(CMatrix) * MOST_FIRSTS),
        ("num_firsts", c_int64),
        ("outputs", COutput * 3),
        ("num_outputs", c_int64),
    )


class CLayer(Structure):
    """`Layer` of layers.c."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("input_eps", c_float),
        ("post_eps", c_float),
        ("qkv", CJoint),
        ("out", CJoint),
        ("down", CJoint),
        ("gate_up", POINTER(CMatrix)),
        ("apart", CJoint),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("q_eps", c_float),
        ("k_eps", c_float),
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
        ("products", c_int64),
        ("seconds", c_int64),
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
        wide = _columns(layers[0].qkv, 0)
        products = max(max(_products(y.qkv), _products(y.o), _products(y.gate_up)) for y in layers)
        seconds = max(max(_seconds(y.qkv), _seconds(y.gate_up)) for y in layers)
        self._row = products + seconds + max(max(2 * wide, _products(y.down)) for y in layers)
        self._layers = CLayers(
            self._entries, self._caches, len(entries), _packed(layers[0].qkv.firsts[0]).inputs,
            wide // cache[0].key.shape[-1], products, seconds,
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


def matrices(layer: Layer) -> list[Matrix]:
    """All matrices of a layer."""
    joints = [layer.qkv, layer.o, layer.down]
    found: list[Matrix] = []
    if isinstance(layer.gate_up, PackedMatrix):
        found.append(layer.gate_up)
    else:
        joints.append(layer.gate_up)
    for joint in joints:
        found += joint.firsts
        found += [term.up for output in joint.outputs for term in output.terms if term.up is not None]
    return found


def _fits(layer: Layer) -> bool:
    return all(isinstance(matrix, PackedMatrix) for matrix in matrices(layer))


def _entry(layer: Layer) -> CLayer:
    entry = CLayer(
        input_norm=layer.input_norm.weight.data_ptr(),
        post_norm=layer.post_norm.weight.data_ptr(),
        input_eps=layer.input_norm.eps,
        post_eps=layer.post_norm.eps,
        qkv=_joint(layer.qkv),
        out=_joint(layer.o),
        down=_joint(layer.down),
        window=layer.window or 0,
    )
    if isinstance(layer.gate_up, PackedMatrix):
        entry.gate_up = pointer(layer.gate_up.c_matrix)
    else:
        entry.apart = _joint(layer.gate_up)
    if layer.q_norm is not None:
        entry.q_norm, entry.q_eps = _norm(layer.q_norm)
    if layer.k_norm is not None:
        entry.k_norm, entry.k_eps = _norm(layer.k_norm)
    return entry


def _joint(joint: Joint) -> CJoint:
    made = CJoint(num_firsts=len(joint.firsts), num_outputs=len(joint.outputs))
    for i, matrix in enumerate(joint.firsts):
        made.firsts[i] = pointer(_packed(matrix).c_matrix)
    for i, output in enumerate(joint.outputs):
        mine = made.outputs[i]
        mine.first[:] = [-1, -1]
        mine.columns = _columns(joint, i)
        mine.bias = None if output.bias is None else output.bias.data_ptr()
        for t, term in enumerate(output.terms):
            mine.first[t] = term.first
            mine.column[t] = 0 if term.columns is None else term.columns.start
            if term.up is not None:
                mine.second[t] = pointer(_packed(term.up).c_matrix)
    return made


def _norm(norm: Norm) -> tuple[int, float]:
    return norm.weight.data_ptr(), norm.eps


def _packed(matrix: object) -> PackedMatrix:
    assert isinstance(matrix, PackedMatrix), "checked by `fits`"
    return matrix


def _products(joint: Joint | PackedMatrix) -> int:
    """Floats a row of what the first matrices give; of gate and up in one matrix, of their result."""
    if isinstance(joint, PackedMatrix):
        return joint.outputs // 2
    return sum(_packed(matrix).outputs for matrix in joint.firsts)


def _seconds(joint: Joint | PackedMatrix) -> int:
    """Floats a row of what comes out of second factors."""
    if isinstance(joint, PackedMatrix):
        return 0
    return sum(_columns(joint, i) for i, output in enumerate(joint.outputs) if output.terms[0].up is not None)


def _columns(joint: Joint, index: int) -> int:
    """Width of a projection."""
    term = joint.outputs[index].terms[0]
    if term.up is not None:
        return _packed(term.up).outputs
    return _packed(joint.firsts[term.first]).outputs if term.columns is None else term.columns.stop - term.columns.start

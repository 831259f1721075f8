"""Integers of prepared weights that are moved: none is forgotten, none is moved apart from its twin."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import Tensor

from kernels.gpu.stores import layer_stores
from kernels.layers import Layer
from kernels.ops import Norm

HIDDEN, WIDTH, KV = 64, 96, 32


def weights_of(prepared: object) -> list[Tensor]:
    """All flat tensors of integers named `weight` in there: what products read."""
    if isinstance(prepared, tuple | list):
        return [tensor for part in prepared for tensor in weights_of(part)]
    if not is_dataclass(prepared):
        return []
    found = []
    for field in fields(prepared):
        value = getattr(prepared, field.name)
        if isinstance(value, Tensor):
            if field.name == "weight" and not value.is_floating_point():
                found.append(value)
        else:
            found += weights_of(value)
    return found


def layer_of(ops, qkv, o, gate, up, down) -> Layer:
    norm = Norm(torch.ones(HIDDEN), 1e-5)
    return Layer(
        norm, ops.prepare_qkv(*qkv), None, None, ops.prepare_linear(o), norm, ops.prepare_gate_up(gate, up),
        ops.prepare_linear(down), None,
    )  # fmt: skip


def layers(ops, make) -> dict[str, tuple[Layer, int]]:
    """One of each kind of projections, with how many matrices of integers it has."""
    shapes = {"q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN)}
    int8 = {name: make.int8(*shape) for name, shape in shapes.items()}
    int4 = {name: make.int4(*shape, 32) for name, shape in shapes.items()}
    pair = make.low_rank(HIDDEN, HIDDEN, 12)
    gate, up, down = make.int8(WIDTH, HIDDEN), make.int8(WIDTH, HIDDEN), make.int8(HIDDEN, WIDTH)
    dense = make.dense(HIDDEN, HIDDEN, ops.dtype)
    corrected = make.corrected(make.int8(WIDTH, HIDDEN), 4)
    return {
        "int8": (layer_of(ops, int8.values(), int8["q"], gate, up, down), 4),
        "int4": (layer_of(ops, int4.values(), int4["q"], gate, up, down), 4),
        "pairs": (layer_of(ops, (pair, int8["k"], int8["v"]), pair, gate, up, down), 6),
        "mixed": (layer_of(ops, (int8["q"], int4["k"], int4["v"]), dense, gate, up, down), 5),
        "corrected": (layer_of(ops, int8.values(), make.corrected(int8["q"], 4), corrected, up, down), 8),
    }


@pytest.mark.parametrize("kind", ["int8", "int4", "pairs", "mixed", "corrected"])
def test_every_integer_is_moved(ops, make, kind) -> None:
    layer, count = layers(ops, make)[kind]
    stores = layer_stores(layer)
    parts = [layer.qkv, layer.o, layer.gate_up, layer.down]
    before = {w.data_ptr(): w for w in weights_of(parts)}
    assert {store.integers.data_ptr() for store in stores} == before.keys()
    assert len(stores) == len(before) == count
    assert [s.integers.data_ptr() for s in ops.stores(layer)] == [s.integers.data_ptr() for s in stores]
    for store in stores:
        store.move(store.integers.clone())
    moved = {w.data_ptr() for w in weights_of(parts)}
    assert not moved & before.keys() and len(moved) == count
    for store in stores:
        assert store.integers.dim() == 1 and not store.integers.is_floating_point()

"""Decoder layers that stay coded in memory: a layer is decoded into an arena of two while the one before runs.

Not the choice of layers (`residency`) nor the coding (`spq.entropy`). What is coded is what the native back end has
packed, so its kernels read a decoded layer as they read any other and the results are the same, bit for bit. Layers are
visited in a ring: when one is done, its half of the arena is given to the next but one, across the end of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layers import Layer
from kernels.native.backend import NativeOps
from kernels.native.matrix import PackedMatrix
from kernels.ops import AttentionBatch, LayerKv
from spq.entropy import CodedTensor, check_table, decode_blocks, encode

ALIGNMENT = 64  # bytes, of a matrix in the arena
TASK_BYTES = 1 << 20  # decoded by a thread at a time: a millisecond or two


@dataclass(slots=True)
class CodedMatrix:
    """A matrix and its coded integers."""

    matrix: PackedMatrix
    dtype: torch.dtype
    nbytes: int  # decoded
    coded: CodedTensor
    offsets: list[int]
    name: str  # for errors


class CodedLayer:
    """One layer whose integers are in no matrix, only coded."""

    def __init__(self, name: str, layer: Layer, stores: Sequence[PackedMatrix], threads: int) -> None:
        """Codes the integers of `stores` and takes their memory away."""
        self.layer = layer
        self.matrices = []
        for number, matrix in enumerate(stores):
            integers = matrix.integers
            coded, where = encode(integers, threads), f"{name}, matrix {number} in memory"
            offsets = check_table(coded, integers.nbytes, where)
            self.matrices.append(CodedMatrix(matrix, integers.dtype, integers.nbytes, coded, offsets, where))
        self.let_go()

    @property
    def coded_bytes(self) -> int:
        """Bytes of the coded integers."""
        return sum(m.coded.nbytes for m in self.matrices)

    @property
    def decoded_bytes(self) -> int:
        """Bytes of the integers."""
        return sum(m.nbytes for m in self.matrices)

    @property
    def arena_bytes(self) -> int:
        """Bytes its integers take in an arena."""
        return sum(_aligned(m.nbytes) for m in self.matrices)

    def let_go(self) -> None:
        """Point the matrices nowhere; they must not be run."""
        for m in self.matrices:
            m.matrix.move(torch.empty(0, dtype=m.dtype))

    def decode(self, memory: Tensor, decoders: ThreadPoolExecutor) -> list[Future[None]]:
        """Let the matrices lie in `memory` (uint8) and begin to decode into it."""
        tasks, start = [], 0
        for m in self.matrices:
            target = memory[start : start + m.nbytes]
            start += _aligned(m.nbytes)
            m.matrix.move(target.view(m.dtype))
            step = max(1, TASK_BYTES // m.coded.block_bytes)
            for first in range(0, len(m.offsets) - 1, step):
                last = min(first + step, len(m.offsets) - 1)
                tasks.append(decoders.submit(decode_blocks, m.coded, m.offsets, target, m.name, first, last))
        return tasks


@dataclass(slots=True)
class _Part:
    """Layers that run in one call: neighbours that are decoded, or one that is coded."""

    layers: list[Layer]
    cache: list[LayerKv]
    coded: bool


class CodedLayers:
    """A stack of layers, some of them coded. One caller at a time; nothing is decoded ahead of the first `run`."""

    def __init__(self, ops: NativeOps, threads: int, decoders: ThreadPoolExecutor | None = None) -> None:
        """`threads` decode: their own, or those of another stack."""
        self.ops = ops
        self._threads = threads
        self._decoders = decoders or ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._layers: list[Layer] = []
        self.coded: dict[int, CodedLayer] = {}  # by number of the layer
        self._arena: tuple[Tensor, Tensor] | None = None
        self._pending: list[list[Future[None]]] = []  # of the layers that come next, at most two
        self._next = 0  # place in the ring of the layer to decode next; its parity is its half of the arena
        self._parts: list[_Part] = []
        self._cache: Sequence[LayerKv] | None = None  # that the parts are for

    def add(self, layer: Layer) -> None:
        """Take the next layer and code its integers, so that only one layer is ever there both ways."""
        number = len(self._layers)
        self._layers.append(layer)
        if stores := self.ops.stores(layer):
            self.coded[number] = CodedLayer(f"layer {number}", layer, stores, self._threads)

    def keep_decoded(self, numbers: Sequence[int]) -> None:
        """Decode these layers for good."""
        self._wait()
        for number in numbers:
            self._decode_alone(self.coded.pop(number))
        self._arena, self._next, self._parts, self._cache = None, 0, [], None

    @property
    def coded_bytes(self) -> int:
        """Bytes of the coded layers."""
        return sum(layer.coded_bytes for layer in self.coded.values())

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena."""
        return 2 * max((layer.arena_bytes for layer in self.coded.values()), default=0)

    def run(
        self, h: Tensor, cos: Tensor, sin: Tensor, cache: Sequence[LayerKv], batch: AttentionBatch, scale: float
    ) -> Tensor:
        """As Ops.run_layers. Raises PackedFormatError where memory was damaged."""
        if cache is not self._cache:
            self._divide(cache)
        self._begin()
        for part in self._parts:
            if part.coded:
                self._await_next()
            h = self.ops.run_layers(h, part.layers, cos, sin, part.cache, batch, scale)
            if part.coded:
                self._decode_next()
        return h

    def some(self, numbers: Sequence[int]) -> CodedLayers:
        """Only these coded layers, as a stack of their own with its own arena; for measuring, between steps."""
        self._wait()
        part = CodedLayers(self.ops, self._threads, self._decoders)
        part._layers = [self._layers[number] for number in numbers]
        part.coded = {place: self.coded[number] for place, number in enumerate(numbers)}
        return part

    def decode_all(self) -> None:
        """What `run` decodes, as it decodes it, without running anything; for measuring, between steps."""
        self._begin()
        for _ in self.coded:
            self._await_next()
            self._decode_next()

    def lend(self, numbers: Sequence[int]) -> list[Layer]:
        """Coded layers, decoded into memory of their own until `take_back`; for measuring, between steps."""
        self._wait()
        for number in numbers:
            self._decode_alone(self.coded[number])
        return [self._layers[number] for number in numbers]

    def take_back(self) -> None:
        """Let go of all memory but the coded layers' own."""
        self._wait()
        for layer in self.coded.values():
            layer.let_go()
        self._arena = None

    def _decode_alone(self, layer: CodedLayer) -> None:
        for task in layer.decode(torch.empty(layer.arena_bytes, dtype=torch.uint8), self._decoders):
            task.result()

    def _begin(self) -> None:
        """Decode ahead, unless the last step has begun that."""
        while len(self._pending) < min(2, len(self.coded)):
            self._decode_next()

    def _await_next(self) -> None:
        for task in self._pending.pop(0):
            task.result()

    def _decode_next(self) -> None:
        order = sorted(self.coded)
        layer = self.coded[order[self._next % len(order)]]
        self._pending.append(layer.decode(self._half(self._next % 2), self._decoders))
        self._next += 1

    def _half(self, index: int) -> Tensor:
        if self._arena is None:
            size = self.arena_bytes // 2
            self._arena = torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
        return self._arena[index]

    def _wait(self) -> None:
        """Let what was begun end, and begin anew."""
        for task in [task for tasks in self._pending for task in tasks]:
            task.result()
        self._pending, self._next = [], 0

    def _divide(self, cache: Sequence[LayerKv]) -> None:
        """The parts for a cache; lists that stay the same, by which the back end knows its programs."""
        if not self._parts:
            for number, layer in enumerate(self._layers):
                coded = number in self.coded
                if coded or not self._parts or self._parts[-1].coded:
                    self._parts.append(_Part([], [], coded))
                self._parts[-1].layers.append(layer)
        start = 0
        for part in self._parts:
            part.cache = list(cache[start : start + len(part.layers)])
            start += len(part.layers)
        self._cache = cache


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

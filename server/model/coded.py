"""Decoder layers that stay coded in host memory: one is decoded into an arena of two while the one before runs.

Not the choice of layers (`residency`), the coding (`spq.entropy`) or the arena, which is on the card for a GPU
(`arena`). What is coded is what the back end has laid out, so its kernels read a decoded layer as they read any other
and the results are the same, bit for bit. Layers are visited in a ring: when one has run, or on a GPU is sure to, its
half of the arena is given to the next but one, across the end of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kernels.layers import Layer
from kernels.ops import AttentionBatch, LayerKv
from kernels.stores import MovableOps, Store
from server.model.arena import Arena, Bus, HostArena, StagedArena
from spq.entropy import CodedTensor, check_table, decode_blocks, encode

ALIGNMENT = 128  # bytes, of a matrix in the arena: a line of a GPU's cache, two of a CPU's
TASK_BYTES = 1 << 20  # decoded by a thread at a time: a millisecond or two


@dataclass(slots=True)
class CodedMatrix:
    """A matrix and its coded integers."""

    store: Store
    dtype: torch.dtype
    nbytes: int  # decoded
    coded: CodedTensor
    offsets: list[int]
    name: str  # for errors


class CodedLayer:
    """One layer whose integers are in no matrix, only coded."""

    def __init__(self, name: str, layer: Layer, stores: Sequence[Store], threads: int) -> None:
        """Codes the integers of `stores` and takes their memory away, one after the other."""
        self.layer = layer
        self.matrices = []
        for number, store in enumerate(stores):
            integers = store.integers.cpu()
            coded, where = encode(integers, threads), f"{name}, matrix {number} in memory"
            offsets = check_table(coded, integers.nbytes, where)
            self.matrices.append(CodedMatrix(store, integers.dtype, integers.nbytes, coded, offsets, where))
            store.move(_nowhere(integers.dtype))

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
            m.store.move(_nowhere(m.dtype))

    def lie_in(self, memory: Tensor) -> None:
        """Let kernels read the matrices from `memory` (uint8, on the device)."""
        for m, part in zip(self.matrices, self._parts(memory), strict=True):
            m.store.move(part.view(m.dtype))

    def decode(self, to: Tensor, decoders: ThreadPoolExecutor) -> list[Future[None]]:
        """Begin to decode into `to` (uint8, on the host), as they lie in memory."""
        tasks = []
        for m, target in zip(self.matrices, self._parts(to), strict=True):
            step = max(1, TASK_BYTES // m.coded.block_bytes)
            for first in range(0, len(m.offsets) - 1, step):
                last = min(first + step, len(m.offsets) - 1)
                tasks.append(decoders.submit(decode_blocks, m.coded, m.offsets, target, m.name, first, last))
        return tasks

    def _parts(self, memory: Tensor) -> list[Tensor]:
        """The bytes of each matrix."""
        starts = accumulate((_aligned(m.nbytes) for m in self.matrices), initial=0)
        return [memory[start : start + m.nbytes] for m, start in zip(self.matrices, starts, strict=False)]


@dataclass(slots=True)
class _Part:
    """Layers that run in one call: neighbours that are decoded, or one that is coded."""

    layers: list[Layer]
    cache: list[LayerKv]
    coded: bool


@dataclass(slots=True)
class _Visit:
    """A layer that is being decoded into its half of the arena."""

    layer: CodedLayer
    half: int
    tasks: list[Future[None]]


class CodedLayers:
    """A stack of layers, some of them coded. One caller at a time; nothing is decoded ahead of the first `run`.

    A run with coded layers must not be recorded as a CUDA graph: each is decoded by the host while it runs.
    """

    def __init__(
        self, ops: MovableOps, threads: int, bus: Bus | None = None, decoders: ThreadPoolExecutor | None = None
    ) -> None:
        """`threads` decode: their own, or those of another stack. `bus` leads to the device, where that is no CPU."""
        self.ops = ops
        self._bus = bus
        self._threads = threads
        self._decoders = decoders or ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._layers: list[Layer] = []
        self.coded: dict[int, CodedLayer] = {}  # by number of the layer
        self._arena: Arena | None = None
        self._pending: list[_Visit] = []  # of the layers that come next, at most two
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
        self._arena, self._parts, self._cache = None, [], None
        for number in numbers:
            self._decode_alone(self.coded.pop(number))

    @property
    def staged(self) -> bool:
        """Whether the arena is on a device of its own, and what is decoded goes through pinned host memory."""
        return self._bus is not None

    @property
    def coded_bytes(self) -> int:
        """Bytes of the coded layers, on the host."""
        return sum(layer.coded_bytes for layer in self.coded.values())

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena, on the device. Where `staged`, there are as many of pinned host memory."""
        return 2 * max((layer.arena_bytes for layer in self.coded.values()), default=0)

    def reserve(self) -> None:
        """Have the arena from now on, so that it is counted with the weights."""
        if self.coded:
            self._halves()

    def run(
        self, h: Tensor, cos: Tensor, sin: Tensor, cache: Sequence[LayerKv], batch: AttentionBatch, scale: float
    ) -> Tensor:
        """As Ops.run_layers. Raises PackedFormatError where memory was damaged."""
        if cache is not self._cache:
            self._divide(cache)
        self._begin()
        for part in self._parts:
            visit = self._await_next() if part.coded else None
            h = self.ops.run_layers(h, part.layers, cos, sin, part.cache, batch, scale)
            if visit is not None:
                self._leave(visit)
        return h

    def some(self, numbers: Sequence[int]) -> CodedLayers:
        """Only these coded layers, as a stack of their own with its own arena; for measuring, between steps."""
        self._wait()
        part = CodedLayers(self.ops, self._threads, self._bus, self._decoders)
        part._layers = [self._layers[number] for number in numbers]
        part.coded = {place: self.coded[number] for place, number in enumerate(numbers)}
        return part

    def decode_all(self) -> None:
        """What `run` decodes and sends, as it does, without running anything; for measuring, between steps."""
        self._begin()
        for _ in self.coded:
            self._leave(self._await_next())

    def send_all(self) -> None:
        """What `run` sends, without decoding it or running anything; for measuring, between steps."""
        self._wait()
        arena = self._halves()
        for place, layer in enumerate(self.coded.values()):
            arena.send(place % 2, layer.arena_bytes)
            arena.release(place % 2)

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
        decoded = torch.empty(layer.arena_bytes, dtype=torch.uint8)
        for task in layer.decode(decoded, self._decoders):
            task.result()
        layer.lie_in(decoded if self._bus is None else self._bus.allocate(len(decoded)).copy_(decoded))

    def _begin(self) -> None:
        """Decode ahead, unless the last step has begun that."""
        while len(self._pending) < min(2, len(self.coded)):
            self._decode_next()

    def _await_next(self) -> _Visit:
        """The layer that comes next, ready to run: what runs now may read it."""
        visit = self._pending.pop(0)
        for task in visit.tasks:
            task.result()
        self._halves().send(visit.half, visit.layer.arena_bytes)
        return visit

    def _leave(self, visit: _Visit) -> None:
        """Its kernels are begun: give its half of the arena to the next but one."""
        self._halves().release(visit.half)
        self._decode_next()

    def _decode_next(self) -> None:
        order, half, arena = sorted(self.coded), self._next % 2, self._halves()
        layer = self.coded[order[self._next % len(order)]]
        layer.lie_in(arena.memory(half))
        self._pending.append(_Visit(layer, half, layer.decode(arena.target(half), self._decoders)))
        self._next += 1

    def _halves(self) -> Arena:
        if self._arena is None:
            size = self.arena_bytes // 2
            with torch.inference_mode(False):  # else only inference could write to it, not what measures
                self._arena = HostArena(size) if self._bus is None else StagedArena(size, self._bus)
        return self._arena

    def _wait(self) -> None:
        """Let what was begun end, and begin anew."""
        for task in [task for visit in self._pending for task in visit.tasks]:
            task.result()
        self._pending, self._next = [], 0
        if self._arena is not None:
            self._arena.drain()

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


def _nowhere(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype)

"""Which layers stay coded in memory: as many as the speed allows, from rates measured on this machine, and on a card as
many as it has no room for.

Not the layers themselves (`server.model.coded`). A step of one token is predicted as

    rest + sum over decoded layers of t_raw + sum over coded layers of (t_run + t_feed - overlap min(t_run, t_feed)),

with t_feed = bytes / bandwidth of decoding, on a GPU of decoding and copying behind one another: the slower of the two.
Where feeding has cores of its own, overlap is 1 and a coded layer takes max(t_run, t_feed) (algorithm of "double
compression", arXiv 2502.15443, section on speed-adaptive compression, in our reading); on a CPU decoders and kernels
share the cores, so how much really overlaps is measured on a few layers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from kernels.layers import Layer
from kernels.ops import AttentionBatch, LayerKv
from server.engine.graphs import Recorder
from server.engine.kv_cache import allocate
from server.model.coded import CodedLayers
from server.model.llama import Llama
from spq.sizes import format_bytes

logger = logging.getLogger(__name__)

SAMPLED_LAYERS = 4  # and of a card's two, as many as the arena holds: measuring takes no more than running
CODED_CONTEXT = 4096  # tokens whose keys and values come before decoded layers, where nobody asked for a length
TRIALS = 5  # of each rate at least,
LEAST_S = 0.2  # and for so long: on a busy machine it takes a while until all threads have a core


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured; bytes are those of decoded integers."""

    feed: float  # bytes/s into the arena: all threads decode, copies behind them, nothing else runs
    run_decoded: float  # bytes/s of several layers in a row, for one token
    run_coded: float  # bytes/s of a layer that runs alone, as a coded one does: threads have to wake
    overlap: float  # 0..1 of the shorter of feeding and running that is hidden by the other
    rest_s: float  # of a step: the head
    recorded: float | None = None  # bytes/s of layers of a CUDA graph, which steps with coded layers cannot be
    copy: float = math.inf  # bytes/s to the arena alone; part of `feed`

    def raw_s(self, size: int) -> float:
        """Seconds of a layer of `size` bytes in a model whose layers are all decoded."""
        return self.decoded_s(size) if self.recorded is None else size / self.recorded

    def decoded_s(self, size: int) -> float:
        """Seconds of a decoded layer of `size` bytes beside coded ones."""
        return size / self.run_decoded

    def coded_s(self, size: int) -> float:
        """Seconds of a coded layer of `size` bytes."""
        run, feed = size / self.run_coded, size / self.feed
        return run + feed - self.overlap * min(run, feed)


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What a layer may weigh where kernels read."""

    decoded: int
    coded: int  # 0 where that is on another device
    arena: int  # one half of it


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice, and what it should do."""

    coded: tuple[int, ...]  # numbers of layers
    decoded_token_s: float  # predicted with nothing coded
    token_s: float  # predicted
    saved_bytes: int
    for_room: int = 0  # how many of the layers are coded for want of room, whatever the tolerance


def plan(layers: dict[int, LayerBytes], rates: Rates, tolerance: float, room: int | None = None) -> Plan:
    """Leave coded what frees most bytes per second lost, as long as tokens/s falls by at most `tolerance` (0..1).

    At 1 all layers that save anything stay coded. The arena of two layers counts against what is saved: nothing stays
    coded where that would be no gain. Decoded layers and the arena may take `room` bytes, where there is a limit: what
    does not fit stays coded at any price. Where nothing fits, everything does.
    """
    raw_s = rates.rest_s + sum(rates.raw_s(layer.decoded) for layer in layers.values())
    all_s = rates.rest_s + sum(rates.decoded_s(layer.decoded) for layer in layers.values())
    limit_s = raw_s / (1 - tolerance) if tolerance < 1 else math.inf
    lost_s = {n: rates.coded_s(layer.decoded) - rates.decoded_s(layer.decoded) for n, layer in layers.items()}
    gain = {n: layer.decoded - layer.coded for n, layer in layers.items()}
    order = sorted((n for n in layers if gain[n] > 0), key=lambda n: (max(lost_s[n], 0.0) / gain[n], n))

    def arena(numbers: Sequence[int]) -> int:
        return 2 * max((layers[n].arena for n in numbers), default=0)

    def saved(numbers: Sequence[int]) -> int:
        return sum(gain[n] for n in numbers) - arena(numbers)

    def fits(numbers: Sequence[int]) -> bool:
        kept = sum(layer.arena for n, layer in layers.items() if n not in numbers)
        return room is None or kept + arena(numbers) <= room

    chosen: list[int] = []
    token_s = all_s
    for number in order:
        if token_s + lost_s[number] <= limit_s:
            chosen.append(number)
            token_s += lost_s[number]
    if saved(chosen) <= 0:
        chosen = []
    for_speed = len(chosen)
    for number in order:
        if fits(chosen):
            break
        if number not in chosen:
            chosen.append(number)
    if not chosen:
        return Plan((), raw_s, raw_s, 0)
    token_s = all_s + sum(lost_s[n] for n in chosen)
    return Plan(tuple(sorted(chosen)), raw_s, token_s, saved(chosen), len(chosen) - for_speed)


def settle(
    model: Llama,
    layers: CodedLayers,
    kv_dtype: torch.dtype,
    tolerance: float,
    room: int | None = None,
    recorder: Recorder | None = None,
) -> Plan:
    """Measure, plan, and decode for good the layers that do not stay coded. All are coded when this is called.

    `room` as `plan` wants it; `recorder` where steps of decoded layers are recorded. At least one layer has integers.
    """
    sizes = {
        n: LayerBytes(x.decoded_bytes, 0 if layers.staged else x.coded_bytes, x.arena_bytes)
        for n, x in layers.coded.items()
    }
    rates = measure(model, layers, kv_dtype, recorder)
    found = plan(sizes, rates, tolerance, room)
    layers.keep_decoded([number for number in sizes if number not in found.coded])
    layers.reserve()
    logger.info(
        "resident: %d of %d layers stay coded (%s in place of %s, and an arena of %s); predicted %.1f tokens/s for one "
        "stream, %.1f with all decoded; measured: decoding%s %.2f GB/s, layers %.2f GB/s (alone: %.2f), "
        "overlap %.0f %%",
        len(found.coded),
        len(sizes),
        format_bytes(layers.coded_bytes) + (" of host memory" if layers.staged else ""),
        format_bytes(sum(sizes[n].decoded for n in found.coded)),
        format_bytes(layers.arena_bytes),
        1 / found.token_s,
        1 / found.decoded_token_s,
        f" and copying (alone: {rates.copy / 1e9:.2f} GB/s)" if layers.staged else "",
        rates.feed / 1e9,
        rates.run_decoded / 1e9,
        rates.run_coded / 1e9,
        100 * rates.overlap,
    )
    if found.for_room:
        logger.warning(
            "%d layers stay coded for want of memory on the device, whatever --resident-tolerance %g allows",
            found.for_room,
            tolerance,
        )
    if not found.coded:
        logger.warning(
            "no layer stays coded: that would cost more than --resident-tolerance %g of the speed, or save nothing",
            tolerance,
        )
    return found


def measure(model: Llama, layers: CodedLayers, kv_dtype: torch.dtype, recorder: Recorder | None = None) -> Rates:
    """The rates, by a token at position 0 through a few of the coded layers; medians."""
    layers.take_back()
    numbers = sorted(layers.coded)
    count = 2 if layers.staged else SAMPLED_LAYERS
    sample = numbers[:: max(1, len(numbers) // count)][:count]
    size = sum(layers.coded[number].decoded_bytes for number in sample)
    step = _Step(model, kv_dtype, len(sample))
    stack = layers.lend(sample)
    run_s = step.median_s(lambda: step.run(stack, step.cache))
    recorded_s = None if recorder is None else step.median_s(recorder(lambda: step.run(stack, step.cache)))
    alone = [([layer], [cache]) for layer, cache in zip(stack, step.cache, strict=True)]
    alone_s = sum(step.median_s(lambda one=one: step.run(*one)) for one in alone)  # type: ignore[misc]
    rest_s = step.median_s(step.rest)
    layers.take_back()
    ring = layers.some(sample)
    feed_s, both_s = step.median_s(ring.decode_all), step.median_s(lambda: step.run_ring(ring))
    copy_s = step.median_s(ring.send_all) if layers.staged else None
    ring.take_back()
    hidden = (feed_s + alone_s - both_s) / min(feed_s, alone_s)
    return Rates(
        feed=size / feed_s,
        run_decoded=size / run_s,
        run_coded=size / alone_s,
        overlap=min(1.0, max(0.0, hidden)),
        rest_s=rest_s,
        recorded=None if recorded_s is None else size / recorded_s,
        copy=math.inf if copy_s is None else size / copy_s,
    )


class _Step:
    """One token at position 0 of a cache of its own."""

    def __init__(self, model: Llama, kv_dtype: torch.dtype, num_layers: int) -> None:
        self._device = device = model.ops.device
        self._model = model
        self.cache = allocate(model.spec, 1, kv_dtype, device)[:num_layers]
        self._cos, self._sin = model.rope.cos_sin(torch.zeros(1, dtype=torch.int64, device=device), [1])
        ones = torch.ones(1, dtype=torch.int32, device=device)
        self._batch = AttentionBatch(
            slots=torch.zeros(1, dtype=torch.int64, device=device),
            block_tables=torch.zeros((1, 1), dtype=torch.int32, device=device),
            context_lens=ones,
            query_starts=torch.tensor([0, 1], dtype=torch.int32, device=device),
            context_lens_host=[1],
            query_starts_host=[0, 1],
            block_size=1,
            num_decodes=1,
            max_query_len=1,
            max_context_len=1,
        )
        self._scale = model.spec.head_dim**-0.5

    def run(self, layers: Sequence[Layer], cache: Sequence[LayerKv]) -> None:
        """A token through decoded layers."""
        self._model.ops.run_layers(self._hidden(), layers, self._cos, self._sin, cache, self._batch, self._scale)

    def run_ring(self, layers: CodedLayers) -> None:
        """A token through coded layers."""
        layers.run(self._hidden(), self._cos, self._sin, self.cache, self._batch, self._scale)

    def rest(self) -> None:
        """What comes behind the layers."""
        self._model.logits(self._hidden())

    def median_s(self, call: Callable[[], object]) -> float:
        """Seconds of a call, after one that is not counted: it makes programs and touches memory."""
        self._timed(call)
        spent: list[float] = []
        begun = time.perf_counter()
        while len(spent) < TRIALS or time.perf_counter() - begun < LEAST_S:
            spent.append(self._timed(call))
        return median(spent)

    def _timed(self, call: Callable[[], object]) -> float:
        started = time.perf_counter()
        call()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() - started

    def _hidden(self) -> Tensor:
        ops = self._model.ops
        return torch.ones(1, self._model.spec.hidden_size, dtype=ops.dtype, device=ops.device)

"""Which layers stay coded in memory: as many as the speed allows, from rates measured on this machine.

Not the layers themselves (`server.model.coded`). A step of one token is predicted as

    rest + sum over decoded layers of t_raw + sum over coded layers of (t_run + t_dec - overlap min(t_run, t_dec)),

with t_dec = bytes / decode bandwidth. Where decoding has cores of its own, overlap is 1 and a coded layer takes
max(t_run, t_dec) (algorithm of "double compression", arXiv 2502.15443, section on speed-adaptive compression, in our
reading); here decoders and kernels share the cores, so how much really overlaps is measured on a few layers.
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
from server.engine.kv_cache import allocate
from server.model.coded import CodedLayers
from server.model.llama import Llama
from spq.errors import OptionError
from spq.sizes import format_bytes

logger = logging.getLogger(__name__)

SAMPLED_LAYERS = 4
TRIALS = 5  # of each rate at least,
LEAST_S = 0.2  # and for so long: on a busy machine it takes a while until all threads have a core


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured; bytes are those of decoded integers."""

    decode: float  # bytes/s, all decoding threads, nothing else running
    run_decoded: float  # bytes/s of several layers in a row, for one token
    run_coded: float  # bytes/s of a layer that runs alone, as a coded one does: threads have to wake
    overlap: float  # 0..1 of the shorter of decoding and running that is hidden by the other
    rest_s: float  # of a step: the head

    def decoded_s(self, size: int) -> float:
        """Seconds of a decoded layer of `size` bytes."""
        return size / self.run_decoded

    def coded_s(self, size: int) -> float:
        """Seconds of a coded layer of `size` bytes."""
        run, decode = size / self.run_coded, size / self.decode
        return run + decode - self.overlap * min(run, decode)


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """What a layer may weigh."""

    decoded: int
    coded: int
    arena: int  # one half of it


@dataclass(frozen=True, slots=True)
class Plan:
    """A choice, and what it should do."""

    coded: tuple[int, ...]  # numbers of layers
    decoded_token_s: float  # predicted with nothing coded
    token_s: float  # predicted
    saved_bytes: int


def plan(layers: dict[int, LayerBytes], rates: Rates, tolerance: float) -> Plan:
    """Leave coded what frees most bytes per second lost, as long as tokens/s falls by at most `tolerance` (0..1).

    At 1 all layers that save anything stay coded. The arena of two layers counts against what is saved: nothing stays
    coded where that would be no gain.
    """
    raw_s = rates.rest_s + sum(rates.decoded_s(layer.decoded) for layer in layers.values())
    limit_s = raw_s / (1 - tolerance) if tolerance < 1 else math.inf
    lost_s = {n: rates.coded_s(layer.decoded) - rates.decoded_s(layer.decoded) for n, layer in layers.items()}
    gain = {n: layer.decoded - layer.coded for n, layer in layers.items()}
    order = sorted((n for n in layers if gain[n] > 0), key=lambda n: (max(lost_s[n], 0.0) / gain[n], n))
    chosen: list[int] = []
    token_s = raw_s
    for number in order:
        if token_s + lost_s[number] <= limit_s:
            chosen.append(number)
            token_s += lost_s[number]
    saved = sum(gain[n] for n in chosen) - 2 * max((layers[n].arena for n in chosen), default=0)
    if saved <= 0:
        return Plan((), raw_s, raw_s, 0)
    return Plan(tuple(sorted(chosen)), raw_s, token_s, saved)


def settle(model: Llama, layers: CodedLayers, kv_dtype: torch.dtype, tolerance: float) -> Plan:
    """Measure, plan, and decode for good the layers that do not stay coded. All are coded when this is called.

    Raises OptionError for a model without integers.
    """
    if not layers.coded:
        raise OptionError("--resident coded: no layer of this model has integers; compress it, or leave it decoded")
    sizes = {n: LayerBytes(x.decoded_bytes, x.coded_bytes, x.arena_bytes) for n, x in layers.coded.items()}
    rates = measure(model, layers, kv_dtype)
    found = plan(sizes, rates, tolerance)
    layers.keep_decoded([number for number in sizes if number not in found.coded])
    logger.info(
        "resident: %d of %d layers stay coded (%s in place of %s, and an arena of %s); predicted %.1f tokens/s for one "
        "stream, %.1f with all decoded; measured: decoding %.2f GB/s, layers %.2f GB/s (alone: %.2f), "
        "overlap %.0f %%",
        len(found.coded),
        len(sizes),
        format_bytes(layers.coded_bytes),
        format_bytes(sum(sizes[n].decoded for n in found.coded)),
        format_bytes(layers.arena_bytes),
        1 / found.token_s,
        1 / found.decoded_token_s,
        rates.decode / 1e9,
        rates.run_decoded / 1e9,
        rates.run_coded / 1e9,
        100 * rates.overlap,
    )
    if not found.coded:
        logger.warning(
            "no layer stays coded: that would cost more than --resident-tolerance %g of the speed, or save nothing",
            tolerance,
        )
    return found


def measure(model: Llama, layers: CodedLayers, kv_dtype: torch.dtype) -> Rates:
    """The rates, by a token at position 0 through a few of the coded layers; medians."""
    numbers = sorted(layers.coded)
    sample = numbers[:: max(1, len(numbers) // SAMPLED_LAYERS)][:SAMPLED_LAYERS]
    size = sum(layers.coded[number].decoded_bytes for number in sample)
    step = _Step(model, kv_dtype, len(sample))
    stack = layers.lend(sample)
    run_s = _median_s(lambda: step.run(stack, step.cache))
    alone = [([layer], [cache]) for layer, cache in zip(stack, step.cache, strict=True)]
    alone_s = sum(_median_s(lambda one=one: step.run(*one)) for one in alone)  # type: ignore[misc]
    rest_s = _median_s(step.rest)
    layers.take_back()
    ring = layers.some(sample)
    decode_s, both_s = _median_s(ring.decode_all), _median_s(lambda: step.run_ring(ring))
    ring.take_back()
    hidden = (decode_s + alone_s - both_s) / min(decode_s, alone_s)
    return Rates(
        decode=size / decode_s,
        run_decoded=size / run_s,
        run_coded=size / alone_s,
        overlap=min(1.0, max(0.0, hidden)),
        rest_s=rest_s,
    )


class _Step:
    """One token at position 0 of a cache of its own."""

    def __init__(self, model: Llama, kv_dtype: torch.dtype, num_layers: int) -> None:
        device = model.ops.device
        self._model = model
        self.cache = allocate(model.spec, 1, kv_dtype, device)[:num_layers]
        self._cos, self._sin = model.rope.cos_sin(torch.zeros(1, dtype=torch.int64), [1])
        ones = torch.ones(1, dtype=torch.int32)
        self._batch = AttentionBatch(
            slots=torch.zeros(1, dtype=torch.int64),
            block_tables=torch.zeros((1, 1), dtype=torch.int32),
            context_lens=ones,
            query_starts=torch.tensor([0, 1], dtype=torch.int32),
            context_lens_host=[1],
            query_starts_host=[0, 1],
            block_size=1,
            num_decodes=1,
            max_query_len=1,
            max_context_len=1,
        )
        self._scale = model.spec.head_dim**-0.5

    def run(self, layers: Sequence[Layer], cache: Sequence[LayerKv]) -> Tensor:
        return self._model.ops.run_layers(self._hidden(), layers, self._cos, self._sin, cache, self._batch, self._scale)

    def run_ring(self, layers: CodedLayers) -> Tensor:
        return layers.run(self._hidden(), self._cos, self._sin, self.cache, self._batch, self._scale)

    def rest(self) -> Tensor:
        return self._model.logits(self._hidden())

    def _hidden(self) -> Tensor:
        return torch.ones(1, self._model.spec.hidden_size)


def _median_s(call: Callable[[], object]) -> float:
    """Seconds of a call, after one that is not counted: it makes programs and touches memory."""
    call()
    spent: list[float] = []
    begun = time.perf_counter()
    while len(spent) < TRIALS or time.perf_counter() - begun < LEAST_S:
        started = time.perf_counter()
        call()
        spent.append(time.perf_counter() - started)
    return median(spent)
